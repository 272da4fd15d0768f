"""What a person types in a notebook, and the two spellings of every field."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served import MODEL, SOURCE, TEXT

from neuronpedia_inference import embedded
from tests.rounding import same_choices

RANKED = {
    "prompt": TEXT,
    "model": MODEL,
    "source_set": "res-4k",
    "selected_sources": [SOURCE],
    "sort_by_token_indexes": [],
    "ignore_bos": True,
    "num_results": 3,
}


def answer(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_activations_are_those_of_activation_all(http: httpx.Client) -> None:
    friendly = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, num_results=3)["results"][0]
    wire = answer(http, "/v1/activation/all", **RANKED)
    assert friendly["tokens"] == wire["tokens"]
    for mine, theirs in zip(friendly["features"], wire["activations"], strict=True):
        assert (mine["source"], mine["index"]) == (theirs["source"], theirs["index"])
        assert mine["values"] == pytest.approx(theirs["values"], rel=1e-4, abs=1e-3)
        assert mine["label"] == (embedded.labels(SOURCE)[mine["index"]] or None)


def test_activations_need_only_a_prompt(http: httpx.Client) -> None:
    results = answer(http, "/v1/activations", prompt=[TEXT, "A court."])["results"]
    assert len(results) == 2
    assert {feature["source"] for feature in results[0]["features"]} <= set(embedded.SOURCES)


def test_one_feature_by_its_index(http: httpx.Client) -> None:
    result = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, index=7)["results"][0]
    wire = answer(http, "/v1/activation/single", prompt=TEXT, model=MODEL, source=SOURCE, index="7")
    (feature,) = result["features"]
    assert feature["index"] == 7
    assert feature["values"] == pytest.approx(wire["activation"]["values"], rel=1e-4, abs=1e-3)


def test_top_k_has_labels(http: httpx.Client) -> None:
    result = answer(http, "/v1/top-k", prompt=TEXT, source=SOURCE, top_k=2)["results"][0]
    assert result["source"] == SOURCE
    assert len(result["positions"]) == len(result["tokens"])
    for position in result["positions"]:
        for feature in position["top_features"]:
            assert feature["label"] == (embedded.labels(SOURCE)[feature["feature_index"]] or None)


def test_steer_compares_by_default(http: httpx.Client) -> None:
    steers = [{"source": SOURCE, "index": 5, "strength": 900}]
    both = answer(http, "/v1/steer", prompt="I think", features=steers, max_new_tokens=4, n_logprobs=2)
    assert both["steered"]["text"] != both["default"]["text"]
    alone = answer(http, "/v1/steer", prompt="I think", features=steers, max_new_tokens=4, n_logprobs=2, compare=False)
    assert alone["default"] is None
    assert same_choices(alone["steered"]["logprobs"], both["steered"]["logprobs"])


def test_every_documented_steering_example_steers_as_written(http: httpx.Client) -> None:
    for example in embedded.steering_examples()[:3]:
        feature = {"source": example.source, "index": example.index, "strength": example.strength}
        texts = answer(
            http,
            "/v1/steer",
            prompt=example.prompt,
            features=[feature],
            method=example.steer_method,
            max_new_tokens=6,
        )
        assert texts["steered"]["text"] != texts["default"]["text"]
        assert example.plain.startswith(texts["default"]["text"])
        assert example.steered.startswith(texts["steered"]["text"])


@pytest.mark.parametrize(("camel", "snake"), [(True, False), (False, True)])
def test_the_answer_is_spelled_as_the_request(http: httpx.Client, camel: bool, snake: bool) -> None:
    body = RANKED
    if camel:
        body = {_camel(key): value for key, value in RANKED.items()}
    first = answer(http, "/v1/activation/all", **body)["activations"][0]
    assert ("maxValue" in first, "max_value" in first) == (camel, snake)
    assert ("dfaValues" in first, "dfa_values" in first) == (camel, snake)


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.title() for part in tail)


def test_both_spellings_where_the_request_shows_none(http: httpx.Client) -> None:
    single = answer(http, "/v1/activation/single", prompt=TEXT, model=MODEL, source=SOURCE, index="7")
    assert single["tokens_is_special"] == single["tokensIsSpecial"]
    assert single["activation"]["max_value"] == single["activation"]["maxValue"]
    tokens = answer(http, "/v1/tokenize", model=MODEL, text=TEXT)
    assert tokens["token_strings"] == tokens["tokenStrings"]


def test_camel_case_wins_over_snake_case(http: httpx.Client) -> None:
    assert len(answer(http, "/v1/activation/all", **RANKED, numResults=1)["activations"]) == 1


def test_the_two_keys_that_are_always_camel_case(http: httpx.Client) -> None:
    active = answer(http, "/v1/activation/source", prompts=[TEXT], model=MODEL, source=SOURCE)
    assert "activeFeatures" in active["results"][0]
    assert "hookName" in answer(http, "/v1/util/sae-vector", model=MODEL, source=SOURCE, index=1)


def test_neurons_are_a_source(http: httpx.Client) -> None:
    single = answer(http, "/v1/activation/single", prompt=TEXT, model=MODEL, source="3", index="11")
    ranked = answer(http, "/v1/activation/all", **{**RANKED, "source_set": "neurons", "selected_sources": ["3"]})
    assert len(single["tokens"]) == len(single["activation"]["values"]) == len(ranked["tokens"])
    assert {feature["source"] for feature in ranked["activations"]} == {"3"}


def test_parallel_requests_are_answered_as_alone(http: httpx.Client) -> None:
    """Eight at once, four different questions."""
    questions = [
        ("/v1/activation/single", {"prompt": f"{TEXT} {n}", "model": MODEL, "source": SOURCE, "index": str(n)})
        for n in range(4)
    ]
    alone = [answer(http, path, **body) for path, body in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: answer(http, question[0], **question[1]), questions * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert other["tokens"] == one["tokens"]
        assert other["activation"]["values"] == pytest.approx(one["activation"]["values"], rel=1e-4, abs=1e-3)
