"""One steering as JSON, and what every operation that takes it must make of it: what `steer` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

STEERING: dict[str, Any] = {
    "features": [{"source": "15-res-4k", "index": 1113, "strength": 35}],
    "vectors": [
        {"hook": "blocks.5.hook_resid_post", "vector": [((7 * n) % 13 - 6) / 5 for n in range(576)], "strength": 0.5}
    ],
    "edits": [{"do": "clamp", "feature": "20-res-4k/686", "amount": 40, "on": {"phase": "both", "from": 2}}],
    "strength_multiplier": 1.2,
    "max_dose": {"value": 2, "then": "clamp"},
}
PROMPT = "The most important thing is"
POINT, LAYER = "blocks.25.hook_resid_post", 25
N_NEW = 5

Answer = dict[str, Any]
Ask = Callable[[str, Answer], Answer]
"""The name of an operation and its body -> its answer."""


def check(ask: Ask, *, at_an_address: bool = True) -> list[str]:
    """Every operation against `steer`, and against itself without the steering, where it must differ. Which they were.
    OpenAI's are served at an address alone.

    Sums over 576 numbers in float32, in passes of other shapes, relative to states of up to some thousand.
    """
    watch = [{"hook": POINT}, {"lens": "LOGIT_LENS", "layers": [LAYER], "top_n": 3}]
    asked = {"prompt": PROMPT, "max_new_tokens": N_NEW, "watch": watch, "n_logprobs": 1}
    steered = ask("steer", {**asked, **STEERING})
    by_steer = steered["steered"]
    assert by_steer["text"] != steered["default"]["text"], "the control: it steers"
    parts = (_sweep, _capture, _score, _lens, *([_completions] if at_an_address else []))
    return [part(ask, STEERING, by_steer) for part in parts]


def _sweep(ask: Ask, steering: dict[str, Any], by_steer: Answer) -> str:
    body = {"prompt": PROMPT, "steerings": [steering], "strengths": [1], "max_new_tokens": N_NEW}
    told = ask("sweep", {**body, "watch": [{"hook": POINT}]})
    [cell], [plain] = told["cells"], told["default"]
    assert (cell["text"], cell["tokens"]) == (by_steer["text"], by_steer["tokens"])
    expect_close(cell["watch"]["values"][0]["after"], _states(by_steer))
    assert plain["text"] != cell["text"]
    return "sweep"


def _capture(ask: Ask, steering: dict[str, Any], by_steer: Answer) -> str:
    body = {"prompt": PROMPT, "points": [POINT]}
    [steered] = ask("capture", {**body, **steering})["results"]
    [plain] = ask("capture", body)["results"]
    n = len(steered["tokens"])
    expect_close(steered["states"][POINT], _states(by_steer)[:n])
    assert math.dist(plain["states"][POINT][-1], steered["states"][POINT][-1]) > 1
    return "capture"


def _score(ask: Ask, steering: dict[str, Any], by_steer: Answer) -> str:
    body = {"prompt": PROMPT, "continuations": [by_steer["text"]]}
    [steered], [plain] = (ask("score", {**body, **more})["results"] for more in (steering, {}))
    assert steered["tokens"] == by_steer["tokens"]
    told = [one["logprob"] for one in by_steer["logprobs"]]
    assert steered["logprobs"] == pytest.approx(told, abs=2e-3)
    assert plain["logprob"] < steered["logprob"] - 0.5
    return "score"


def _lens(ask: Ask, steering: dict[str, Any], by_steer: Answer) -> str:
    body = {"model": "x", "type": ["LOGIT_LENS"], "prompt": PROMPT, "top_n": 3, "layers": [LAYER], "temperature": 0}
    body |= {"num_completion_tokens": N_NEW, "filter_non_word_tokens": False, "stream": False}
    told, plain = (ask("lens_prompt", {**body, **more}) for more in ({"steering": steering}, {}))
    assert told["done"]["completion"] == by_steer["text"]
    assert plain["done"]["completion"] != by_steer["text"]
    read = [one[0]["top"] for one in by_steer["watch"]["values"][1]["after"]]
    assert len(told["tokens"]) == len(read)
    for frame, top in zip(told["tokens"], read, strict=True):
        [result] = frame["results"]
        assert result["top_probs"][0] == pytest.approx([math.exp(one["logprob"]) for one in top], abs=1e-3)
        assert result["top_tokens"][0][0] == top[0]["token"] or top[0]["logprob"] - top[1]["logprob"] < 1e-2
    return "lens_prompt"


def _completions(ask: Ask, steering: dict[str, Any], by_steer: Answer) -> str:
    body = {"prompt": PROMPT, "max_tokens": N_NEW, "temperature": 0}
    steered, plain = (ask("completions", {**body, **more})["choices"][0]["text"] for more in (steering, {}))
    assert steered == by_steer["text"]
    assert plain != steered
    return "completions"


def _states(by_steer: Answer) -> list[list[float]]:
    """[pos][width], what the rest of the model reads there."""
    return by_steer["watch"]["values"][0]["after"]


def expect_close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        size = math.hypot(*other)
        assert math.dist(one, other) < 1e-3 * size
