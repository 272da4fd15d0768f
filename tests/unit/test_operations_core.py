"""The list of operations, and what all of them share: spelling, nulls, validation, strict mode."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import neuronpedia_inference_client
import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.operations import (
    OPERATIONS,
    InvalidBody,
    answer_events,
    answer_events_json,
    answer_pieces,
    by_name,
    validate,
)
from neuronpedia_inference.operations.growing import GrowingList, GrowingText
from neuronpedia_inference.operations.rendering import Entries, Rows
from neuronpedia_inference.schemas.tokenize import TokenizeRequest

from .test_operations_fake import FakeRuntime, ask, client_reads
from .test_rendering import whole

STEER = {
    "model": "tiny",
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED", "DEFAULT"],
    "features": [{"model": "m", "source": "1-res", "index": 3, "strength": 5}],
    "n_completion_tokens": 8,
    "temperature": 0,
    "strength_multiplier": 2,
    "freq_penalty": 0,
    "seed": 16,
    "n_logprobs": 2,
}
ALL = {
    "model": "tiny",
    "source_set": "att",
    "selected_sources": [],
    "sort_by_token_indexes": [1],
    "ignore_bos": True,
    "num_results": 2,
}
TOPK = {"model": "tiny", "source": "1-res", "top_k": 2, "ignore_bos": True}
SINGLE = {"model": "tiny", "source": "3-att", "index": "1"}
COSSIM = {"feature": {"model": "m", "source": "1-res", "index": 0}, "model": "m", "source": "2-res", "num_results": 2}
BODIES: dict[str, dict[str, Any]] = {
    "activation_single": {"prompt": "one two", **SINGLE},
    "activation_single_batch": {"prompts": ["one two", "three"], **SINGLE},
    "activation_all": {"prompt": "one two", **ALL},
    "activation_all_batch": {"prompts": ["one two", "three"], **ALL},
    "activation_topk_by_token": {"prompt": "one two", **TOPK},
    "activation_topk_by_token_batch": {"prompts": ["one two", "three"], **TOPK},
    "activation_source": {"prompts": ["one two"], "model": "tiny", "source": "1-res"},
    "steer_completion": {"prompt": "one two", **STEER},
    "steer_completion_chat": {
        "prompt": [{"role": "user", "content": "hi"}],
        "steer_special_tokens": True,
        **STEER,
    },
    "tokenize": {"model": "tiny", "text": "one"},
    "util_sae_vector": {"model": "tiny", "source": "1-res", "index": 1},
    "util_sae_topk_by_decoder_cossim": COSSIM,
    "util_similarity_matrix_pred": {"model_id": "tiny", "source_id": "1-res", "text": "one two three"},
    "activation_attention": {"prompt": "one two", "model": "tiny", "layer": 1, "head": 0},
    "activation_raw": {"prompts": ["one two"], "layers": [1], "hook_point": "residual_stream", "model": "tiny"},
    "apply_chat_template": {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True},
    "lens_prompt": {"model": "tiny", "type": ["LOGIT_LENS"], "prompt": "one two", "top_n": 2, "stream": False},
    "steer_health": {},
    "persona_monitor": {"model": "tiny", "conversation": [{"role": "assistant", "content": "hi"}]},
    "activations": {"prompt": "one", "source_set": "res"},
    "top_k": {"prompt": "one", "source": "1-res", "top_k": 1},
    "steer": {"prompt": "one", "features": [], "max_new_tokens": 1, "n_logprobs": 1},
    "search": {"q": "moon"},
    "feature": {"source": "1-res", "index": 2},
    "contrast": {"a": ["one two"], "b": ["three"], "source_set": "res"},
    "capture": {"prompt": "one two", "points": ["blocks.1.hook_resid_post"], "positions": "last"},
    "put_vectors": {"vectors": [{"name": "x", "vector": [1, 2]}]},
    "score": {"prompt": "one two", "continuations": [" three", " four five"], "n_logprobs": 2},
    "sweep": {"prompt": "one two", "features": [{"source": "3-att", "index": 2}], "strengths": [1, 2]},
    "chat_completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "completions": {"prompt": "one two", "max_tokens": 1},
    "models": {},
    "model": {"model": "tiny"},
}
OPENAI = ("chat_completions", "completions", "models", "model")
OUR_OWN = ("activations", "top_k", "steer", "search", "feature", "contrast", "capture", "put_vectors", "score", "sweep")
BESIDE = (
    *("activation_attention", "activation_raw", "apply_chat_template", "lens_prompt", "steer_health"),
    *("persona_monitor", "util_similarity_matrix_pred"),
)
"""Routes of the wire that the published client has no method for."""
WIRE = [name for name in BODIES if name not in (*OUR_OWN, *BESIDE, *OPENAI)]
BOTH = {"activation_single", "activation_single_batch", "tokenize"}
ALWAYS_CAMEL = {"activation_source": {"activeFeatures"}, "util_sae_vector": {"hookName"}}


def camel(value: Any) -> Any:
    """A body with every key in camelCase."""
    if isinstance(value, dict):
        return {to_camel(key): camel(item) for key, item in value.items()}
    return [camel(item) for item in value] if isinstance(value, list) else value


def keys(value: Any) -> set[str]:
    """Every key that occurs, at any depth; keys that are data (feature numbers, points, lenses) left out."""
    if isinstance(value, dict):
        found = {key for key in value if not (key.isdecimal() or key.isupper() or key.startswith("blocks."))}
        return found.union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def words(found: set[str]) -> tuple[set[str], set[str]]:
    """Keys of several words: in snake_case, in camelCase."""
    return {key for key in found if "_" in key}, {key for key in found if key != key.lower()}


# The list


def test_the_client_has_a_method_for_every_wire_operation():
    client = {
        name.removesuffix("_post")
        for api in vars(neuronpedia_inference_client).values()
        if isinstance(api, type) and api.__name__.endswith("Api")
        for name in vars(api)
        if name.endswith("_post") and not name.startswith("_")
    }
    assert client == set(WIRE)
    assert [operation.name for operation in OPERATIONS] == [*BODIES]


def test_names_paths_and_summaries_are_there_once():
    assert len({operation.path for operation in OPERATIONS}) == len(OPERATIONS) == len(by_name) == 33
    for operation in OPERATIONS:
        assert operation.path.startswith("/v1/")
        assert operation.summary[0].isupper()
        assert not operation.summary.endswith(".")
    streaming = {"steer_completion", "steer_completion_chat", "steer", "lens_prompt", "sweep"}
    streaming |= {"chat_completions", "completions"}
    assert {o.name for o in OPERATIONS if o.stream} == streaming


@pytest.mark.parametrize("module", ["operations", "schemas.steer"])
def test_importing_loads_nothing_heavy(module: str):
    heavy = ["torch", "transformers", "fastapi", "modal", "transformer_lens", "sae_lens"]
    code = f"import sys, neuronpedia_inference.{module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Spelling


@pytest.mark.parametrize("name", BODIES)
def test_a_snake_case_request_gets_what_the_client_reads(name: str):
    answer = ask(name, BODIES[name])
    json.dumps(answer, allow_nan=False)
    snake, camels = words(keys(answer))
    if name in BOTH:
        assert {to_camel(key) for key in snake} == camels != set()
    elif name == "activation_attention":  # nothing in it shows a spelling, and its own is camelCase
        assert (snake, camels) == (set(), {"seqLen", "attentionIndices", "attentionValues", "maxActivation"})
    else:
        assert camels == ALWAYS_CAMEL.get(name, set())
    if name in WIRE:
        client_reads(name, answer)


@pytest.mark.parametrize("name", BODIES)
def test_a_camel_case_request_gets_camel_case(name: str):
    body = camel(BODIES[name])
    answer = ask(name, body)
    plain = ask(name, BODIES[name])
    snake, camels = words(keys(answer))
    if name in BOTH or not by_name[name].mirrors or body == BODIES[name]:  # or nothing in it shows a spelling
        assert answer == plain
    elif "steer" in name:
        assert snake == {"top_logprobs"}
        assert "topLogprobs" in camels
    else:
        assert snake == set()
        assert camels == {to_camel(key) for key in words(keys(plain))[0]} | ALWAYS_CAMEL.get(name, set())


@pytest.mark.parametrize(("key", "spelled"), [("prepend_bos", "snake"), ("prependBos", "camel")])
def test_tokenize_mirrors_its_flag(key: str, spelled: str):
    snake, camels = words(keys(ask("tokenize", {"model": "tiny", "text": "one", key: None})))
    assert (bool(snake), bool(camels)) == (spelled == "snake", spelled == "camel")


def test_both_spellings_hold_the_same_values():
    answer = ask("activation_single", BODIES["activation_single"])
    assert answer["tokens_is_special"] == answer["tokensIsSpecial"]
    for key in ("max_value", "max_value_index", "dfa_values", "dfa_max_value", "dfa_target_index"):
        assert answer["activation"][key] == answer["activation"][to_camel(key)]
        assert answer["activation"][key] is not None


def test_top_logprobs_have_both_spellings_in_a_camel_case_answer():
    answer = ask("steer_completion", camel(BODIES["steer_completion"]))
    [entry] = answer["outputs"][0]["logprobs"]
    assert entry["top_logprobs"] == entry["topLogprobs"] != []


def test_camel_case_wins_where_both_spellings_are_sent():
    body = {**BODIES["activation_all"], "numResults": 1, "num_results": 5}
    answer = ask("activation_all", body)
    assert len(answer["activations"]) == 1
    assert "maxValue" in answer["activations"][0]


def test_unknown_keys_do_not_choose_the_spelling():
    one_word_each = {"prompt": "one", "model": "tiny", "source": "1-res", "index": "3"}
    plain = keys(ask("activation_single", one_word_each))
    assert words(plain) != (set(), set())
    for unknown in ("fooBar", "foo_bar"):
        assert keys(ask("activation_single", {**one_word_each, unknown: 1})) == plain


def test_a_request_object_is_answered_like_its_body():
    request = TokenizeRequest(model="tiny", text="one", prepend_bos=True)
    assert ask("tokenize", request) == ask("tokenize", request.model_dump())  # pyright: ignore[reportArgumentType]


# Nulls and numbers


def test_only_steering_leaves_nulls_out():
    single = ask("activation_single", {**BODIES["activation_single"], "source": "1-res"})
    assert single["activation"]["dfa_values"] is None
    assert ask("activation_all", BODIES["activation_all"])["counts"] is None
    assert "logprobs" not in ask("steer_completion", {**BODIES["steer_completion"], "n_logprobs": 0})["outputs"][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["activation_single", "activation_all", "activation_topk_by_token", "activations"])
def test_a_number_that_json_cannot_say_is_our_failure(name: str, value: float):
    with pytest.raises(EngineFailed, match="not finite"):
        ask(name, BODIES[name], FakeRuntime(value=value))


# Text


def realised(value: Any) -> Any:
    """A reply with lists in place of what is made while it is written."""
    if isinstance(value, BaseModel):
        return type(value).model_construct(**{name: realised(inner) for name, inner in value.__dict__.items()})
    if isinstance(value, Entries):
        return {key: realised(inner) for key, inner in value}
    if isinstance(value, GrowingText):
        return value.text
    if isinstance(value, GrowingList):
        return [value._make(item) for item in value._items]
    return [realised(item) for item in value] if isinstance(value, list | Rows) else value


def said_of(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer as pydantic dumps the reply, spelled as the request is."""
    operation, fake = by_name[name], FakeRuntime()
    reply = asyncio.run(operation.run(validate(operation, body), fake))  # pyright: ignore[reportArgumentType]
    multiword = {field: to_camel(field) for field in operation.request.model_fields if field != to_camel(field)}
    spelling = "snake" if multiword.keys() & body.keys() else operation.casing
    spelling = "camel" if {*multiword.values()} & body.keys() and operation.mirrors else spelling
    return whole(realised(reply), spelling, "steer_completion" in name)


async def text_of(name: str, body: dict[str, Any]) -> str:
    pieces = await answer_pieces(by_name[name], body, FakeRuntime())  # pyright: ignore[reportArgumentType]
    return b"".join([piece async for piece in pieces]).decode()


@pytest.mark.parametrize("spelled", [lambda body: body, camel], ids=["snake", "camel"])
@pytest.mark.parametrize("name", [name for name in BODIES if name not in OPENAI])  # made anew, with a name and a moment
def test_text_and_dictionary_are_what_pydantic_dumps(name: str, spelled: Callable[[Any], Any]):
    body = spelled(BODIES[name])
    expected = said_of(name, body)
    assert ask(name, body) == expected
    assert json.loads(asyncio.run(text_of(name, body))) == expected


@pytest.mark.parametrize("name", [name for name in BODIES if by_name[name].stream])
def test_events_as_text_are_the_events(name: str):
    fake: Any = FakeRuntime()

    async def both() -> tuple[list[Any], list[Any]]:
        events = [event async for event in await answer_events(by_name[name], BODIES[name], fake)]
        texts = [json.loads(text) async for text in await answer_events_json(by_name[name], BODIES[name], fake)]
        return events, texts

    events, texts = asyncio.run(both())
    assert events == texts != []


# Validation


def test_bad_fields_are_named_with_their_problems():
    body = {**BODIES["steer_completion"], "temperature": -1, "nLogprobs": 11}
    del body["model"]
    with pytest.raises(InvalidBody) as caught:
        ask("steer_completion", body)
    assert (caught.value.status, caught.value.code) == (422, "invalid_body")
    for part in ("model: Field required", "temperature: Input should be greater than or equal to 0", "n_logprobs: "):
        assert part in caught.value.message
    assert {tuple(one["loc"]) for one in caught.value.detail} == {("model",), ("temperature",), ("n_logprobs",)}
    assert all(set(one) == {"type", "loc", "msg"} for one in caught.value.detail)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.detail) == (caught.value.message, caught.value.detail)


def test_large_values_are_not_echoed():
    secret = "x" * 10_000
    vector: list[Any] = [secret] * 1000
    with pytest.raises(InvalidBody) as caught:
        ask("activation_single", {"prompt": [secret], "model": secret, "vector": vector, "hook": {secret: 1}})
    assert len(caught.value.message) < 1000
    assert "xxx" not in caught.value.message + json.dumps(caught.value.detail)


@pytest.mark.parametrize("body", [None, [], "text", 1, TokenizeRequest(model="m", text="t")])
def test_a_body_must_be_an_object_of_its_operation(body: Any):
    with pytest.raises(InvalidBody, match="needs a JSON object"):
        validate(by_name["top_k"], body)


# Strict mode


@pytest.mark.parametrize("name", WIRE)
def test_strict_mode_refuses_other_models(name: str):
    runtime = FakeRuntime(strict_model=True)
    assert ask(name, {**BODIES[name], "model": "org/tiny"}, runtime)
    with pytest.raises(InvalidRequest, match="serves 'tiny', not 'other'"):
        ask(name, {**BODIES[name], "model": "other"}, runtime)
    assert ask(name, {**BODIES[name], "model": "other"}, FakeRuntime())
