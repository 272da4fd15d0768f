"""Is the server there while it works? What one caller does to `/health`, to memory, and to everybody else's stream.

`python -m benchmarks.stalls requests|streams|readers|gaps` starts a server, asks it for `/health` fifty times a second
from another process, does to it what the sub-command says, prints a table, and writes its part of
`benchmarks/results/stalls.json`.

- requests: the largest legal request of each kind, each on a server of its own that has answered small ones, so that
  what was admitted at most was admitted for it.
- streams: a long text with log-probabilities, streamed and whole in turns; the bytes of its events, and with `deltas`.
- readers: clients that ask for a stream, never read, and hang up.
- gaps: a stream beside 12 clients that rank the features of all SAEs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.machine import Load, description
from benchmarks.stalls_asks import BODY_BYTES, Ask, Bounds, asks, completion, everything, small
from benchmarks.stalls_client import Answer, Server, markdown, quantile, serving

RESULTS = Path(__file__).parent / "results" / "stalls.json"
LIMITS = {
    "default": {},
    "2000": {"TOKEN_LIMIT": "2000", "MAX_TOKENS": "4096"},
    "bodies": {"MAX_BODY_BYTES": str(BODY_BYTES)},
}
"""Large bodies are refused by their size at the default limits, so they are sent to a server that takes them in too."""
LARGE_BYTES = 2**20
N_RANKERS, RANKED_TOKENS, GAP_TOKENS = 12, (20, 150), 200
COMPLETION, STEER, ALL = "/v1/steer/completion", "/v1/steer", "/v1/activation/all"
Row = dict[str, Any]

# requests


async def requests(wanted: argparse.Namespace) -> list[Row]:
    rows = []
    for name in wanted.limits:
        async with serving(**LIMITS[name]) as server:
            bounds = Bounds.of(server.url)
        for ask in asks(bounds, wanted.tokens):
            if wanted.only in ask.name and (name != "bodies" or len(ask.body) > LARGE_BYTES):
                async with serving(**LIMITS[name]) as server:
                    rows.append({"limits": name, **await _request(server, ask)})
                print(rows[-1], file=sys.stderr)
    return rows


async def _request(server: Server, ask: Ask) -> Row:
    for path, body in small():
        assert (answer := await server.ask(path, body)).status == 200, answer.head
    before_mib = await server.quiet_mib()
    answer = await server.ask(ask.path, ask.body)
    seen = server.seen()
    return {
        "request": ask.name,
        "status": answer.status,
        "body MB": round(len(ask.body) / 1e6, 2),
        "answer MB": round(answer.n_bytes / 1e6, 2),
        "seconds": round(answer.seconds, 2),
        **seen.health(),
        "MiB before": round(before_mib),
        "MiB more": round(max(seen.mib) - before_mib, 1),
        "MiB admitted": _rounded(await server.admitted_mib()),
        "MiB kept": round(await server.quiet_mib() - before_mib, 1),
    }


# streams


async def streams(wanted: argparse.Namespace) -> list[Row]:
    async with serving(**_model(wanted.model)) as server:
        await server.ask(COMPLETION, completion(8, 10, stream=False))
        pairs = [await _pair(server, wanted.tokens) for _ in range(wanted.pairs)]
        whole, streamed = ([pair[n] for pair in pairs] for n in (0, 1))
        ratio = statistics.median(s.seconds / w.seconds for w, s in pairs)
        print(f"streamed to whole, median of {len(pairs)}: {ratio:.3f}")
        return [
            *({"answer": "whole", **_sizes(answer)} for answer in whole),
            *({"answer": "stream", **_sizes(answer)} for answer in streamed),
            *[await _deltas(server, n) for n in (100, 300, 1000) if n <= wanted.tokens],
            {"answer": "stream / whole, median", "seconds": round(ratio, 3)},
        ]


async def _pair(server: Server, n_tokens: int) -> tuple[Answer, Answer]:
    """Whole, then streamed."""
    whole, streamed = [
        await server.ask(COMPLETION, completion(n_tokens, 10, stream=stream)) for stream in (False, True)
    ]
    return whole, streamed


async def _deltas(server: Server, n_tokens: int) -> Row:
    body = {"prompt": "Once upon a time", "features": [], "max_new_tokens": n_tokens, "n_logprobs": 10}
    answer = await server.ask(STEER, json.dumps({**body, "stream": True, "deltas": True}).encode())
    return {"answer": f"deltas of {n_tokens} tokens", **_sizes(answer)}


def _sizes(answer: Answer) -> Row:
    sizes = answer.frames.sizes
    return {
        "status": answer.status,
        "seconds": round(answer.seconds, 2),
        "bytes": answer.n_bytes,
        "events": len(sizes) or None,
        "bytes of event 100": sizes[99] if len(sizes) >= 100 else None,
        "bytes of the last": sizes[-1] if sizes else None,
    }


# readers


async def readers(wanted: argparse.Namespace) -> list[Row]:
    rows = []
    for n_clients in wanted.clients:
        for n_tokens in wanted.tokens:
            async with serving() as server:
                await _never_read(server, n_clients, n_tokens, wanted.seconds)
                before_mib = await server.quiet_mib()
                during, after = await _never_read(server, n_clients, n_tokens, wanted.seconds)
                end_mib = await server.quiet_mib()
            memory = {"MiB before": round(before_mib, 1), "MiB end": round(end_mib, 1)}
            growth = {"growth %": round(100 * (end_mib / before_mib - 1), 2)}
            for when, health in (("before they hang up", during), ("after", after)):
                rows.append({"clients": n_clients, "tokens": n_tokens, "when": when, **health, **memory, **growth})
    return rows


async def _never_read(server: Server, n_clients: int, n_tokens: int, seconds: float) -> tuple[Row, Row]:
    """`/health` until they hang up, and from then until the server is at rest."""
    await server.quiet_mib()
    body = completion(n_tokens, 10, stream=True)
    async with AsyncExitStack() as stack:
        for _ in range(n_clients):
            await stack.enter_async_context(server.unread(COMPLETION, body))
        await asyncio.sleep(seconds)
        during = server.seen().health()
    await server.at_rest()
    return during, server.seen().health()


# gaps


async def gaps(wanted: argparse.Namespace) -> list[Row]:
    body = completion(wanted.tokens, 0, stream=True)
    async with serving() as server:
        await server.ask(COMPLETION, body)
        rows, step_s = [], 0.0
        for n_tokens in (None, *RANKED_TOKENS):
            ranking = [] if n_tokens is None else [_rank(server, n_tokens) for _ in range(N_RANKERS)]
            answer = await _beside(ranking, lambda: server.ask(COMPLETION, body))
            found = answer.frames.gaps_s
            step_s = step_s or statistics.median(found)
            beside = "nothing" if n_tokens is None else f"{N_RANKERS} x all, {n_tokens} tokens"
            rows.append({"beside": beside, "events": len(answer.frames.sizes), **_in_steps(found, step_s)})
        return rows


async def _rank(server: Server, n_tokens: int) -> None:
    """Until cancelled."""
    for body in cycle([everything(n_tokens)]):
        assert (answer := await server.ask(ALL, body)).status == 200, answer.head


async def _beside(others: list[Any], measured: Callable[[], Awaitable[Answer]]) -> Answer:
    """`measured` while `others` run, which must not end before it does."""
    tasks = [asyncio.create_task(other) for other in others]
    try:
        await asyncio.sleep(1 if tasks else 0)
        answer = await measured()
        assert not any(task.done() for task in tasks), [task.exception() for task in tasks if task.done()]
        return answer
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, AssertionError):
                await task


def _in_steps(gaps_s: list[float], step_s: float) -> Row:
    """step_s: a gap of the same stream alone, in the median."""
    return {
        "p50 ms": round(1000 * statistics.median(gaps_s), 1),
        "p50 steps": round(statistics.median(gaps_s) / step_s, 2),
        "p99 steps": round(quantile(gaps_s, 0.99) / step_s, 2),
        "worst steps": round(max(gaps_s) / step_s, 2),
    }


# The command


def _model(folder: str | None) -> dict[str, str]:
    return {} if folder is None else {"MODEL_ID": str(Path(folder).resolve()), "SAE_SETS": "[]"}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("requests")
    one.add_argument("--limits", nargs="+", choices=LIMITS, default=list(LIMITS))
    one.add_argument("--only", default="", help="part of a request's name")
    one.add_argument("--tokens", type=int, default=400, help="of the steers with log-probabilities")
    two = commands.add_parser("streams")
    two.add_argument("--tokens", type=int, default=1000)
    two.add_argument("--pairs", type=int, default=3)
    two.add_argument("--model", help="folder of another model, served without SAEs")
    three = commands.add_parser("readers")
    three.add_argument("--clients", type=int, nargs="+", default=[6, 32])
    three.add_argument("--tokens", type=int, nargs="+", default=[150, 200])
    three.add_argument("--seconds", type=float, default=40.0, help="until the clients hang up")
    four = commands.add_parser("gaps")
    four.add_argument("--tokens", type=int, default=GAP_TOKENS)
    for command in (one, two, three, four):
        command.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    wanted, load = parsed(), Load()
    measure = {"requests": requests, "streams": streams, "readers": readers, "gaps": gaps}[wanted.command]
    rows = asyncio.run(measure(wanted))
    asked = {name: value for name, value in vars(wanted).items() if name not in ("command", "out")}
    machine = {name: value for name, value in description().items() if name != "threads_each"}
    part = {"machine": machine, "load": load.since(), "asked": asked, "rows": rows}
    body = json.loads(wanted.out.read_text(encoding="utf-8")) if wanted.out.exists() else {}
    wanted.out.parent.mkdir(exist_ok=True)
    wanted.out.write_text(json.dumps({**body, wanted.command: part}, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))
    print(f"\n{machine}\n{part['load']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
