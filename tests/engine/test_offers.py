"""What the capabilities say of places and routes, held against what the engine then does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import UnknownPoint
from neuronpedia_inference.offers import NO_HEADS, NO_TEMPLATE, NO_TEMPORAL, NOT_STEERED, offered
from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.points import READABLE, WRITABLE, Point
from tests import architectures
from tests.engine.engines import engine

assert architectures.CONFIGS  # registers them
WIRE = {
    *("tokenize", "activation_single", "activation_all", "activation_source", "activation_raw"),
    *("activation_topk_by_token", "activation_attention", "dfa", "steer_completion", "steer_completion_chat"),
    *("lens_logit", "lens_jacobian", "neurons"),
}
"""Names that clients of the wire look for."""


def sae(layer: int) -> Source:
    return Source(f"{layer}-att", "att", layer, f"blocks.{layer}.attn.hook_z", 8, 32, "standard", has_dfa=True)


@pytest.mark.parametrize("family", ["llama", "gptj", "qwen3_5", "qwen3_moe", "gemma4_text"])
def test_places_are_offered_exactly_where_they_can_be_used(family: str) -> None:
    built = engine(family)
    places = offered(built.verdict, (), chat=True)["places"]
    assert list(places) == list(READABLE)
    for place, words in places.items():
        for layer in range(built.n_layers):
            for word, write in (("readable", False), ("writable", True)):
                told = layer in words[word]["layers"]
                because = [reason for reason, layers in words[word]["refused"].items() if layer in layers]
                assert len(because) == (not told)
                if told:
                    built.check(Point(layer, place), write=write)
                    continue
                with pytest.raises(UnknownPoint) as refused:
                    built.check(Point(layer, place), write=write)
                assert because == [NOT_STEERED] or because[0] in str(refused.value)
    assert list(places["mlp.hook_in"]["writable"]["refused"]) == [NOT_STEERED]


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "phi3_longrope"])
def test_places_are_merged_where_rows_share_passes(family: str) -> None:
    built = engine(family)
    for place, words in offered(built.verdict, (), chat=True)["places"].items():
        merged = words["merged"]
        if not built.unmerged_because:
            assert merged == words["readable"]
        elif place in WRITABLE:
            assert merged["layers"] == []
            steered = set(words["writable"]["layers"])
            alone = [layers for because, layers in merged["refused"].items() if built.unmerged_because in because]
            assert {layer for layers in alone for layer in layers} == steered


def test_the_wires_names_are_all_told_and_every_route_is_true_or_has_a_reason() -> None:
    verdict = engine("llama").verdict
    told = offered(verdict, [sae(1)], chat=True)
    routes, reasons = told["endpoints"], told["endpoints_off_because"]
    assert routes.keys() >= WIRE | {operation.name for operation in OPERATIONS}
    assert all(type(is_served) is bool for is_served in routes.values())
    assert reasons.keys() == {name for name, is_served in routes.items() if not is_served}
    assert reasons.pop("util_similarity_matrix_pred") == NO_TEMPORAL
    assert not reasons
    assert routes["dfa"]
    assert routes["neurons"]


def test_a_model_without_jacobians_has_the_other_lens() -> None:
    told = offered(engine("llama").verdict, (), chat=True, no_jacobians="nobody has fitted any")
    routes = told["endpoints"]
    assert (routes["lens_prompt"], routes["lens_logit"], routes["lens_jacobian"]) == (True, True, False)
    assert told["endpoints_off_because"]["lens_jacobian"] == "nobody has fitted any"


@pytest.mark.parametrize(
    ("family", "sources", "chat", "off"),
    [
        ("llama", [], True, {"dfa": NO_HEADS}),
        ("llama", [sae(0)], False, {"steer_completion_chat": NO_TEMPLATE}),
        ("gptj", [sae(1)], True, {"dfa": "this architecture's attention is not read"}),
        ("mixtral", [sae(1)], True, {"neurons": "this block has no such tensor"}),
        ("mixtral", [], True, {"activation_all": "no SAEs are served", "top_k": "no SAEs", "neurons": "no such"}),
    ],
)
def test_what_a_model_cannot_do_has_its_reason(
    family: str, sources: list[Source], chat: bool, off: dict[str, str]
) -> None:
    reasons = offered(engine(family).verdict, sources, chat=chat)["endpoints_off_because"]
    for name, reason in off.items():
        assert reason in reasons[name]
    assert "activation_single" not in reasons, "a vector needs no source"


def test_the_similarity_of_predictions_needs_a_temporal_sae() -> None:
    for sources, is_there in (([sae(0)], False), ([sae(0), replace(sae(1), architecture="temporal")], True)):
        told = offered(engine("llama").verdict, sources, chat=True)
        assert told["endpoints"]["util_similarity_matrix_pred"] is is_there
        assert ("util_similarity_matrix_pred" in told["endpoints_off_because"]) is not is_there


def test_whose_features_can_be_set_is_told_with_the_reasons() -> None:
    sources = [
        sae(0),
        replace(sae(1), name="1-topk", architecture="topk"),
        replace(sae(1), name="1-temporal", architecture="temporal"),
        replace(sae(1), name="1-skip", architecture="skip_transcoder"),
        replace(sae(1), name="1-tc", architecture="transcoder", hook_out="blocks.1.hook_mlp_out"),
    ]
    told = offered(engine("llama").verdict, sources, chat=True)["edits"]
    assert told["sources"] == [sources[0].name, "1-tc"]
    assert told["refused"] == {
        "topk: its features are compared with each other": ["1-topk"],
        "temporal: its encoder attends to earlier tokens": ["1-temporal"],
        "skip_transcoder: it does not say where it writes": ["1-skip"],
    }
    assert told["unrecorded_because"] == engine("llama").graphs_off_because
