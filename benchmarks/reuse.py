"""How much sooner an answer comes where the text, or the beginning of the chat, was seen lately.

`python -m benchmarks.reuse` writes `benchmarks/results/reuse.json`. Features: a new text of at least 160 tokens each
time, one feature at layer 15 of it, then another one; in process and over HTTP. Chats: a first turn of about 300 tokens
and its answer, then a second turn of about 20 more; the time to the first event of its stream, on a server that keeps
what it has computed and on one that does not, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cases import LONG, SENTENCE
from benchmarks.machine import Load, description
from benchmarks.process import Process

RESULTS = Path(__file__).parent / "results" / "reuse.json"
SETTINGS = {"NUM_THREADS": "1", "TOKEN_LIMIT": "640", "MAX_TOKENS": "1024"}
SOURCE = "15-res-4k"
Ask = Callable[[str, dict[str, Any]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="new texts, and chats")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    load = Load()
    body = {
        "in_process": _in_process(chosen.rounds),
        **_over_http(chosen.rounds),
    }
    result = {"machine": {**description(), **load.since()}, "rounds": chosen.rounds, **body}
    chosen.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(body, indent=2))


def _in_process(rounds: int) -> dict[str, Any]:
    import os

    os.environ.update(SETTINGS)
    from neuronpedia_inference.operations import answer, by_name
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings

    runtime = Runtime.load(Settings.read())
    loop = asyncio.new_event_loop()

    def ask(_: str, body: dict[str, Any]) -> Any:
        return loop.run_until_complete(answer(by_name["activation_single"], body, runtime))

    found = _features(ask, rounds)
    runtime.close()
    return found


def _over_http(rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        keeps = _served(stack, {})
        forgets = _served(stack, {"REUSE_MEMORY_GIB": "0"})
        features = _features(lambda path, body: keeps.post(path, json=body).raise_for_status(), rounds)
        return {"http": features, "chat": _chats(keeps, forgets, rounds)}


def _served(stack: ExitStack, settings: dict[str, str]) -> httpx.Client:
    process = Process("neuronpedia_inference", "serve", "--port", "0", env={**SETTINGS, **settings})
    stack.callback(process.close)
    url = process.wait_for(re.compile(r"Listening on (http://\S+)"), 300).group(1)
    process.wait_for(re.compile(r"^Ready in "), 300)
    return stack.enter_context(httpx.Client(base_url=url, timeout=600))


def _features(ask: Ask, rounds: int) -> dict[str, float]:
    """Milliseconds of a text's first feature and of its second, and their ratio."""
    first, second = [], []
    for number in range(rounds + 1):
        text = f"Number {number}. {LONG}"
        for taken, index in ((first, 3 * number), (second, 3 * number + 1)):
            body = {"prompt": text, "model": "", "source": SOURCE, "index": str(index)}
            taken.append(_ms(lambda body=body: ask("/v1/activation/single", body)))
    return _compared(first[1:], second[1:])


def _chats(keeps: httpx.Client, forgets: httpx.Client, rounds: int) -> dict[str, float]:
    """Milliseconds to the first event of a second turn, without and with what is kept, and their ratio."""
    without, with_it = [], []
    for number in range(rounds + 1):
        pair = ((forgets, without), (keeps, with_it))
        for http, taken in pair if number % 2 else pair[::-1]:
            taken.append(_second_turn_ms(http, f"Story {number}. " + " ".join([SENTENCE] * 17)))
    return _compared(without[1:], with_it[1:])


def _second_turn_ms(http: httpx.Client, text: str) -> float:
    """To its first event."""
    body = {"features": [], "compare": False, "max_new_tokens": 8, "prompt": [{"role": "user", "content": text}]}
    messages = http.post("/v1/steer", json=body).raise_for_status().json()["steered"]["messages"]
    more = {"role": "user", "content": "And what do you think of the other bank, which was open?"}
    return _ms(lambda: _first_event(http, {**body, "prompt": [*messages, more]}))


def _first_event(http: httpx.Client, body: dict[str, Any]) -> None:
    with http.stream("POST", "/v1/steer", json={**body, "stream": True}) as response:
        response.raise_for_status()
        next(response.iter_lines())


def _ms(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


def _compared(before: list[float], after: list[float]) -> dict[str, float]:
    """Medians, and the median of the ratios of pairs."""
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    numbers = {"without_ms": statistics.median(before), "with_ms": statistics.median(after)}
    return {name: round(value, 2) for name, value in {**numbers, "times_faster": statistics.median(ratios)}.items()}


if __name__ == "__main__":
    main()
