"""What one event of a stream costs the event loop, by how much has been said before it.

`python -m benchmarks.events` makes the events of `steer_completion` (both types, 10 log-probabilities) and of `steer`
with `deltas` for a generation that is already there, and prints microseconds and bytes of an event around tokens 100,
300 and 1,000, beside those of copying as many bytes once. Medians of 40 events in each of `--rounds` rounds, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.machine import Load, description
from neuronpedia_inference.completion import Begun, Completion
from neuronpedia_inference.domain import Sampling, TokenLogprob, Tokens, Written
from neuronpedia_inference.operations.rendering import json_pieces
from neuronpedia_inference.operations.steer import _texts
from neuronpedia_inference.operations.story import Story, Transcript, logprob_reply
from neuronpedia_inference.schemas.steer import SteerCompletionRequest, SteerResponse, SteerText
from neuronpedia_inference.web.dialects import SSE

AT, AROUND, N_LOGPROBS = (100, 300, 1000), 20, 10
Sample = tuple[float, int, float]
"""Seconds, bytes, seconds of copying the bytes."""


def request() -> SteerCompletionRequest:
    body: dict[str, Any] = {"prompt": "a", "model": "m", "steer_method": "SIMPLE_ADDITIVE", "normalize_steering": False}
    body |= {"types": ["STEERED", "DEFAULT"], "features": [], "n_completion_tokens": 1, "temperature": 0}
    return SteerCompletionRequest(**body, strength_multiplier=1, freq_penalty=0, seed=1, n_logprobs=N_LOGPROBS)


async def generation(n_tokens: int) -> AsyncIterator[tuple[Written, ...]]:
    for number in range(n_tokens):
        top = tuple((f" word{number + n}", -0.1234567 * n) for n in range(N_LOGPROBS))
        yield (Written(f" word{number}", (number,), (TokenLogprob(f" word{number}", -0.1234567, top),)),) * 2


def so_far(story: Story, _: tuple[Written, ...]) -> bytes:
    return b"".join(json_pieces(_texts(request(), story.rows), "snake", omit_null=True))


def only_new(story: Story, news: tuple[Written, ...]) -> bytes:
    texts = [
        SteerText.model_construct(
            text=one.text, messages=None, logprobs=[logprob_reply(p) for p in one.logprobs], finish_reason=None
        )
        for one in news
    ]
    reply = SteerResponse.model_construct(steered=texts[0], default=texts[1])
    return b"".join(json_pieces(reply, "snake", omit_null=False))


async def measured(render: Any) -> dict[int, list[Sample]]:
    """By token."""
    found: dict[int, list[Sample]] = {at: [] for at in AT}
    prompt = Tokens((1,), ("a",), (False,), has_bos=False)
    begun = Begun(prompt, "", [(), ()], generation(max(AT) + AROUND))
    rows = [Transcript("", has_logprobs=True) for _ in range(2)]
    story = Story(Completion(prompt, [None, None], Sampling(1)), begun, rows)
    number = 0
    async for news in story:
        number += 1
        started = time.perf_counter()
        body = SSE.event(render(story, news))
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        bytearray(body)
        copied = time.perf_counter() - started
        for at in AT:
            if abs(number - at) <= AROUND:
                found[at].append((seconds, len(body), copied))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ways = {"so far": so_far, "deltas": only_new}
    load = Load()
    runs = [(name, asyncio.run(measured(render))) for _ in range(rounds) for name, render in ways.items()]
    print("| events | token | bytes | us | us of copying |\n|---|---|---|---|---|")
    for name in ways:
        for at in AT:
            samples = [sample for way, run in runs if way == name for sample in run[at]]
            seconds, n_bytes, copied = (statistics.median(part) for part in zip(*samples, strict=True))
            print(f"| {name} | {at} | {n_bytes:.0f} | {1e6 * seconds:.0f} | {1e6 * copied:.1f} |")
    print(description(), load.since())


if __name__ == "__main__":
    main()
