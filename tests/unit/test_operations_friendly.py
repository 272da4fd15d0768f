"""The friendly operations: defaults, labels and the choice of a source."""

from __future__ import annotations

from typing import Any

import pytest

from neuronpedia_inference.domain import Ranking, Sampling
from neuronpedia_inference.edits.plan import Direction, Do, Edit, Feature, Plan
from neuronpedia_inference.edits.select import Phase, Selection
from neuronpedia_inference.errors import InvalidRequest, UnknownSource

from .test_operations_fake import ATT, RES, FakeRuntime, ask

ONE_SET = RES
ONE_SOURCE = (ATT,)


def test_activations_need_no_more_than_a_prompt():
    runtime = FakeRuntime(sources=ONE_SET)
    answer = ask("activations", {"prompt": "one two"}, runtime)
    assert runtime.called("ranked_features") == ([s.name for s in RES], Ranking(limit=25, ignore_first=True))
    [result] = answer["results"]
    assert (result["tokens"], result["has_bos"]) == (["<s>", "one", " two"], True)
    assert result["features"]
    for feature in result["features"]:
        assert feature["label"] == runtime.label(feature["source"], feature["index"])
        assert len(feature["values"]) == 3
        assert set(feature) == {
            "source",
            "index",
            "label",
            "values",
            "max_value",
            "max_value_index",
            "dfa_values",
            "dfa_target_index",
            "dfa_max_value",
            "relative",
        }


def test_a_list_of_prompts_gives_a_result_for_each():
    runtime = FakeRuntime(sources=ONE_SET)
    both = ask("activations", {"prompt": ["one", "two three"], "num_results": 2}, runtime)["results"]
    alone = [ask("activations", {"prompt": p, "num_results": 2}, runtime)["results"][0] for p in ("one", "two three")]
    assert both == alone


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("ignore_bos", [True, False])
@pytest.mark.parametrize("source", ["3-att", "1-res", "1"])
def test_an_index_shows_one_feature_just_as_the_ranking_does(source: str, ignore_bos: bool, has_bos: bool):
    """One coordinate system: the same feature at the same positions of the same tokens, BOS among them."""
    runtime = FakeRuntime(has_bos=has_bos)
    body = {"prompt": "one two three", "source": source, "ignore_bos": ignore_bos}
    [ranked] = ask("activations", body, runtime)["results"]
    assert ranked["tokens"] == [*["<s>"] * has_bos, "one", " two", " three"]
    assert ranked["has_bos"] is has_bos
    assert len(ranked["features"]) >= 3
    for feature in ranked["features"]:
        [alone] = ask("activations", {**body, "index": feature["index"]}, runtime)["results"]
        [found] = alone["features"]
        assert {**alone, "features": None} == {**ranked, "features": None}
        shared = {key: value for key, value in feature.items() if not key.startswith("dfa")}
        assert {key: found[key] for key in shared} == shared
        assert found["values"][found["max_value_index"]] == found["max_value"]
        assert (found["values"][0] == 0.0) is (has_bos and ignore_bos) or not has_bos


def test_what_does_not_fire_is_left_out_unless_it_is_asked_for_by_its_index():
    """At a token alone (position 1 behind BOS) the formula is zero for feature 1 only."""
    runtime = FakeRuntime(sources=ONE_SOURCE)
    [ranked] = ask("activations", {"prompt": "one"}, runtime)["results"]
    assert sorted(feature["index"] for feature in ranked["features"]) == [0, 2, 3, 4, 5]
    [alone] = ask("activations", {"prompt": "one", "index": 1}, runtime)["results"]
    [feature] = alone["features"]
    assert (feature["values"], feature["max_value"], feature["max_value_index"]) == ([0.0, 0.0], 0.0, 0)
    assert (feature["dfa_values"], feature["dfa_target_index"]) == (None, None)
    [per_token] = ask("top_k", {"prompt": "one", "top_k": 6}, runtime)["results"]
    assert sorted(one["feature_index"] for one in per_token["positions"][1]["top_features"]) == [0, 2, 3, 4, 5]
    nothing = ask("activations", {"prompt": "one"}, FakeRuntime(sources=ONE_SOURCE, value=0.0))
    assert nothing["results"][0]["features"] == []


@pytest.mark.parametrize("name", ["activations", "top_k", "steer"])
@pytest.mark.parametrize("has_bos", [True, False])
def test_an_empty_text_is_refused(name: str, has_bos: bool):
    runtime = FakeRuntime(sources=ONE_SOURCE, has_bos=has_bos)
    fields: dict[str, Any] = {"steer": {"features": []}}.get(name, {})
    with pytest.raises(InvalidRequest, match="prompt: the text is empty, .* Send at least one character"):
        ask(name, {"prompt": "", **fields}, runtime)
    assert ask(name, {"prompt": " ", **fields}, runtime)
    if name != "steer":
        with pytest.raises(InvalidRequest, match="prompt: text 2 of 3 is empty"):
            ask(name, {"prompt": ["one", "", "two"]}, runtime)


def test_a_text_that_is_only_bos_has_a_token_at_which_nothing_counts():
    runtime = FakeRuntime(sources=ONE_SOURCE)
    for body in ({}, {"index": 2}):
        [result] = ask("activations", {"prompt": "<s>", **body}, runtime)["results"]
        assert (result["tokens"], result["has_bos"]) == (["<s>"], True)
        assert [feature["values"] for feature in result["features"]] == ([[0.0]] if body else [])
    [position] = ask("top_k", {"prompt": "<s>"}, runtime)["results"][0]["positions"]
    assert (position["token"], position["top_features"]) == ("<s>", [])
    [counted] = ask("activations", {"prompt": "<s>", "index": 2, "ignore_bos": False}, runtime)["results"]
    assert counted["features"][0]["max_value"] > 0


@pytest.mark.parametrize(
    ("choice", "looked_at"),
    [
        ({"source": "2-res"}, ["2-res"]),
        ({"source_set": "res"}, ["1-res", "2-res", "12-res"]),
        ({"source_set": "res", "source": "1-res"}, ["1-res"]),
        ({"source": "1"}, ["1"]),
    ],
)
def test_sources_may_be_named(choice: dict[str, str], looked_at: list[str]):
    runtime = FakeRuntime()
    ask("activations", {"prompt": "one", **choice}, runtime)
    assert runtime.called("ranked_features")[0] == looked_at


@pytest.mark.parametrize("index", [{}, {"index": 1}])
def test_a_source_outside_the_named_set_is_refused(index: dict[str, int]):
    with pytest.raises(UnknownSource, match="Unknown source of set 'res': '3-att'.* Available: 1-res, 2-res, 12-res"):
        ask("activations", {"prompt": "one", "source_set": "res", "source": "3-att", **index})
    [result] = ask("activations", {"prompt": "one", "source_set": "res", "source": "2-res", **index})["results"]
    assert {feature["source"] for feature in result["features"]} == {"2-res"}


def test_a_least_activation_goes_without_an_index():
    runtime = FakeRuntime(sources=ONE_SET)
    ask("activations", {"prompt": "one", "min_activation": 1.5}, runtime)
    assert runtime.called("ranked_features")[1].least == 1.5
    with pytest.raises(InvalidRequest, match="min_activation: goes without index"):
        ask("activations", {"prompt": "one", "source": "1-res", "index": 1, "min_activation": 1})


def test_a_number_of_results_with_an_index_is_refused():
    with pytest.raises(InvalidRequest, match="num_results: goes without index"):
        ask("activations", {"prompt": "one", "source": "1-res", "index": 1, "num_results": 1})


def test_a_set_with_one_source_settles_the_choice_for_an_index():
    answer = ask("activations", {"prompt": "one", "source_set": "att", "index": 0})
    assert answer["results"][0]["features"][0]["source"] == "3-att"


@pytest.mark.parametrize(
    ("name", "body", "names"),
    [
        ("activations", {"prompt": "one"}, "res, att"),
        ("activations", {"prompt": "one", "index": 1}, "1-res, 2-res, 12-res, 3-att"),
        ("activations", {"prompt": "one", "index": 1, "source_set": "res"}, "1-res, 2-res, 12-res"),
        ("top_k", {"prompt": "one"}, "1-res, 2-res, 12-res, 3-att"),
        ("steer", {"prompt": "one", "features": [{"index": 1, "strength": 1}]}, "1-res, 2-res, 12-res, 3-att"),
    ],
)
def test_an_open_choice_is_refused_with_what_there_is(name: str, body: dict[str, Any], names: str):
    with pytest.raises(InvalidRequest, match=f"Available: {names}$"):
        ask(name, body)


@pytest.mark.parametrize("ignore_bos", [True, False])
@pytest.mark.parametrize("prompt", ["one two", ["one two", "three"]])
def test_top_k_labels_features_at_places_of_its_own_tokens(prompt: str | list[str], ignore_bos: bool):
    runtime = FakeRuntime(sources=ONE_SOURCE)
    answer = ask("top_k", {"prompt": prompt, "top_k": 2, "ignore_bos": ignore_bos}, runtime)
    assert len(answer["results"]) == (1 if isinstance(prompt, str) else 2)
    result = answer["results"][0]
    assert (result["source"], result["has_bos"], result["tokens"]) == ("3-att", True, ["<s>", "one", " two"])
    assert [row["token_position"] for row in result["positions"]] == [0, 1, 2]
    assert [row["token"] for row in result["positions"]] == result["tokens"]
    for place, row in enumerate(result["positions"]):
        assert len(row["top_features"]) == (0 if place == 0 and ignore_bos else 2)
        for one in row["top_features"]:
            assert one["label"] == runtime.label("3-att", one["feature_index"])


def test_steer_compares_by_default():
    runtime = FakeRuntime(sources=ONE_SOURCE)
    answer = ask("steer", {"prompt": "one", "features": [{"index": 2, "strength": 3}]}, runtime)
    prompt, plans, sampling, _ = runtime.called("generate")
    assert prompt.strings == ("<s>", "one")
    assert plans == [Plan((Edit(Do.ADD, Feature("3-att", 2), 3.0),)), None]
    assert sampling == Sampling(32, seed=16)
    null = ("messages", "logprobs", "watch", "judge", "stopped_by", "events", "over_dose")
    nothing_else = dict.fromkeys(null) | {"finish_reason": "length"}
    assert answer == {
        "steered": {"text": " steered", "tokens": [" steered"], **nothing_else},
        "default": {"text": " plain", "tokens": [" plain"], **nothing_else},
        "receipt": None,
    }


def test_steer_without_comparison_and_with_every_option():
    runtime = FakeRuntime()
    body = {
        "prompt": [{"role": "user", "content": "hi"}],
        "vectors": [{"hook": "blocks.1.hook_resid_post", "vector": [1, 2, 3, 4], "strength": 2}],
        "method": "ORTHOGONAL_DECOMP",
        "strength_multiplier": 0.5,
        "max_new_tokens": 3,
        "temperature": 0.7,
        "freq_penalty": 1,
        "seed": 5,
        "n_logprobs": 1,
        "compare": False,
        "steer_special_tokens": True,
    }
    answer = ask("steer", body, runtime)
    _, plans, sampling, _ = runtime.called("generate")
    direction = Direction("blocks.1.hook_resid_post", [1.0, 2.0, 3.0, 4.0])
    assert plans == [Plan((Edit(Do.ORTHOGONAL, direction, 1.0),))]
    assert sampling == Sampling(3, temperature=0.7, freq_penalty=1.0, seed=5, n_logprobs=1)
    assert answer["default"] is None
    assert answer["steered"]["text"] == " steered"
    assert answer["steered"]["messages"] == [*body["prompt"], {"role": "assistant", "content": "steered"}]
    assert len(answer["steered"]["logprobs"]) == 1


def test_what_to_do_with_special_tokens_goes_with_a_chat():
    body = {"prompt": "one", "features": [], "steer_special_tokens": False}
    with pytest.raises(InvalidRequest, match="steer_special_tokens: goes with a chat"):
        ask("steer", body)
    assert ask("steer", {**body, "prompt": [{"role": "user", "content": "hi"}]})


def test_steer_leaves_a_chats_special_tokens_alone_by_default():
    runtime = FakeRuntime()
    features = [{"source": "1-res", "index": 0, "strength": 1}]
    ask("steer", {"prompt": [{"role": "user", "content": "hi"}], "features": features}, runtime)
    assert runtime.called("generate")[1][0].skip_special_tokens is True


@pytest.mark.parametrize("body", [{}, {"features": []}, {"vectors": [], "edits": []}])
def test_steer_without_anything_runs_the_model_as_it_is(body: dict[str, Any]):
    runtime = FakeRuntime()
    answer = ask("steer", {"prompt": "one", **body}, runtime)
    assert runtime.called("generate")[1] == [None, None]
    assert answer["steered"]["text"] == answer["default"]["text"] == " plain"


def test_features_vectors_and_edits_act_in_this_order():
    runtime = FakeRuntime()
    on = {"from": 1, "last": 2, "phase": "prompt"}
    body = {
        "edits": [{"do": "swap", "feature": "1-res/3", "with": "1-res/4", "on": on}],
        "vectors": [{"hook": "blocks.1.hook_resid_post", "vector": [1, 2, 3, 4], "strength": 2}],
        "features": [{"source": "1-res", "index": 5, "strength": 6}],
        "strength_multiplier": 0.5,
    }
    ask("steer", {"prompt": "one", **body}, runtime)
    [plan, _] = runtime.called("generate")[1]
    assert plan.edits == (
        Edit(Do.ADD, Feature("1-res", 5), 3.0),
        Edit(Do.ADD, Direction("blocks.1.hook_resid_post", [1.0, 2.0, 3.0, 4.0]), 1.0),
        Edit(
            Do.SWAP,
            Feature("1-res", 3),
            other=Feature("1-res", 4),
            on=Selection(Phase.PROMPT, start=1, last=2),
        ),
    )
    assert [edit.field for edit in plan.edits] == ["features.0", "vectors.0", "edits.0"]


@pytest.mark.parametrize(
    "body", [("activations", {}), ("activations", {"index": 1}), ("top_k", {}), ("steer", {"features": []})]
)
def test_a_model_may_be_named_and_in_strict_mode_has_to_be_the_one(body: tuple[str, dict[str, Any]]):
    name, fields = body
    strict = FakeRuntime(sources=ONE_SOURCE, strict_model=True)
    for model in ({}, {"model": None}, {"model": "tiny"}, {"model": "org/tiny"}):
        assert ask(name, {"prompt": "one", **fields, **model}, strict)
    other = {"prompt": "one", **fields, "model": "other"}
    with pytest.raises(InvalidRequest, match="serves 'tiny', not 'other'"):
        ask(name, other, strict)
    assert ask(name, other, FakeRuntime(sources=ONE_SOURCE))


@pytest.mark.parametrize(
    ("operation", "body", "field"),
    [
        ("activations", {"prompt": "one"}, "source_set"),
        ("activations", {"prompt": "one", "index": 1}, "source"),
        ("top_k", {"prompt": "one"}, "source"),
        ("contrast", {"a": ["one"], "b": ["two"]}, "source_set"),
        ("steer", {"prompt": "one", "features": [{"index": 1, "strength": 1}]}, "source"),
        ("steer", {"prompt": "one", "features": [], "watch": [{"index": 1}]}, "watch.0.source"),
    ],
)
def test_a_server_without_saes_says_what_gives_it_some(operation: str, body: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest, match=f"{field}: there is none to choose. This server has no SAEs: SAE_SETS or"):
        ask(operation, body, FakeRuntime(sources=()))
