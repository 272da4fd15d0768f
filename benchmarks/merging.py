"""Requests that arrive together against the same requests one after another, on the embedded model, in process.

16 `activation_single` of like length, 8 at a time and one at a time, alternating. `python -m benchmarks.merging`
prints the result and writes `benchmarks/results/merging.json`.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead import machine
from neuronpedia_inference import embedded
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

RESULTS = Path(__file__).parent / "results" / "merging.json"
TEXT = "the river bank was closed on Sunday so we went to the other one near the old market square"
N_REQUESTS, AT_A_TIME, ROUNDS = 16, 8, 7


def prompts() -> list[str]:
    """16 different texts of 16 to 19 tokens."""
    words = TEXT.split()
    return [" ".join([*words[n % 4 :][: 13 + n % 4], str(n % 10)]) for n in range(N_REQUESTS)]


async def ask_all(runtime: Runtime, at_a_time: int) -> list[list[float]]:
    """Every prompt's activations of one feature, at most `at_a_time` requests in flight."""
    places = asyncio.Semaphore(at_a_time)

    async def one(prompt: str) -> list[float]:
        body: dict[str, Any] = {"prompt": prompt, "model": embedded.MODEL_ID, "source": "15-res-4k", "index": "3703"}
        async with places:
            return (await answer(by_name["activation_single"], body, runtime))["activation"]["values"]

    return await asyncio.gather(*map(one, prompts()))


async def run(runtime: Runtime) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {1: [], AT_A_TIME: []}
    answers: dict[int, list[list[float]]] = {}
    for number in range(ROUNDS + 1):
        for at_a_time in (1, AT_A_TIME) if number % 2 else (AT_A_TIME, 1):
            started = time.perf_counter()
            answers[at_a_time] = await ask_all(runtime, at_a_time)
            if number:  # the first round warms up
                seconds[at_a_time].append(time.perf_counter() - started)
    alone, together = (statistics.median(seconds[n]) for n in (1, AT_A_TIME))
    pairs = [(a, b) for one, other in zip(*answers.values(), strict=True) for a, b in zip(one, other, strict=True)]
    return {
        "one_at_a_time_s": round(alone, 3),
        "eight_at_a_time_s": round(together, 3),
        "speedup": round(alone / together, 2),
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "largest_value": max(max(pair) for pair in pairs),
    }


def main() -> None:
    torch.set_num_threads(1)
    runtime = Runtime.load(Settings.read(num_threads=1))
    lengths = {len(runtime.tokenize(prompt, "once")) for prompt in prompts()}
    before = machine()
    measured = asyncio.run(run(runtime))
    runtime.close()
    body = {"lengths": sorted(lengths), "before": before, "after": machine(), **measured}
    print(json.dumps(body, indent=2))
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
