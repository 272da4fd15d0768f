"""What a person types in a notebook, and the two spellings of every field."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served import MODEL, SOURCE, TEXT

from neuronpedia_inference import embedded
from tests.rounding import begins, same_choices

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


def test_positions_are_places_in_all_tokens_whatever_is_asked(http: httpx.Client) -> None:
    """Ranked, by index and per token: one list of tokens, BOS first and marked, and the same number at each of them."""
    ranked = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, num_results=50)["results"][0]
    tokens = answer(http, "/v1/tokenize", model=MODEL, text=TEXT)["token_strings"]
    assert (ranked["tokens"], ranked["has_bos"]) == (tokens, True)
    for feature in ranked["features"][:3]:
        alone = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, index=feature["index"])["results"][0]
        (found,) = alone["features"]
        assert (alone["tokens"], alone["has_bos"]) == (tokens, True)
        assert found["values"] == pytest.approx(feature["values"], rel=1e-4, abs=1e-3)
        assert found["values"][0] == 0
        assert tokens[found["max_value_index"]] == tokens[feature["max_value_index"]]
    per_token = answer(http, "/v1/top-k", prompt=TEXT, source=SOURCE, top_k=5)["results"][0]
    assert (per_token["tokens"], per_token["has_bos"]) == (tokens, True)
    by_index = {feature["index"]: feature["values"] for feature in ranked["features"]}
    n_seen = 0
    for place, position in enumerate(per_token["positions"]):
        assert (position["token_position"], position["token"]) == (place, tokens[place])
        for one in position["top_features"]:
            if one["feature_index"] in by_index:
                n_seen += 1
                at_place = by_index[one["feature_index"]][place]
                assert one["activation_value"] == pytest.approx(at_place, rel=1e-4, abs=1e-3)
    assert n_seen >= 5


def test_one_feature_is_that_of_activation_single_at_its_places(http: httpx.Client) -> None:
    """Neuronpedia's route leaves BOS out of everything."""
    index = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE)["results"][0]["features"][0]["index"]
    result = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, index=index)["results"][0]
    wire = answer(http, "/v1/activation/single", prompt=TEXT, model=MODEL, source=SOURCE, index=str(index))
    (feature,) = result["features"]
    assert feature["index"] == index
    assert result["tokens"][1:] == wire["tokens"]
    assert feature["values"][1:] == pytest.approx(wire["activation"]["values"], rel=1e-4, abs=1e-3)
    assert feature["max_value_index"] == wire["activation"]["max_value_index"] + 1
    counted = answer(http, "/v1/activations", prompt=TEXT, source=SOURCE, index=index, ignore_bos=False)
    values = counted["results"][0]["features"][0]["values"]
    assert values[1:] == pytest.approx(feature["values"][1:], rel=1e-4, abs=1e-3)


def test_what_does_not_fire_is_listed_only_by_its_index(http: httpx.Client) -> None:
    """On one token few of 4096 features fire; `activation/all` fills up with zeros, as Neuronpedia expects."""
    ranked = answer(http, "/v1/activations", prompt=" cat", source=SOURCE, num_results=50)["results"][0]
    wire = answer(http, "/v1/activation/all", **{**RANKED, "prompt": " cat", "num_results": 50})["activations"]
    firing = [one for one in wire if one["max_value"] > 0]
    assert [one["index"] for one in ranked["features"]] == [one["index"] for one in firing]
    per_token = answer(http, "/v1/top-k", prompt=" cat", source=SOURCE, top_k=256)["results"][0]
    fired = [one["feature_index"] for one in per_token["positions"][1]["top_features"]]
    assert 0 < len(fired) < 256
    silent = next(index for index in range(4096) if index not in fired)
    (feature,) = answer(http, "/v1/activations", prompt=" cat", source=SOURCE, index=silent)["results"][0]["features"]
    assert (feature["values"], feature["max_value"]) == ([0, 0], 0)


@pytest.mark.parametrize(("rank_by", "source"), [("activation", SOURCE), ("activation", "3"), ("relative", SOURCE)])
def test_a_least_activation_leaves_out_what_is_below_before_the_list_is_cut(
    http: httpx.Client, rank_by: str, source: str
) -> None:
    """Not after: by what is peculiar, features that fire little come before others that fire much."""
    asked = {"prompt": TEXT, "source": source, "rank_by": rank_by}
    everything = answer(http, "/v1/activations", **asked, num_results=50)["results"][0]["features"]
    least = sorted(feature["max_value"] for feature in everything)[len(everything) // 2]
    found = answer(http, "/v1/activations", **asked, num_results=50, min_activation=least)["results"][0]["features"]
    assert all(feature["max_value"] >= least for feature in found)
    kept = [feature["index"] for feature in everything if feature["max_value"] >= least]
    assert 0 < len(kept) < len(everything)
    assert [feature["index"] for feature in found][: len(kept)] == kept
    again = answer(http, "/v1/activations", **asked, num_results=50)["results"][0]["features"]
    assert [feature["index"] for feature in again] == [feature["index"] for feature in everything], (
        "nothing was changed"
    )
    none = answer(http, "/v1/activations", **asked, min_activation=1e9)["results"][0]["features"]
    assert none == []


def test_top_k_has_labels(http: httpx.Client) -> None:
    result = answer(http, "/v1/top-k", prompt=TEXT, source=SOURCE, top_k=2)["results"][0]
    assert result["source"] == SOURCE
    assert len(result["positions"]) == len(result["tokens"])
    for position in result["positions"]:
        for feature in position["top_features"]:
            assert feature["label"] == (embedded.labels(SOURCE)[feature["feature_index"]] or None)


CHAT_END = "<|im_end|>"


def test_our_texts_end_before_the_token_that_stopped_them(http: httpx.Client) -> None:
    """The same answer to a chat on Neuronpedia's route ends in it (contract 3.5); no event of ours holds any of it."""
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Say hi."}]
    ours = {"prompt": messages, "features": [], "max_new_tokens": 30, "compare": False}
    fields = {"steer_method": "SIMPLE_ADDITIVE", "normalize_steering": False, "types": ["STEERED"], "features": []}
    fields |= {"n_completion_tokens": 30, "temperature": 0, "strength_multiplier": 1, "freq_penalty": 0, "seed": 16}
    wire = answer(http, "/v1/steer/completion-chat", prompt=messages, model=MODEL, steer_special_tokens=False, **fields)
    whole = wire["outputs"][0]["raw"].removeprefix(wire["input"]["raw"])
    text = answer(http, "/v1/steer", **ours)["steered"]
    assert text["finish_reason"] == "stop"
    assert whole == text["text"] + CHAT_END
    assert text["messages"][-1]["content"] == text["text"].strip()
    for deltas in (False, True):
        with http.stream("POST", "/v1/steer", json={**ours, "stream": True, "deltas": deltas}) as stream:
            events = [json.loads(line[6:])["steered"] for line in stream.iter_lines() if line.startswith("data: ")]
        said = "".join(event["text"] for event in events) if deltas else events[-1]["text"]
        assert said == text["text"]
        assert all("<|" not in event["text"] for event in events)


def test_a_role_that_the_template_does_not_know_is_refused(http: httpx.Client) -> None:
    """The model's template would write any word."""
    for path, fields in (("/v1/steer", {"features": [], "max_new_tokens": 1}),):
        refused = http.post(path, json={"prompt": [{"role": "wizard", "content": "Hi"}], **fields})
        assert refused.status_code == 400
        assert "Unknown role 'wizard'." in refused.json()["error"]
        assert "Available: assistant, developer, model, system, tool, user" in refused.json()["error"]


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
            n_logprobs=2,
        )
        assert texts["steered"]["text"] != texts["default"]["text"]
        assert begins(example.plain, texts["default"]["logprobs"])
        assert begins(example.steered, texts["steered"]["logprobs"])
        assert not begins(example.plain, texts["steered"]["logprobs"])


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
