"""Ten minutes of 64 clients, of whose requests a quarter hang up and a tenth are hostile: does the server stand?

`python -m benchmarks.siege` besieges a server without a secret, then one with, prints a table for each and writes
`benchmarks/results/siege.json`. It exits with 1 if for one of them one of these does not hold:

- No 5xx but 503s that were counted, and no answer to anybody that he should not get.
- Every request that reached an operation is counted exactly once, as in `benchmarks.soak`.
- Nothing is left inside at the end.
- Memory at the end, quiet, is within 3 % of what it was, quiet, after two minutes of the same.
- `/health`, asked fifty times a second from another process, answered within 100 ms in the 99th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import siege_hostile as hostile
from benchmarks.machine import Load, description
from benchmarks.process import Process
from benchmarks.siege_hostile import OUTSIDE, Door
from benchmarks.soak import LOAD_S, SETTINGS, Bound, Run, bounds, report, resident_mib, scrape_when_quiet, show
from benchmarks.soak_clients import ANSWER_S, RETRY_AFTER_S, Exchange, Tally, leave_of, outcome_of
from benchmarks.soak_mix import draw

RESULTS = Path(__file__).parent / "results" / "siege.json"
HOSTILE_SHARE = 0.1
SECRET = "siege-of-the-benchmark"
WITHOUT_AND_WITH: Mapping[str, dict[str, str]] = {"without a secret": {}, "with a secret": {"SECRET": SECRET}}
MOST_GROWTH, MOST_HEALTH_P99_MS = 0.03, 100.0


class Siege:
    """A crowd at one door, and what it saw."""

    def __init__(self, door: Door, http: httpx.AsyncClient) -> None:
        self.tally = Tally()
        self.attacks: Counter[str] = Counter()
        """By outcome, those that reached no operation included."""
        self._door, self._http = door, http

    async def last(self, n_clients: int, seconds: float, seed: int) -> None:
        """The clients ask until the time is over, and then wait for what they have begun."""
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(n_clients):
                group.create_task(self._client(random.Random(f"{seed}/{number}"), until_s))

    async def _client(self, rng: random.Random, until_s: float) -> None:
        while time.monotonic() < until_s:
            outcome = await (self._attack(rng) if rng.random() < HOSTILE_SHARE else self._ask(rng))
            if outcome == "overloaded":
                await asyncio.sleep(RETRY_AFTER_S)

    async def _ask(self, rng: random.Random) -> str:
        exchange = Exchange(draw(rng))
        outcome = await outcome_of(exchange, self._http, leave_of(exchange.ask, rng, self.tally), self.tally)
        self.tally.counts[exchange.ask.operation, outcome] += 1
        return outcome

    async def _attack(self, rng: random.Random) -> str:
        attack = hostile.draw(rng)
        try:
            operation, outcome = await attack(self._door, self._http, rng)
        except (hostile.Unexpected, httpx.HTTPError, OSError) as exc:
            self.tally.faults.append(f"{getattr(attack, '__name__', 'attack')}: {type(exc).__name__} {exc}")
            return "failed"
        self.attacks[outcome] += 1
        if operation != OUTSIDE:
            self.tally.counts[operation, outcome] += 1
        return outcome


def _seen(polling: Process) -> list[float]:
    """Milliseconds of `/health` since the last time."""
    polling.send("take")
    return json.loads(polling.line())["ms"]


async def besieged(
    door: Door, server: psutil.Process, polling: Process, wanted: argparse.Namespace
) -> tuple[Run, Counter[str]]:
    """What was seen from minute two on, and of the attacks."""
    limits = httpx.Limits()
    async with httpx.AsyncClient(base_url=door.url, timeout=ANSWER_S, limits=limits, headers=door.headers) as http:
        await Siege(door, http).last(wanted.clients, wanted.warm_up, wanted.seed + 1)
        before = await scrape_when_quiet(http)
        warm_mib = await resident_mib(server)
        _seen(polling)
        siege = Siege(door, http)
        await siege.last(wanted.clients, wanted.seconds - wanted.warm_up, wanted.seed)
        after = await scrape_when_quiet(http)
        health_ms = _seen(polling)
        end_mib = await resident_mib(server)
        return Run(siege.tally, before, after, health_ms, warm_mib, end_mib), siege.attacks


def siege_bounds(run: Run) -> list[Bound]:
    """The soak's, with its bounds of memory and `/health` exchanged for ours."""
    p99_ms = sorted(run.health_ms)[int(0.99 * len(run.health_ms))]
    kept = [bound for bound in bounds(run) if bound.name not in ("growth of memory", "/health, median ms")]
    return [
        *kept,
        Bound("growth of memory", round(run.growth, 4), MOST_GROWTH),
        Bound("/health, 99th percentile, ms", round(p99_ms, 1), MOST_HEALTH_P99_MS),
    ]


def run(settings: Mapping[str, str], wanted: argparse.Namespace) -> tuple[Run, Counter[str]]:
    server = Process("neuronpedia_inference", "serve", "--port", "0", env={**SETTINGS, **settings})
    headers = {"X-SECRET-KEY": settings["SECRET"]} if settings else {}
    try:
        url = server.wait_for(re.compile(r"Listening on (http://\S+)"), LOAD_S).group(1)
        server.wait_for(re.compile(r"^Ready in "), LOAD_S)
        (process,) = psutil.Process().children()
        polling = Process("benchmarks.stalls_probe", url, str(process.pid))
        try:
            return asyncio.run(besieged(Door(url, headers), process, polling, wanted))
        finally:
            polling.close()
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of each siege")
    parser.add_argument("--warm-up", type=float, default=120.0, help="of them, until memory is looked at")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WITHOUT_AND_WITH, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    wanted = parser.parse_args()
    written: dict[str, Any] = json.loads(wanted.out.read_text(encoding="utf-8")) if wanted.out.exists() else {}
    stands = True
    for name, settings in WITHOUT_AND_WITH.items():
        if wanted.only not in (None, name):
            continue
        load = Load()
        seen, attacks = run(settings, wanted)
        judged = siege_bounds(seen)
        body = {"machine": description(), "load": load.since(), **report(seen, wanted), "attacks": dict(attacks)}
        body |= {"bounds": [{**asdict(bound), "holds": bound.holds} for bound in judged]}
        body["asked"] = {key: value for key, value in body["asked"].items() if key not in ("out", "only")}
        print(f"{name}; attacks: {dict(attacks)}; load {body['load']}")
        show(body)
        written[name] = body
        stands = stands and all(bound.holds for bound in judged)
    wanted.out.parent.mkdir(exist_ok=True)
    wanted.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0 if stands else 1


if __name__ == "__main__":
    sys.exit(main())
