"""How long a short completion takes beside long ones, and beside requests of many steers.

`python -m benchmarks.fairness` starts a server that lets 64 requests in and asks it for completions of 4 tokens, one
after the other, while others ask for 4,000 tokens each, again and again: 4 of them, then 32, from the first moment and
after a minute; then 8 whose rows have 512 steers each. It writes `benchmarks/results/fairness.json`. Ratios are to the
median beside 4.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import Load, description
from benchmarks.process import Process

RESULTS = Path(__file__).parent / "results" / "fairness.json"
SETTINGS = {"NUM_THREADS": "1", "MAX_CONCURRENT_REQUESTS": "64", "MAX_TOKENS": "4096", "REQUEST_MEMORY_GIB": "12"}
SHORT_TOKENS, LONG_TOKENS, N_STEERS = 4, 4000, 512
FEW, MANY, N_STEERED = 4, 32, 8
PAUSE_S, FIRST_S = 0.5, 60.0
BOUND = 3.0
D_MODEL = 576


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="beside the many")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    load = Load()
    rows = asyncio.run(_measured(chosen.seconds))
    body = {"machine": {**description(), **load.since()}, "bound": BOUND, "rows": rows}
    chosen.output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


async def _measured(seconds: float) -> list[dict[str, Any]]:
    async with _server() as http:
        await _short(http)
        async with _others(http, FEW, long()):
            few = await _shorts(http, seconds / 4)
        async with _others(http, MANY, long()):
            many = await _shorts(http, seconds)
        async with _others(http, N_STEERED, steered()):
            beside_steers = await _shorts(http, seconds / 4)
    base = statistics.median(spent for _, spent in few)
    first = [one for one in many if one[0] < FIRST_S]
    later = [one for one in many if one[0] >= FIRST_S]
    cases = {
        f"{FEW} of {LONG_TOKENS} tokens": few,
        f"{MANY} of {LONG_TOKENS} tokens, first minute": first,
        f"{MANY} of {LONG_TOKENS} tokens, later": later,
        f"{N_STEERED} of {N_STEERS} steers": beside_steers,
    }
    return [_row(name, [spent for _, spent in taken], base) for name, taken in cases.items() if taken]


def _row(name: str, spent: list[float], base: float) -> dict[str, Any]:
    median, worst = statistics.median(spent), max(spent)
    numbers = {"median_s": median, "worst_s": worst, "ratio": median / base, "worst_ratio": worst / base}
    return {"beside": name, "n": len(spent), **{key: round(value, 3) for key, value in numbers.items()}}


def long() -> dict[str, Any]:
    body = {"prompt": "Once upon a time there was", "max_new_tokens": LONG_TOKENS, "temperature": 0, "features": []}
    return {**body, "compare": False}


def steered() -> dict[str, Any]:
    """Steers that cannot be summed: each projects what those before it have left."""
    vectors = [
        {
            "hook": "blocks.15.hook_resid_post",
            "vector": [float(n == place) for place in range(D_MODEL)],
            "strength": 0.999,
        }
        for n in range(N_STEERS)
    ]
    return {**long(), "vectors": vectors, "method": "ORTHOGONAL_DECOMP"}


async def _shorts(http: httpx.AsyncClient, seconds: float) -> list[tuple[float, float]]:
    """(seconds since the beginning, seconds that it took) of short completions, one after the other."""
    taken, began = [], time.perf_counter()
    while (since := time.perf_counter() - began) < seconds:
        taken.append((since, await _short(http)))
        await asyncio.sleep(PAUSE_S)
    return taken


async def _short(http: httpx.AsyncClient) -> float:
    body = {**long(), "max_new_tokens": SHORT_TOKENS, "vectors": [], "prompt": "My favourite recipe begins with"}
    started = time.perf_counter()
    response = await http.post("/v1/steer", json=body)
    response.raise_for_status()
    return time.perf_counter() - started


@asynccontextmanager
async def _others(http: httpx.AsyncClient, n: int, body: dict[str, Any]) -> AsyncIterator[None]:
    """So many callers, each asking again when it has been answered. All are inside before the first short one asks."""
    callers = [asyncio.create_task(_again_and_again(http, body)) for _ in range(n)]
    while int(await _gauge(http, "admitted_requests")) < n:
        for one in callers:
            if one.done():
                one.result()
        await asyncio.sleep(0.05)
    yield
    for one in callers:
        one.cancel()
    for one in callers:
        with suppress(asyncio.CancelledError):
            await one
    while int(await _gauge(http, "admitted_requests")):
        await asyncio.sleep(0.05)


async def _again_and_again(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    while True:
        response = await http.post("/v1/steer", json=body)
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.text[:300]}")


async def _gauge(http: httpx.AsyncClient, name: str) -> float:
    found = re.search(rf"^neuronpedia_{name} (\S+)$", (await http.get("/metrics")).text, re.MULTILINE)
    assert found, name
    return float(found.group(1))


@asynccontextmanager
async def _server() -> AsyncIterator[httpx.AsyncClient]:
    process = Process("neuronpedia_inference", "serve", "--port", "0", env=SETTINGS)
    try:
        url = process.wait_for(re.compile(r"Listening on (http://\S+)"), 300).group(1)
        process.wait_for(re.compile(r"^Ready in "), 300)
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
            yield http
    finally:
        process.close()


if __name__ == "__main__":
    main()
