"""Many strengths at once over a real port: what each would have said by itself, and which of them is best."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest
from served import SOON_S, Serve, Wrapped, small_settings

from neuronpedia_inference.runtime import Runtime

PROMPT = "The most important thing is"
ECONOMY, MOON, SCHOLARS = (("15-res-4k", 1113), ("10-res-4k", 1608), ("20-res-4k", 2657))
BODY: dict[str, Any] = {
    "prompt": [PROMPT, "I think that"],
    "features": [{"source": source, "index": index} for source, index in (ECONOMY, MOON)],
    "strengths": [40, 70],
    "seeds": [1, 2],
    "temperature": 0.7,
    "max_new_tokens": 4,
}
SAME: dict[str, Any] = {**BODY, "watch": [{"source": "15-res-4k", "index": 1113}], "reproducible": True}
"""Its texts are the same to the letter however they are asked for."""


def swept(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/sweep", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def found(http: httpx.Client) -> dict[str, Any]:
    return swept(http, **SAME)


def test_a_cell_is_what_steering_by_itself_says(http: httpx.Client, found: dict[str, Any]) -> None:
    assert [(one["prompt"], one["steering"], one["strength"], one["seed"]) for one in found["cells"]] == [
        (prompt, steering, strength, seed)
        for prompt in (0, 1)
        for steering in (0, 1)
        for strength in (40, 70)
        for seed in (1, 2)
    ]
    assert [(one["prompt"], one["seed"]) for one in found["default"]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    takes = found["takes"]
    assert (takes["n_cells"], takes["n_plain"], takes["n_new_tokens"]) == (16, 4, 80)
    assert takes["n_generations"] == 2
    plain = {(one["prompt"], one["seed"]): one for one in found["default"]}
    for cell in found["cells"][1::3]:
        feature = {**BODY["features"][cell["steering"]], "strength": cell["strength"]}
        body = {"prompt": BODY["prompt"][cell["prompt"]], "features": [feature], "seed": cell["seed"], "judge": True}
        asked = {**{key: SAME[key] for key in ("temperature", "max_new_tokens", "watch", "reproducible")}, **body}
        alone = http.post("/v1/steer", json=asked).json()
        for one, other in ((cell, alone["steered"]), (plain[cell["prompt"], cell["seed"]], alone["default"])):
            assert (one["text"], one["tokens"], one["finish_reason"]) == (
                other["text"],
                other["tokens"],
                other["finish_reason"],
            )
            assert one["judge"]["logprob_per_token"] == pytest.approx(other["judge"]["logprob_per_token"], abs=2e-4)
            assert one["judge"]["repetition"] == other["judge"]["repetition"]
            assert one["judge"]["dose"] == pytest.approx(other["judge"]["dose"], rel=1e-3)
            for mine, theirs in zip(one["watch"]["values"], other["watch"]["values"], strict=True):
                assert mine["after"] == pytest.approx(theirs["after"], rel=1e-3, abs=1e-2)
        assert cell["text"] != plain[cell["prompt"], cell["seed"]]["text"]  # the control: steered


def test_an_effect_is_how_much_of_the_feature_is_in_the_text(http: httpx.Client, found: dict[str, Any]) -> None:
    """By the unsteered model, over the generated tokens but the last."""
    looked_at = max(found["cells"], key=lambda one: one["effects"][0])
    assert looked_at["effects"][0] > 1
    text = BODY["prompt"][looked_at["prompt"]] + looked_at["text"]
    body = {"prompt": text, **BODY["features"][looked_at["steering"]]}
    [result] = http.post("/v1/activations", json=body).json()["results"]
    n = len(looked_at["tokens"])
    assert result["tokens"][-n:] == looked_at["tokens"]
    values = result["features"][0]["values"][-n:-1]
    assert looked_at["effects"] == [pytest.approx(sum(values) / len(values), rel=1e-3)]
    assert len(found["default"][0]["effects"]) == 2


def test_a_stream_says_what_it_takes_then_cell_by_cell_the_same(http: httpx.Client, found: dict[str, Any]) -> None:
    body = {**SAME, "prompt": BODY["prompt"][0], "seeds": [1]}
    with http.stream("POST", "/v1/sweep", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    first, *told, last = [json.loads(line) for line in lines]
    assert (first["takes"]["n_cells"], first["cells"], first["suggested"]) == (4, [], None)
    assert all(len(event["cells"]) + len(event["default"]) == 1 for event in told)
    for name in ("cells", "default"):
        texts = [one["text"] for event in told for one in event[name]]
        assert texts == [one["text"] for one in found[name] if (one["prompt"], one["seed"]) == (0, 1)]
    assert last["suggested"] == swept(http, **body)["suggested"]
    assert swept(http, **body, dry_run=True) == {"takes": first["takes"], "cells": [], "default": [], "suggested": None}


def test_edits_and_steerings_are_multiplied(http: httpx.Client) -> None:
    """An amount of 2 at strength 20 is one of 40; an edit without an amount stays as it is beside others."""
    clamp = {"do": "clamp", "feature": "15-res-4k/1113", "amount": 2, "on": {"phase": "generated"}}
    ablate = {"do": "ablate", "feature": "20-res-4k/686"}
    short = {"prompt": PROMPT, "max_new_tokens": 8, "reproducible": True}
    by_edit = swept(http, **short, edits=[clamp], strengths=[20, 40])["cells"]
    steering = {"edits": [clamp, ablate], "features": [{"source": "15-res-4k", "index": 1113, "strength": 0.5}]}
    by_steering = swept(http, **short, steerings=[steering], strengths=[40], judge=False)
    expected = [
        {"edits": [{**clamp, "amount": 40}]},
        {"edits": [{**clamp, "amount": 80}]},
        {
            "edits": [{**clamp, "amount": 80}, ablate],
            "features": [{"source": "15-res-4k", "index": 1113, "strength": 20}],
        },
    ]
    texts = [http.post("/v1/steer", json={**short, **one}).json()["steered"]["text"] for one in expected]
    assert [one["text"] for one in (*by_edit, *by_steering["cells"])] == texts
    assert len(set(texts)) == 3
    assert (by_steering["suggested"], by_steering["cells"][0]["judge"]) == (None, None)


WINDOWS = {ECONOMY: (35, 130), MOON: (35, 75), SCHOLARS: (45, 115)}
"""Strengths at which the text is about the feature and is English: below it hardly ever is about it, above it falls
apart or loops. Those of economy and scholars were found by reading continuations of a prompt, drawn three times at 20,
35, 50, ... 200; that of the moon is from the strength that its documentation names and the numbers of such texts."""


@pytest.mark.long
def test_what_is_suggested_lies_in_the_window_found_by_hand(http: httpx.Client) -> None:
    features = [{"source": source, "index": index} for source, index in WINDOWS]
    strengths = [10, 20, 50, 65, 95, 160, 220]
    body = {"prompt": [PROMPT, "Yesterday I"], "features": features, "strengths": strengths, "max_new_tokens": 20}
    suggested = swept(http, **body)["suggested"]
    for strength, (low, high) in zip(suggested["strengths"], WINDOWS.values(), strict=True):
        assert strength is not None
        assert low <= strength <= high, suggested
    for mean in suggested["means"]:
        within = mean["lost"] <= suggested["most_lost"] and mean["repeated"] <= suggested["most_repeated"]
        assert mean["holds"] == within


def test_others_have_their_turns_between_two_generations(serve: Serve, runtime: Runtime) -> None:
    """A short request comes out while a sweep of many generations goes on."""
    settings = small_settings(max_rows=2)
    few = Wrapped(runtime, settings=settings)
    served = serve(settings, lambda: few)
    one = {"prompt": PROMPT, "features": BODY["features"][:1], "strengths": [20, 40, 60, 80, 90]}
    body = {**one, "max_new_tokens": 16, "judge": False, "stream": True}
    ended: list[str] = []
    begun = threading.Event()

    def sweep() -> None:
        with served.client() as client, client.stream("POST", "/v1/sweep", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
        ended.append("sweep")

    thread = threading.Thread(target=sweep)
    thread.start()
    assert begun.wait(SOON_S)
    with served.client() as client:
        answer = client.post("/v1/steer", json={"prompt": PROMPT, "max_new_tokens": 2, "compare": False})
        ended.append("short")
    thread.join(SOON_S)
    assert answer.status_code == 200
    assert ended == ["short", "sweep"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_sweep_waits_for_nothing_that_it_holds_itself(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Two of them would wait for each other."""
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, requests=1))
    answer = http.post("/v1/sweep", json={**BODY, "max_new_tokens": 2, "stream": stream})
    assert answer.status_code == 200
    assert answer.text.count('"logprob_per_token"') == 20
    assert "error" not in answer.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strengths": []}, "strengths: is empty, so there is nothing to sweep. Give 1 to 64."),
        ({"seeds": []}, "seeds: is empty, so there is nothing to sweep. Give 1 to 64."),
        ({"features": []}, "give exactly one of features, edits, steerings, with at least one item"),
        ({"edits": [{"do": "ablate", "feature": "15-res-4k/1"}]}, "give exactly one of features, edits, steerings"),
        (
            {"features": None, "edits": [{"do": "ablate", "feature": "15-res-4k/1"}]},
            "edits.0: has no strength and no amount that strengths could multiply",
        ),
        ({"features": None, "steerings": [{}]}, "steerings.0: has no strength and no amount"),
        ({"prompt": []}, "prompt: needs at least one text"),
        ({"prompt": ["a"] * 17}, "prompt: 17 texts are too many, the most is 16."),
        (
            {"strengths": list(range(64))},
            "2 prompts × 2 features × 64 strengths × 2 seeds are 516 texts with the unsteered ones, the most is 256.",
        ),
        ({"strengths": [1] * 65}, "strengths: 65 items are too many, the most is 64."),
        ({"features": [{"source": "15-res-4k", "index": 4096}]}, "features.0: Feature index 4096 is out of range"),
        ({"max_new_tokens": 10**6}, "No room to generate"),
        (
            {"watch": [{"hook": "blocks.15.hook_resid_post"}], "max_new_tokens": 20},
            "watch: the texts of this sweep have up to",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_with_the_bound(http: httpx.Client, change: dict[str, Any], says: str) -> None:
    for stream in (False, True):
        answer = http.post("/v1/sweep", json={**BODY, **change, "stream": stream})
        assert (answer.status_code, says in answer.json()["error"]) == (400, True), answer.text
