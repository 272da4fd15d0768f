"""The friendly operations: defaults, labels and the choice of a source."""

from __future__ import annotations

from typing import Any

import pytest

from neuronpedia_inference.domain import Ranking, Sampling
from neuronpedia_inference.errors import InvalidRequest, UnknownSource
from neuronpedia_inference.steering.plan import SteerFeature, SteerMethod, SteerPlan, SteerVector

from .test_operations_fake import ATT, RES, FakeRuntime, ask

ONE_SET = RES
ONE_SOURCE = (ATT,)


def test_activations_need_no_more_than_a_prompt():
    runtime = FakeRuntime(sources=ONE_SET)
    answer = ask("activations", {"prompt": "one two"}, runtime)
    assert runtime.called("ranked_features") == ([s.name for s in RES], Ranking(limit=25, ignore_first=True))
    [result] = answer["results"]
    assert result["tokens"] == ["<s>", "one", " two"]
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
        }


def test_a_list_of_prompts_gives_a_result_for_each():
    runtime = FakeRuntime(sources=ONE_SET)
    both = ask("activations", {"prompt": ["one", "two three"], "num_results": 2}, runtime)["results"]
    alone = [ask("activations", {"prompt": p, "num_results": 2}, runtime)["results"][0] for p in ("one", "two three")]
    assert both == alone


def test_an_index_shows_one_feature():
    runtime = FakeRuntime(sources=ONE_SOURCE)
    answer = ask("activations", {"prompt": "one two", "index": 2}, runtime)
    [result] = answer["results"]
    [feature] = result["features"]
    assert result["tokens"] == ["one", " two"]
    assert (feature["source"], feature["index"], feature["label"]) == ("3-att", 2, "3-att means 2")
    assert len(feature["values"]) == len(feature["dfa_values"]) == 2


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


def test_a_source_outside_the_named_set_is_refused():
    with pytest.raises(UnknownSource):
        ask("activations", {"prompt": "one", "source_set": "res", "source": "3-att"})


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


def test_an_open_choice_of_nothing_says_so():
    with pytest.raises(InvalidRequest, match="Available: none$"):
        ask("top_k", {"prompt": "one"}, FakeRuntime(sources=()))


def test_one_feature_with_bos_is_refused():
    with pytest.raises(InvalidRequest, match="ignore_bos"):
        ask("activations", {"prompt": "one", "source": "1-res", "index": 1, "ignore_bos": False})


@pytest.mark.parametrize("prompt", ["one two", ["one two", "three"]])
def test_top_k_labels_features(prompt: str | list[str]):
    runtime = FakeRuntime(sources=ONE_SOURCE)
    answer = ask("top_k", {"prompt": prompt, "top_k": 2}, runtime)
    assert len(answer["results"]) == (1 if isinstance(prompt, str) else 2)
    result = answer["results"][0]
    assert (result["source"], result["tokens"]) == ("3-att", ["one", " two"])
    assert [row["token_position"] for row in result["positions"]] == [1, 2]
    for row in result["positions"]:
        assert len(row["top_features"]) == 2
        for one in row["top_features"]:
            assert one["label"] == runtime.label("3-att", one["feature_index"])


def test_steer_compares_by_default():
    runtime = FakeRuntime(sources=ONE_SOURCE)
    answer = ask("steer", {"prompt": "one", "features": [{"index": 2, "strength": 3}]}, runtime)
    prompt, plans, sampling, _ = runtime.called("generate")
    assert prompt.strings == ("<s>", "one")
    assert plans == [SteerPlan((SteerFeature("3-att", 2, 3.0),)), None]
    assert sampling == Sampling(32, seed=16)
    assert answer == {
        "steered": {"text": " steered", "messages": None, "logprobs": None, "finish_reason": "length"},
        "default": {"text": " plain", "messages": None, "logprobs": None, "finish_reason": "length"},
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
    steer = SteerVector("blocks.1.hook_resid_post", [1.0, 2.0, 3.0, 4.0], 1.0)
    assert plans == [SteerPlan((steer,), SteerMethod.ORTHOGONAL_DECOMP)]
    assert sampling == Sampling(3, temperature=0.7, freq_penalty=1.0, seed=5, n_logprobs=1)
    assert answer["default"] is None
    assert answer["steered"]["text"] == " steered"
    assert answer["steered"]["messages"] == [*body["prompt"], {"role": "assistant", "content": "steered"}]
    assert len(answer["steered"]["logprobs"]) == 1


def test_steer_leaves_a_chats_special_tokens_alone_by_default():
    runtime = FakeRuntime()
    features = [{"source": "1-res", "index": 0, "strength": 1}]
    ask("steer", {"prompt": [{"role": "user", "content": "hi"}], "features": features}, runtime)
    assert runtime.called("generate")[1][0].skip_special_tokens is True


def test_steer_needs_something_to_steer_with():
    with pytest.raises(InvalidRequest, match="exactly one of features or vectors"):
        ask("steer", {"prompt": "one"})


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
