"""What a sweep takes beside the same requests to `steer` one by one: 3 features, 8 strengths, 2 seeds, 24 tokens.

`python -m benchmarks.sweeps` prints the numbers and writes `benchmarks/results/sweeps.json`. Both take turns in one
process; a ratio is the median of the ratios of each round. The requests one by one are judged too, as cells are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import Load, description
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

RESULTS = Path(__file__).parent / "results" / "sweeps.json"
FEATURES = [
    {"source": "15-res-4k", "index": 1113},
    {"source": "10-res-4k", "index": 1608},
    {"source": "20-res-4k", "index": 2657},
]
STRENGTHS = [20, 35, 50, 65, 80, 95, 110, 130]
SEEDS = [1, 2]
COMMON: dict[str, Any] = {"prompt": "The most important thing is", "max_new_tokens": 24, "temperature": 0.7}


async def swept(rt: Runtime) -> list[str]:
    body = {**COMMON, "features": FEATURES, "strengths": STRENGTHS, "seeds": SEEDS}
    found = await answer(by_name["sweep"], body, rt)
    return [cell["text"] for cell in found["cells"]]


async def one_by_one(rt: Runtime, *, judge: bool = True) -> list[str]:
    texts: list[str] = []
    for feature in FEATURES:
        for strength in STRENGTHS:
            for seed in SEEDS:
                steered = {**COMMON, "features": [{**feature, "strength": strength}], "seed": seed}
                asked = {**steered, "judge": judge, "compare": False}
                texts.append((await answer(by_name["steer"], asked, rt))["steered"]["text"])
    return texts


async def timed(what: Callable[[], Awaitable[list[str]]]) -> tuple[float, list[str]]:
    started = time.perf_counter()
    texts = await what()
    return time.perf_counter() - started, texts


async def measured(rt: Runtime, n_rounds: int) -> dict[str, Any]:
    contenders: dict[str, Callable[[], Awaitable[list[str]]]] = {
        "sweep": lambda: swept(rt),
        "one by one": lambda: one_by_one(rt),
        "one by one, not judged": lambda: one_by_one(rt, judge=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    n_equal = 0
    for number in range(n_rounds + 1):
        texts: dict[str, list[str]] = {}
        for name, contender in contenders.items():
            await rt.forget()
            taken, texts[name] = await timed(contender)
            if number:
                seconds[name].append(taken)
        n_equal = sum(a == b for a, b in zip(texts["sweep"], texts["one by one"], strict=True))
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["sweep"], seconds[name], strict=True))
        for name in contenders
        if name != "sweep"
    }
    return {
        "seconds": {name: round(statistics.median(some), 2) for name, some in seconds.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "equal texts": f"{n_equal} of {len(FEATURES) * len(STRENGTHS) * len(SEEDS)}",
    }


def main() -> None:
    chosen = _arguments()
    load = Load()
    rt = Runtime.load(Settings.read())
    try:
        found = asyncio.run(measured(rt, chosen.rounds))
    finally:
        rt.close()
    result = {"machine": description(), "load": load.since(), **found}
    chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: at least one round is needed")
    return chosen


if __name__ == "__main__":
    main()
