"""Edits over a real port: what they are answered with, and what is refused, by the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open
from served import WIDTH

from neuronpedia_inference import embedded
from tests.rounding import begins

README = Path(__file__).resolve().parents[2] / "README.md"
FEATURE = "15-res-4k/1113"
HOOK = "blocks.15.hook_resid_post"
VECTOR = [1.0] * WIDTH
CHAT = [{"role": "user", "content": "Name a city."}]


def steered(http: httpx.Client, prompt: Any = "The most important thing is", **body: Any) -> dict[str, Any]:
    response = http.post("/v1/steer", json={"prompt": prompt, "max_new_tokens": 6, "n_logprobs": 2, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prompt", ["The most important thing is", CHAT])
def test_an_addition_is_the_same_in_every_form(http: httpx.Client, prompt: Any) -> None:
    """As a feature with a strength, as an edit by name or by number, and as its decoder row."""
    source, index = FEATURE.split("/")
    with safe_open(embedded.sae_dir(source) / "sae_weights.safetensors", framework="pt") as weights:
        written = weights.get_slice("W_dec")[int(index)].float()
    row = (written / written.norm()).tolist()
    bodies: list[dict[str, Any]] = [
        {"features": [{"source": source, "index": int(index), "strength": 70}]},
        {"edits": [{"do": "add", "feature": FEATURE, "amount": 70}]},
        {"edits": [{"do": "add", "feature": {"source": source, "index": int(index)}, "amount": 70}]},
        {"edits": [{"do": "add", "feature": f"smollm2-135m-instruct/{FEATURE}", "amount": 70}]},
        {"edits": [{"do": "add", "vector": row, "hook": HOOK, "amount": 70}]},
        {
            "features": [{"source": source, "index": int(index), "strength": 30}],
            "vectors": [{"hook": HOOK, "vector": row, "strength": 15}],
            "edits": [{"do": "add", "feature": FEATURE, "amount": 25}],
        },
    ]
    answers = [steered(http, prompt, **body) for body in bodies]
    assert {answer["steered"]["text"] for answer in answers} == {answers[0]["steered"]["text"]}
    assert answers[0]["steered"]["text"] != answers[0]["default"]["text"]


def test_without_anything_the_model_is_as_it_is(http: httpx.Client) -> None:
    for body in ({}, {"edits": []}, {"features": [], "edits": None}):
        answer = steered(http, **body)
        assert answer["steered"] == answer["default"]


def test_a_clamp_is_no_addition_and_a_stream_says_the_same(http: httpx.Client) -> None:
    edit = {"do": "clamp", "feature": FEATURE, "amount": 90, "on": {"phase": "generated"}, "id": "economy"}
    whole = steered(http, edits=[edit])
    assert whole["steered"]["text"] != whole["default"]["text"]
    with http.stream(
        "POST",
        "/v1/steer",
        json={"prompt": "The most important thing is", "max_new_tokens": 6, "edits": [edit], "stream": True},
    ) as response:
        last = [line for line in response.iter_lines() if line.startswith("data:")][-1]
    assert whole["steered"]["text"] in last


def test_the_readme_shows_what_clamping_does_and_adding_cannot(http: httpx.Client) -> None:
    """Every text of its table; with an edit of what is there, the text that does not speak of it stays as it is."""
    table = README.read_text(encoding="utf-8").partition("<!-- edits:start -->")[2].partition("<!-- edits:end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.split("\n") if line]
    prompts = [cell.removesuffix(" …") for cell in head[1:]]
    assert len(rows) == 4
    said: dict[str, list[str]] = {}
    for way, *texts in rows:
        edits = [] if way == "none" else [json.loads(way.strip("`"))]
        answers = [steered(http, prompt, edits=edits, max_new_tokens=8)["steered"] for prompt in prompts]
        for text, found in zip(texts, answers, strict=True):
            assert begins(f" {text}", found["logprobs"]), way
        said["none" if way == "none" else edits[0]["do"]] = [found["text"] for found in answers]
    for do in ("scale", "clamp"):
        assert said[do][0] != said["none"][0]
        assert said[do][1] == said["none"][1]
    assert said["add"][1] != said["none"][1]


def test_an_amount_may_be_a_part_of_the_largest_that_is_known(http: httpx.Client) -> None:
    source, index = FEATURE.split("/")
    maximum = http.get(f"/v1/features/{FEATURE}").json()["max"]
    assert maximum == embedded.source_annotations(source).maximum[int(index)] > 1
    ways = [{"amount": 2 * maximum}, {"amount": 2, "unit": "of_max"}, {"amount": 2}]
    texts = [steered(http, edits=[{"do": "clamp", "feature": FEATURE, **way}])["steered"]["text"] for way in ways]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("edit", "status", "says"),
    [
        ({"do": "clamp", "feature": "3/5", "amount": 1}, 400, "edits.1: Source '3' is MLP neurons"),
        ({"do": "clamp", "feature": "15-res-4k/4096", "amount": 1}, 400, "edits.1: Feature index 4096 is out of range"),
        ({"do": "clamp", "feature": "15-res-4x/1", "amount": 1}, 400, "edits.1: Unknown source '15-res-4x'"),
        ({"do": "clamp", "feature": "1113", "amount": 1}, 400, "edits.1.feature: '1113' names no feature"),
        ({"do": "cap", "vector": [1.0], "hook": HOOK, "amount": 1}, 400, "edits.1: The vector for"),
        (
            {"do": "cap", "vector": VECTOR, "hook": "blocks.99.hook_resid_post", "amount": 1},
            400,
            "edits.1: Unknown",
        ),
        ({"do": "cap", "vector": VECTOR, "hook": "blocks.1.mlp.hook_post", "amount": 1}, 400, "edits.1: Cannot steer"),
        ({"do": "project_out", "vector": [0.0] * WIDTH, "hook": HOOK}, 400, "edits.1: The steering vector"),
        ({"do": "swap", "feature": FEATURE, "with": FEATURE}, 400, "edits.1.with: is the feature itself"),
        ({"do": "swap", "feature": FEATURE, "with": "20-res-4k/1"}, 400, "edits.1.with: is of '20-res-4k'"),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"positions": [50]}},
            400,
            "edits.1.on: selects none of the 6 positions of the prompt and the 5 after it",
        ),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"token_ids": [9], "phase": "prompt"}},
            400,
            "edits.1.on: selects none",
        ),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "when": {"feature": "20-res-4k/686", "above": 5}},
            400,
            "edits.1: when: 'blocks.20.hook_resid_post' is reached after",
        ),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "when": {"feature": "20-res-4k/9999", "above": 5}},
            400,
            "edits.1: Feature index 9999 is out of range",
        ),
        ({"do": "clamp", "feature": FEATURE}, 422, "edits.1: clamp needs an amount"),
        ({"do": "ablate", "feature": FEATURE, "amount": 1}, 422, "edits.1: ablate takes no amount"),
        ({"do": "cap", "feature": FEATURE, "amount": 1}, 422, "edits.1: cap is not for a feature"),
        ({"do": "clamp", "vector": VECTOR, "hook": HOOK, "amount": 1}, 422, "edits.1: clamp is not for a vector"),
        ({"do": "clamp", "feature": FEATURE, "hook": HOOK, "amount": 1}, 422, "edits.1: vector and hook go together"),
        ({"do": "clamp", "feature": FEATURE, "amount": 2e6}, 422, "edits.1.amount"),
        ({"do": "clamp", "feature": FEATURE, "amount": 1, "onn": {}}, 422, "edits.1: there is no field 'onn'"),
        ({"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"from": 3, "to": 3}}, 422, "edits.1.on: from 3 to 3"),
        ({"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"last": 3}}, 422, "edits.1.on: last counts back"),
        ({"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"positions": []}}, 422, "edits.1.on.positions"),
        ({"do": "clamp", "feature": FEATURE, "amount": 1, "on": {"ramp": [3, 3]}}, 422, "edits.1.on: ramp begins"),
        ({"do": "scale", "feature": FEATURE, "amount": 1, "unit": "dose"}, 422, "edits.1: the amount of scale"),
        ({"do": "swap", "feature": FEATURE}, 422, "edits.1: with goes with swap"),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "when": {"feature": FEATURE}},
            422,
            "edits.1.when: a feature needs exactly one of above and below",
        ),
        (
            {"do": "clamp", "feature": FEATURE, "amount": 1, "when": {"all": [{"not": {}}]}},
            422,
            "edits.1.when.all.0.not: give exactly one of feature, all, any and not",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_field(
    http: httpx.Client, edit: dict[str, Any], status: int, says: str
) -> None:
    good = {"do": "clamp", "feature": FEATURE, "amount": 1}
    response = http.post(
        "/v1/steer", json={"prompt": "The most important thing is", "max_new_tokens": 6, "edits": [good, edit]}
    )
    assert response.status_code == status, response.text
    assert says in response.json()["error"]
