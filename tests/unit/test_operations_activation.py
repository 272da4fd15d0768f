"""Activation, tokenize and vector operations: what is trimmed, limited, ordered and refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronpedia_inference.domain import Ranking
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded, UnknownSource

from .test_operations_fake import AT_BOS, ATT, N_FEATURES, RES, FakeRuntime, ask, client_reads

TEXT = "one two three"


def single(**changes: Any) -> dict[str, Any]:
    return {"prompt": TEXT, "model": "tiny", "source": "1-res", "index": "1", **changes}


def all_(**changes: Any) -> dict[str, Any]:
    body = {
        "prompt": TEXT,
        "model": "tiny",
        "source_set": "res",
        "selected_sources": [],
        "sort_by_token_indexes": [],
        "ignore_bos": True,
    }
    return {**body, **changes}


def topk(**changes: Any) -> dict[str, Any]:
    return {"prompt": TEXT, "model": "tiny", "source": "1-res", "ignore_bos": True, **changes}


def batched(body: dict[str, Any], *prompts: str) -> dict[str, Any]:
    return {"prompts": list(prompts), **{key: value for key, value in body.items() if key != "prompt"}}


# activation/single


def test_a_leading_bos_is_left_out_of_all_lists():
    runtime = FakeRuntime()
    answer = ask("activation_single", single(), runtime)
    tokens = runtime.tokenize(TEXT, "once")
    assert answer["tokens"] == ["one", " two", " three"]
    assert answer["tokens_is_special"] == [False] * 3
    assert answer["activation"]["values"] == list(runtime.column(tokens, 1)[1:])
    assert answer["activation"]["max_value"] == max(answer["activation"]["values"]) < AT_BOS
    parsed = client_reads("activation_single", answer)
    assert parsed.activation.max_value_index == answer["activation"]["values"].index(parsed.activation.max_value)


def test_a_bos_that_the_caller_wrote_in_front_is_the_only_one():
    answer = ask("activation_single", single(prompt="<s>one"))
    assert answer["tokens"] == ["one"]


def test_bos_text_inside_the_prompt_is_an_ordinary_token():
    runtime = FakeRuntime()
    answer = ask("activation_single", single(prompt="one<s> two"), runtime)
    assert answer["tokens"] == ["one", "<s>", " two"]
    assert answer["tokens_is_special"] == [False, True, False]
    assert answer["activation"]["values"][1] == runtime.at(runtime.tokenize("one<s> two", "once"), 2, 1) > 0


def test_without_a_bos_token_nothing_is_left_out():
    runtime = FakeRuntime(has_bos=False)
    answer = ask("activation_single", single(), runtime)
    assert answer["tokens"] == ["one", " two", " three"]
    assert runtime.called("feature_activations") == ("1-res", 1, 0)


def test_neurons_keep_the_bos():
    answer = ask("activation_single", single(source="1"))
    assert answer["tokens"][0] == "<s>"
    assert answer["activation"]["max_value"] == AT_BOS + 1


@pytest.mark.parametrize(("natural_bos", "first"), [(False, "one"), (True, "<s>")])
def test_vectors_see_the_tokens_that_the_tokenizer_makes_by_itself(natural_bos: bool, first: str):
    body = {"prompt": TEXT, "model": "tiny", "vector": [1, 0.5, 0, 0], "hook": "blocks.1.hook_resid_post"}
    runtime = FakeRuntime(natural_bos=natural_bos)
    answer = ask("activation_single", body, runtime)
    assert answer["tokens"][0] == first
    assert len(answer["activation"]["values"]) == len(answer["tokens"])
    assert runtime.called("projections") == ("blocks.1.hook_resid_post", (1.0, 0.5, 0.0, 0.0))


def test_attribution_is_trimmed_with_the_values():
    runtime = FakeRuntime()
    answer = ask("activation_single", single(source="3-att"), runtime)["activation"]
    assert runtime.called("feature_activations") == ("3-att", 1, 1)
    assert answer["dfa_values"] == [0.1, 0.2, 0.3]
    assert answer["dfa_target_index"] == answer["max_value_index"]
    assert answer["dfa_max_value"] == 0.3  # the 50.0 at BOS is gone


def test_attribution_is_null_for_other_sources():
    answer = ask("activation_single", single())["activation"]
    assert (answer["dfa_values"], answer["dfa_target_index"], answer["dfa_max_value"]) == (None, None, None)


PAIRS = {"source": "1-res", "index": "1", "vector": [0.0] * 4, "hook": "blocks.1.hook_resid_post"}


@settings(max_examples=30)
@given(st.sets(st.sampled_from(sorted(PAIRS))))
def test_exactly_one_complete_pair_is_needed(names: set[str]):
    body = {"prompt": TEXT, "model": "tiny", **{name: PAIRS[name] for name in names}}
    if ({"source", "index"} <= names) != ({"vector", "hook"} <= names):
        assert ask("activation_single", body)["tokens"]
    else:
        with pytest.raises(InvalidRequest, match=r"^Invalid request data: exactly one of layer/index or vector must"):
            ask("activation_single", body)


@pytest.mark.parametrize("index", ["-1", "1.0", "", " 1", "1 ", "+1", "0x1", "١", "one", "9" * 30, "1_0", "1\n"])
def test_index_must_be_a_decimal_number(index: str):
    with pytest.raises(InvalidRequest, match="decimal number"):
        ask("activation_single", single(index=index))


def test_leading_zeros_are_decimal():
    assert ask("activation_single", single(index="001")) == ask("activation_single", single(index="1"))


@pytest.mark.parametrize("body", [single(prompt=""), single(prompt="<s>"), single(prompt="", source="1")])
def test_an_empty_prompt_is_refused(body: dict[str, Any]):
    with pytest.raises(InvalidRequest, match="^Prompt is empty$"):
        ask("activation_single", body)


def test_an_empty_prompt_is_refused_for_vectors():
    body = {"prompt": "", "model": "tiny", "vector": [0.0] * 4, "hook": "blocks.1.hook_resid_post"}
    with pytest.raises(InvalidRequest, match="^Prompt is empty$"):
        ask("activation_single", body)


def test_unknown_sources_are_named_with_what_exists():
    with pytest.raises(UnknownSource, match=r"'9-res'.*1-res"):
        ask("activation_single", single(source="9-res"))


# Batches


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["one", "one two three", "x<s>y", "four five"]), min_size=1, max_size=4))
def test_a_batch_is_its_prompts_one_by_one(prompts: list[str]):
    for name, body in (("single", single()), ("all", all_()), ("topk_by_token", topk())):
        alone = [ask(f"activation_{name}", {**body, "prompt": prompt}) for prompt in prompts]
        assert ask(f"activation_{name}_batch", batched(body, *prompts))["results"] == alone


BATCH_BODIES = [
    ("activation_single_batch", single()),
    ("activation_all_batch", all_()),
    ("activation_topk_by_token_batch", topk()),
    ("activation_source", {"model": "tiny", "source": "1-res"}),
]


@pytest.mark.parametrize(("name", "body"), BATCH_BODIES)
def test_batches_hold_one_to_four_prompts(name: str, body: dict[str, Any]):
    with pytest.raises(InvalidRequest, match="^At least one prompt is required$"):
        ask(name, batched(body))
    with pytest.raises(InvalidRequest, match="^Batch size 5 exceeds maximum of 4$"):
        ask(name, batched(body, *["x"] * 5))
    assert len(ask(name, batched(body, *["x y"] * 4))["results"]) == 4


@pytest.mark.parametrize(("name", "body"), BATCH_BODIES)
def test_only_several_prompts_share_the_length_limit(name: str, body: dict[str, Any]):
    runtime = FakeRuntime(token_limit=12)
    five = "a b c d"
    assert ask(name, batched(body, five), runtime)["results"]
    with pytest.raises(LimitExceeded, match="5 tokens, max is 3 for batch requests"):
        ask(name, batched(body, five, "a"), runtime)


# activation/all


def test_the_strongest_features_come_with_their_true_source():
    answer = ask("activation_all", all_(selected_sources=["12-res", "1-res"], num_results=3))
    client_reads("activation_all", answer)
    assert {row["source"] for row in answer["activations"]} <= {"12-res", "1-res"}
    assert answer["tokens"] == ["<s>", "one", " two", " three"]
    assert all(row["values"][0] == 0 and len(row["values"]) == 4 for row in answer["activations"])
    assert answer["counts"] is None


@pytest.mark.parametrize(
    ("selected", "looked_at"),
    [
        ([], [source.name for source in RES]),
        (["12-res", "1-res"], ["12-res", "1-res"]),
        (["2-res", "2-res"], ["2-res"]),
    ],
)
def test_selected_sources(selected: list[str], looked_at: list[str]):
    runtime = FakeRuntime()
    ask("activation_all", all_(selected_sources=selected), runtime)
    assert runtime.called("ranked_features")[0] == looked_at


@pytest.mark.parametrize("stranger", ["3-att", "1", "99-res"])
def test_a_source_of_another_set_is_refused(stranger: str):
    with pytest.raises(UnknownSource, match=r"of set 'res'.*2-res"):
        ask("activation_all", all_(selected_sources=["1-res", stranger]))


def test_an_unknown_set_is_refused():
    with pytest.raises(UnknownSource, match="source set 'rse'"):
        ask("activation_all", all_(source_set="rse"))


def test_neurons_are_a_set():
    answer = ask("activation_all", all_(source_set="neurons", selected_sources=["1"], num_results=2))
    assert [row["source"] for row in answer["activations"]] == ["1", "1"]


@pytest.mark.parametrize(("asked", "most", "limit"), [(None, 40, 25), (None, 9, 9), (7, 40, 7), (10**9, 9, 9)])
def test_num_results_are_cut_to_their_bound(asked: int | None, most: int, limit: int):
    runtime = FakeRuntime(max_results=most)
    ask("activation_all", all_(num_results=asked), runtime)
    assert runtime.called("ranked_features")[1] == Ranking(limit=limit)


def test_no_results_cost_nothing():
    runtime = FakeRuntime()
    answer = ask("activation_all", all_(num_results=0), runtime)
    assert answer == {"activations": [], "tokens": ["<s>", "one", " two", " three"], "counts": None}
    assert runtime.calls == []


@pytest.mark.parametrize(
    ("has_bos", "ignore_bos", "ignored"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_position_zero_counts_as_bos_only_where_there_is_one(has_bos: bool, ignore_bos: bool, ignored: bool):
    runtime = FakeRuntime(has_bos=has_bos)
    ask("activation_all", all_(ignore_bos=ignore_bos), runtime)
    assert runtime.called("ranked_features")[1].ignore_first is ignored


def test_sorting_by_tokens_is_passed_on_with_duplicates():
    runtime = FakeRuntime()
    answer = ask("activation_all", all_(sort_by_token_indexes=[2, 2, 1]), runtime)
    assert runtime.called("ranked_features")[1].weights == {2: 2, 1: 1}
    sums = [row["sum_values"] for row in answer["activations"]]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] > 0


@pytest.mark.parametrize("index", [-1, 4, 10**30])
def test_sort_positions_must_lie_in_the_prompt(index: int):
    with pytest.raises(InvalidRequest, match=rf"{index} is out of range for a prompt of 4 tokens"):
        ask("activation_all", all_(sort_by_token_indexes=[0, index]))


def test_sort_positions_must_lie_in_every_prompt_of_a_batch():
    body = batched(all_(sort_by_token_indexes=[3]), TEXT, "one")
    with pytest.raises(InvalidRequest, match="3 is out of range for a prompt of 2 tokens"):
        ask("activation_all_batch", body)


def test_attribution_of_all_is_in_full_prompt_positions():
    answer = ask("activation_all", all_(source_set="att", num_results=1))
    [row] = answer["activations"]
    assert row["dfa_values"] == [50.0, 0.1, 0.2, 0.3]
    assert row["dfa_max_value"] == 50.0


# activation/topk-by-token


@pytest.mark.parametrize(
    ("has_bos", "ignore_bos", "positions"),
    [(True, True, [1, 2, 3]), (True, False, [0, 1, 2, 3]), (False, True, [0, 1, 2])],
)
def test_top_k_positions_count_from_the_beginning(has_bos: bool, ignore_bos: bool, positions: list[int]):
    runtime = FakeRuntime(has_bos=has_bos)
    answer = ask("activation_topk_by_token", topk(ignore_bos=ignore_bos, top_k=2), runtime)
    client_reads("activation_topk_by_token", answer)
    tokens = runtime.tokenize(TEXT, "once")
    assert [row["token_position"] for row in answer["results"]] == positions
    assert answer["tokens"] == [row["token"] for row in answer["results"]] == [tokens.strings[p] for p in positions]
    assert [row["is_special"] for row in answer["results"]] == [tokens.is_special[p] for p in positions]
    for row in answer["results"]:
        values = [one["activation_value"] for one in row["top_features"]]
        assert values == sorted(values, reverse=True)
        assert values[0] == max(runtime.at(tokens, row["token_position"], f) for f in range(N_FEATURES))


@pytest.mark.parametrize(("asked", "k"), [(None, 5), (1, 1), (99, N_FEATURES)])
def test_top_k_is_five_unless_asked_and_at_most_all(asked: int | None, k: int):
    runtime = FakeRuntime(max_top_k=99)
    ask("activation_topk_by_token", topk(top_k=asked), runtime)
    assert runtime.called("top_features") == ("1-res", k)


def test_top_k_beyond_its_bound_is_refused():
    runtime = FakeRuntime(max_top_k=99)
    with pytest.raises(LimitExceeded, match=r"top_k is 100, the most is 99\. .*MAX_TOP_K"):
        ask("activation_topk_by_token", topk(top_k=100), runtime)
    assert runtime.calls == []


@pytest.mark.parametrize(
    ("name", "body", "counted"),
    [
        ("activation_topk_by_token", topk(top_k=99), "6 features for 4 tokens are 24 activations"),
        ("activation_all", all_(num_results=5), "5 features for 4 tokens are 20 activations"),
    ],
)
def test_an_answer_too_large_is_refused_before_it_is_computed(name: str, body: dict[str, Any], counted: str):
    runtime = FakeRuntime(max_result_values=19)
    with pytest.raises(LimitExceeded, match=rf"{counted}, the most in one answer is 19\. .*MAX_RESULT_VALUES"):
        ask(name, body, runtime)
    assert runtime.calls == []


# activation/source


def test_active_features_are_rounded_and_in_order_of_first_firing():
    runtime = FakeRuntime()
    answer = ask("activation_source", {"prompts": [TEXT], "model": "tiny", "source": "1-res"}, runtime)
    client_reads("activation_source", answer)
    [result] = answer["results"]
    assert result["tokens"][0] == "<s>"
    tokens = runtime.tokenize(TEXT, "once")
    expected: dict[str, list[list[float]]] = {}
    for position in range(1, 4):
        for index in range(N_FEATURES):
            if value := runtime.at(tokens, position, index):
                expected.setdefault(str(index), []).append([position, value])
    assert list(result["activeFeatures"].items()) == list(expected.items())
    assert all(type(pair[0]) is int for pairs in result["activeFeatures"].values() for pair in pairs)


def test_active_features_without_bos_include_position_zero():
    body = {"prompts": [TEXT], "model": "tiny", "source": "1-res"}
    [result] = ask("activation_source", body, FakeRuntime(has_bos=False))["results"]
    assert [0, 1.25] in result["activeFeatures"]["1"]


# tokenize


@pytest.mark.parametrize(
    ("has_bos", "flag", "tokens", "prepended"),
    [
        (True, {}, ["<s>", "one"], True),
        (True, {"prepend_bos": None}, ["<s>", "one"], True),
        (True, {"prepend_bos": False}, ["one"], False),
        (False, {"prepend_bos": True}, ["one"], False),
    ],
)
def test_tokenize_tells_what_it_did(has_bos: bool, flag: dict[str, Any], tokens: list[str], prepended: bool):
    answer = ask("tokenize", {"model": "tiny", "text": "one", **flag}, FakeRuntime(has_bos=has_bos))
    client_reads("tokenize", answer)
    assert (answer["token_strings"], answer["prepend_bos"]) == (tokens, prepended)


def test_tokenize_doubles_a_bos_and_does_not_claim_one_that_was_there():
    assert ask("tokenize", {"model": "tiny", "text": "<s>one"})["token_strings"] == ["<s>", "<s>", "one"]
    kept = ask("tokenize", {"model": "tiny", "text": "<s>one", "prepend_bos": False})
    assert (kept["token_strings"], kept["prepend_bos"]) == (["<s>", "one"], False)


def test_tokenize_nothing():
    assert ask("tokenize", {"model": "tiny", "text": "", "prepend_bos": False})["tokens"] == []


# Vectors


def test_sae_vector():
    answer = ask("util_sae_vector", {"model": "tiny", "source": "12-res", "index": 3})
    assert answer == {"vector": [3.0, 4.0, 5.0, 6.0], "hookName": "blocks.11.hook_resid_post"}
    client_reads("util_sae_vector", answer)


def test_neurons_have_no_sae_vectors():
    with pytest.raises(InvalidRequest, match="neurons"):
        ask("util_sae_vector", {"model": "tiny", "source": "1", "index": 3})


def test_nearest_rows_to_a_feature_of_another_source():
    runtime = FakeRuntime()
    feature = {"model": "anything", "source": "3-att", "index": 2}
    body = {"feature": feature, "model": "tiny", "source": "1-res", "num_results": 2}
    answer = ask("util_sae_topk_by_decoder_cossim", body, runtime)
    client_reads("util_sae_topk_by_decoder_cossim", answer)
    assert runtime.called("nearest_decoder_rows") == ("1-res", (ATT, 2), 2)
    assert answer["feature"] == feature
    assert [row["feature"] for row in answer["topk_decoder_cossim_features"]] == [
        {"model": "tiny", "source": "1-res", "index": index} for index in range(2)
    ]


def test_nearest_rows_to_a_vector_are_at_most_all():
    runtime = FakeRuntime()
    body = {"vector": [1, 2, 3, 4], "model": "tiny", "source": "1-res", "num_results": 10**6}
    answer = ask("util_sae_topk_by_decoder_cossim", body, runtime)
    assert answer["feature"] is None
    assert runtime.called("nearest_decoder_rows") == ("1-res", [1.0, 2.0, 3.0, 4.0], N_FEATURES)


@pytest.mark.parametrize("query", [{}, {"feature": {"model": "m", "source": "1-res", "index": 0}, "vector": [0.0]}])
def test_nearest_rows_need_exactly_one_query(query: dict[str, Any]):
    body = {"model": "tiny", "source": "1-res", "num_results": 1, **query}
    with pytest.raises(InvalidRequest, match="^Invalid request data: exactly one of feature or vector must be"):
        ask("util_sae_topk_by_decoder_cossim", body)
