"""How well texts hold, over a real port: against plain Hugging Face, and what was written into it by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from test_score import BOS, FEATURE, INDEX, LAYER, PROMPT, SOURCE, close, decoder_row, plain_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.operations.judging import repetition
from neuronpedia_inference.runtime import Runtime

FEATURES = [{"source": SOURCE, "index": INDEX, "strength": 70}]


@pytest.fixture(scope="module")
def net() -> Any:
    """Hugging Face's own model."""
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def steered(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/steer", json={"prompt": PROMPT, "max_new_tokens": 12, "judge": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(token))[0] for token in tokens]


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0), ([1, 2], 0), ([1, 2, 3], 0), ([1, 1, 1, 1], 1 / 2), ([1, 2, 1, 2, 1, 2], 1 / 2), ([5] * 12, 9 / 10)],
)
def test_runs_of_three_that_were_there_before_are_repetition(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_a_text_is_as_likely_as_hugging_face_finds_it(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    """By the model as it is, whatever steered it; and dosed as much as was written over the norm that passed."""
    answer = steered(http, features=FEATURES)
    given = tokenizer(BOS + PROMPT)["input_ids"]
    row, norms = decoder_row(), []

    def hook(_: Any, __: Any, out: Any) -> Any:
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        norms[:] = hidden[0].norm(dim=-1).tolist()
        return hidden + 70 * row if isinstance(out, torch.Tensor) else (hidden + 70 * row, *out[1:])

    for name in ("steered", "default"):
        text = answer[name]
        ids = [*given, *ids_of(tokenizer, text["tokens"])]
        plain = plain_logprobs(net, ids, len(given))
        assert close([text["judge"]["logprob_per_token"]], [float(plain.mean())])
        assert text["judge"]["repetition"] == repetition(ids[len(given) :])
        if name == "steered":
            with_edit = plain_logprobs(net, ids, len(given), 70 * row)
            assert not close([text["judge"]["logprob_per_token"]], [float(with_edit.mean())])  # the control
            handle = net.model.layers[LAYER].register_forward_hook(hook)
            with torch.no_grad():
                net(torch.tensor([ids]))
            handle.remove()
            dose = sum(70 / norm for norm in norms[len(given) :]) / (len(ids) - len(given))
            assert text["judge"]["dose"] == pytest.approx([dose], rel=1e-3)
    assert answer["default"]["judge"]["dose"] == []
    assert answer["steered"]["judge"]["logprob_per_token"] < answer["default"]["judge"]["logprob_per_token"] - 0.5


def test_a_dose_is_what_was_asked_for(http: httpx.Client) -> None:
    """An addition of half the norm everywhere, and one of a fifth at the first four generated tokens of twelve."""
    edits = [
        {"do": "add", "feature": "10-res-4k/1608", "amount": 0.5, "unit": "dose"},
        {
            "do": "add",
            "feature": FEATURE,
            "amount": 0.2,
            "unit": "dose",
            "on": {"phase": "generated", "first": 4},
        },
    ]
    judge = steered(http, edits=edits)["steered"]["judge"]
    assert judge["dose"] == pytest.approx([0.5, 0.2 * 4 / 12], rel=1e-3)


@pytest.mark.parametrize("deltas", [False, True])
def test_a_stream_is_judged_with_its_last_event(http: httpx.Client, deltas: bool) -> None:
    whole = steered(http, features=FEATURES)
    body = {"prompt": PROMPT, "max_new_tokens": 12, "judge": True, "features": FEATURES, "stream": True}
    with http.stream("POST", "/v1/steer", json={**body, "deltas": deltas}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    assert len(events) > 1
    assert all(event["steered"]["judge"] is None for event in events[:-1])
    for name in ("steered", "default"):
        found, expected = events[-1][name]["judge"], whole[name]["judge"]
        assert close([found["logprob_per_token"]], [expected["logprob_per_token"]])
        assert (found["repetition"], found["dose"]) == (expected["repetition"], pytest.approx(expected["dose"]))


def test_nothing_is_judged_unless_asked_for_and_judging_changes_no_token(http: httpx.Client) -> None:
    judged, plain = (steered(http, features=FEATURES, judge=judge) for judge in (True, False))
    assert (plain["steered"]["judge"], plain["default"]["judge"]) == (None, None)
    assert judged["steered"]["tokens"] == plain["steered"]["tokens"]
    assert judged["default"]["tokens"] == plain["default"]["tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_judging_has_the_room_of_what_was_written(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Requests that are written and wait for room to be judged would otherwise wait for each other."""
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, requests=1))
    body = {"prompt": PROMPT, "max_new_tokens": 4, "judge": True, "features": FEATURES, "stream": stream}
    answer = http.post("/v1/steer", json=body)
    assert answer.status_code == 200
    assert answer.text.count('"logprob_per_token"') == 2


def test_what_could_never_be_judged_is_not_begun(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, tokens=60))
    body = {"prompt": PROMPT, "max_new_tokens": 30, "features": FEATURES}
    assert http.post("/v1/steer", json=body).status_code == 200
    refused = http.post("/v1/steer", json={**body, "judge": True, "stream": True})
    assert refused.status_code == 400
    assert "the server has 60 tokens for all" in refused.json()["error"]
