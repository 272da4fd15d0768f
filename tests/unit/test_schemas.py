"""The wire models themselves: strictness, spelling, bounds, and what the OpenAPI document says."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel

from neuronpedia_inference.errors import LimitExceeded
from neuronpedia_inference.operations import OPERATIONS, InvalidBody, Operation, by_name, validate
from neuronpedia_inference.schemas.activation import (
    ActivationAllRequest,
    ActivationSingleBatchRequest,
    ActivationSingleRequest,
)
from neuronpedia_inference.schemas.common import SEED_LIMIT, Ours, Reply, Wire
from neuronpedia_inference.schemas.service import Capabilities, ErrorBody, Health, Ready
from neuronpedia_inference.schemas.steer import SteerCompletionChatRequest, SteerCompletionRequest, SteerRequest
from neuronpedia_inference.schemas.util import UtilSaeTopkByDecoderCossimRequest

MODULES = ("activation", "common", "service", "steer", "tokenize", "util")
MODELS = {
    name: model
    for module in MODULES
    for name, model in vars(importlib.import_module(f"neuronpedia_inference.schemas.{module}")).items()
    if isinstance(model, type) and issubclass(model, BaseModel)
    if "[" not in name and model.__module__.startswith("neuronpedia_inference")
}
STEER: dict[str, Any] = {
    "prompt": "one",
    "model": "m",
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED"],
    "features": [],
    "n_completion_tokens": 8,
    "temperature": 0,
    "strength_multiplier": 2,
    "freq_penalty": 0,
    "seed": 16,
}


def refused(model: type[Wire], body: dict[str, Any]) -> set[str]:
    """The top-level fields that a body gets wrong."""
    try:
        model.model_validate(body)
    except ValidationError as exc:
        return {str(error["loc"][0]) for error in exc.errors()}
    return set()


# Strictness


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("n_completion_tokens", [1, 10**6], [0, -1, 1.0, "1", True, None, [1]]),
        ("temperature", [0, 0.0, 1, 100], [-0.1, 101, "1", True, None, float("nan"), float("inf"), 10**400]),
        ("strength_multiplier", [-1, 0, 1e6, -1e6], ["1", False, float("-inf"), 1.1e6, -1.1e6]),
        ("freq_penalty", [-100, 1.5, 100], ["0", None, -1e308, -101, 101]),
        ("normalize_steering", [True, False], [0, 1, "true", None]),
        ("stream", [True, False, None], [0, "false"]),
        ("n_logprobs", [0, 10, None], [-1, 11, 1.0, "5", True]),
        ("types", [["DEFAULT"], ["DEFAULT", "STEERED"]], [[], ["steered"], "STEERED", None, [1]]),
        ("steer_method", ["ORTHOGONAL_DECOMP", "PROJECTION_CAP"], ["additive", 1, None]),
        ("prompt", ["", "text"], [None, 1, ["text"], b"text"]),
        ("model", ["", "m"], [None, 1, "m" * 513, "\ud800"]),
        ("features", [None, []], [{}, "x", [1], [{}]]),
        ("seed", [0, -5, 1.9, 2**63 - 1, -(2**63)], [2**63, -(2**63) - 1, 1e300, "1", True, None, float("nan")]),
    ],
)
def test_types_are_strict(field: str, good: list[Any], bad: list[Any]):
    for value in good:
        assert refused(SteerCompletionRequest, {**STEER, field: value}) == set(), value
    for value in bad:
        assert refused(SteerCompletionRequest, {**STEER, field: value}) == {field}, value


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("index", ["0", "x"], [0, 1.0, ["1"]]),
        ("vector", [[], [1, 0.5]], [["1"], [True], [None], [float("nan")], "1"]),
        ("hook", ["h"], [1]),
        ("source", ["s", None], [7]),
    ],
)
def test_pairs_are_strict(field: str, good: list[Any], bad: list[Any]):
    for value in good:
        assert refused(ActivationSingleRequest, {"prompt": "p", "model": "m", field: value}) == set(), value
    for value in bad:
        assert refused(ActivationSingleRequest, {"prompt": "p", "model": "m", field: value}) == {field}, value


def test_bounds_of_results():
    body = {
        "prompt": "p",
        "model": "m",
        "source_set": "s",
        "selected_sources": [],
        "sort_by_token_indexes": [],
        "ignore_bos": True,
    }
    assert ActivationAllRequest.model_validate(body).num_results == 25
    assert refused(ActivationAllRequest, {**body, "num_results": -1}) == {"num_results"}
    assert refused(ActivationAllRequest, {**body, "sort_by_token_indexes": [1.0]}) == {"sort_by_token_indexes"}
    for bad in (0, -1, 2.0):
        search = {"vector": [1], "model": "m", "source": "s", "num_results": bad}
        assert refused(UtilSaeTopkByDecoderCossimRequest, search) == {"num_results"}


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(-9.2e18, 9.2e18)))
def test_any_number_in_range_is_a_seed(seed: float):
    request = SteerCompletionRequest.model_validate({**STEER, "seed": seed})
    assert type(request.seed) is int
    assert request.seed == int(seed)
    assert -SEED_LIMIT <= request.seed < SEED_LIMIT


def test_echoed_text_must_be_text():
    body = {**STEER, "steer_special_tokens": True, "prompt": [{"role": "user", "content": "\ud800"}]}
    assert refused(SteerCompletionChatRequest, body) == {"prompt"}


def test_a_long_bad_vector_gives_one_problem():
    with pytest.raises(ValidationError) as caught:
        ActivationSingleRequest.model_validate({"prompt": "p", "model": "m", "vector": ["x"] * 60_000})
    assert caught.value.error_count() == 1


BOUNDED: list[tuple[type[Wire], str, Any, int]] = [
    (ActivationSingleRequest, "vector", 1.0, 65536),
    (ActivationAllRequest, "selected_sources", "1-res", 4096),
    (ActivationAllRequest, "sort_by_token_indexes", 1, 65536),
    (SteerCompletionRequest, "features", {"model": "m", "source": "s", "index": 1, "strength": 1}, 512),
    (SteerCompletionRequest, "vectors", {"steering_vector": [1.0], "strength": 1, "hook": "h"}, 512),
    (SteerCompletionRequest, "types", "STEERED", 2),
    (SteerCompletionChatRequest, "prompt", {"role": "user", "content": "x"}, 1024),
    (SteerRequest, "prompt", {"role": "user", "content": "x"}, 1024),
    (SteerRequest, "features", {"index": 1, "strength": 1}, 512),
]


@pytest.mark.parametrize(("model", "field", "item", "most"), BOUNDED)
def test_lists_are_bounded(model: type[Wire], field: str, item: Any, most: int):
    assert field not in refused(model, {field: [item] * most})
    said = rf"{field}: {most + 1} items are too many, the most is {most}\. Send fewer"
    with pytest.raises(LimitExceeded, match=said):
        model.model_validate({field: [item] * (most + 1)})


def test_every_list_of_every_request_has_a_bound():
    def lists(about: Any) -> list[dict[str, Any]]:
        if isinstance(about, list):
            return [found for one in about for found in lists(one)]
        if not isinstance(about, dict):
            return []
        inner = [found for key, value in about.items() if key != "examples" for found in lists(value)]
        return [*inner, about] if about.get("type") == "array" else inner

    for operation in OPERATIONS:
        for found in lists(operation.request.model_json_schema()):
            assert "maxItems" in found, (operation.name, found)


def test_a_list_far_beyond_its_bound_is_refused_unread():
    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("read")

    with pytest.raises(LimitExceeded, match="vector: 70000 items"):
        ActivationSingleRequest.model_validate({"prompt": "p", "model": "m", "vector": Unread([1.0] * 70_000)})
    with pytest.raises(LimitExceeded, match="Batch size 5 exceeds maximum of 4"):
        ActivationSingleBatchRequest.model_validate({"prompts": Unread("abcde"), "model": "m"})


# Spelling


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_examples_mean_the_same_in_both_spellings(operation: Any):
    snake = operation.request.model_json_schema(by_alias=False)
    camel = operation.request.model_json_schema(by_alias=True)
    assert snake["examples"]
    for one, other in zip(snake["examples"], camel["examples"], strict=True):
        assert set(one) <= set(snake["properties"])
        assert set(other) <= set(camel["properties"])
        assert set(camel.get("required", ())) <= set(other)
        assert operation.request.model_validate(one) == operation.request.model_validate(other)


def test_every_field_reads_both_spellings_and_camel_case_wins():
    for name, field in SteerRequest.model_fields.items():
        assert field.alias == to_camel(name)
    request = SteerRequest.model_validate({"prompt": "p", "max_new_tokens": 3, "maxNewTokens": 7})
    assert request.max_new_tokens == 7
    assert SteerRequest.model_validate({"prompt": "p", "max_new_tokens": 3}).max_new_tokens == 3


def test_problems_are_told_in_one_spelling():
    assert refused(SteerRequest, {"prompt": "p", "maxNewTokens": 0}) == {"max_new_tokens"}


# The OpenAPI document


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_described(name: str):
    model = MODELS[name]
    assert model.__doc__
    for mode in ("validation", "serialization"):
        schema = model.model_json_schema(mode=mode)
        for field, described in schema.get("properties", {}).items():
            assert len(described.get("description", "")) > 5, f"{name}.{field}"


def test_bounds_are_in_the_schema():
    schema = SteerCompletionRequest.model_json_schema(by_alias=False)["properties"]
    assert schema["n_completion_tokens"]["minimum"] == 1
    assert schema["temperature"]["minimum"] == 0
    assert schema["types"]["minItems"] == 1
    assert (schema["seed"]["type"], schema["seed"]["minimum"]) == ("number", -SEED_LIMIT)
    assert schema["n_logprobs"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 10}


def test_service_bodies_are_snake_case():
    error = ErrorBody(error="no", code="invalid_request", request_id="1")
    assert error.model_dump(by_alias=True, exclude_none=True) == {
        "error": "no",
        "code": "invalid_request",
        "request_id": "1",
    }
    assert Health().model_dump() == {"status": "healthy"}
    assert Ready(model="m").model_dump() == {"status": "ready", "model": "m"}
    assert Capabilities.model_validate({"model": "m", "anything": [1]}).model_dump()["anything"] == [1]


def test_answers_take_tuples_and_requests_are_frozen():
    class Row(Reply):
        """A row."""

        values: list[float]

    assert Row.model_validate({"values": (1, 2.5)}).values == [1.0, 2.5]
    with pytest.raises(ValidationError, match="frozen"):
        SteerRequest.model_validate({"prompt": "p"}).prompt = "q"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("operation", "body", "said"),
    [
        ("steer", {"max_tokens": 1}, "body: there is no field 'max_tokens'. Did you mean 'max_new_tokens'"),
        ("steer", {"maxTokens": 1}, "body: there is no field 'maxTokens'. Did you mean 'maxNewTokens'"),
        (
            "steer",
            {"features": [{"index": 1, "strenght": 2}]},
            "there is no field 'strenght'. Did you mean 'strength'?",
        ),
        ("top_k", {"ignorBos": True}, "there is no field 'ignorBos'. Did you mean 'ignoreBos'?"),
        (
            "activations",
            {"zzzz": 1, "yyyy": 2},
            "there is no field 'zzzz' (nor others of the body's). There are prompt, ",
        ),
    ],
)
def test_our_own_routes_refuse_fields_that_they_do_not_know(operation: str, body: dict[str, Any], said: str) -> None:
    """Swallowed, such a field would be a request that was not done."""
    with pytest.raises(InvalidBody) as refused:
        validate(by_name[operation], {"prompt": "a", **body})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.request.model_fields and not issubclass(one.request, Ours)]
)
def test_neuronpedia_s_routes_ignore_them(operation: Operation[Any]) -> None:
    """Its clients send some: the same is wrong with a body whether or not there is one more."""
    wrong = {"prompt": 1, "text": 1}
    told = []
    for body in (wrong, {**wrong, "max_tokens": 1, "zzzz": [[]]}):
        with pytest.raises(InvalidBody) as refused:
            validate(operation, body)
        told.append(str(refused.value))
    assert told[0] == told[1]
