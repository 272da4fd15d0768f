"""Everything that can be asked wrongly: its status, its code, and a sentence that helps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import pytest
from served import MODEL, SOURCE, TEXT, WIDTH, Serve, Wrapped, running, small_settings

from neuronpedia_inference.runtime import Runtime

VECTOR = [0.1] * WIDTH
HOOK = "blocks.15.hook_resid_post"
LONG = "word " * 200
SINGLE = {"prompt": TEXT, "model": MODEL, "source": SOURCE, "index": "5"}
SINGLE_BATCH = {"prompts": [TEXT], "model": MODEL, "source": SOURCE, "index": "5"}
RANKED = {
    "model": MODEL,
    "source_set": "res-4k",
    "selected_sources": [],
    "sort_by_token_indexes": [],
    "ignore_bos": True,
    "num_results": 3,
}
ALL = {"prompt": TEXT, **RANKED}
ALL_BATCH = {"prompts": [TEXT], **RANKED}
TOPK = {"prompt": TEXT, "model": MODEL, "source": SOURCE, "top_k": 2, "ignore_bos": True}
TOPK_BATCH = {"prompts": [TEXT], "model": MODEL, "source": SOURCE, "top_k": 2, "ignore_bos": True}
ACTIVE = {"prompts": [TEXT], "model": MODEL, "source": SOURCE}
SAE_VECTOR = {"model": MODEL, "source": SOURCE, "index": 5}
COSSIM = {"model": MODEL, "source": SOURCE, "num_results": 3, "vector": VECTOR}
TOKENIZE = {"model": MODEL, "text": TEXT}
NP_FEATURE = {"model": MODEL, "source": SOURCE, "index": 1}
FEATURE = {"model": MODEL, "source": SOURCE, "index": 5, "strength": 10}
OUR_FEATURE = {"source": SOURCE, "index": 5, "strength": 10}
BY_VECTOR = {"steering_vector": VECTOR, "strength": 10, "hook": HOOK}
STEER = {
    "prompt": "I think",
    "model": MODEL,
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED"],
    "features": [FEATURE],
    "n_completion_tokens": 2,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 16,
}
CHAT = {**STEER, "prompt": [{"role": "user", "content": "Hi"}], "steer_special_tokens": False}

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("/v1/activation/single", SINGLE),
    "single-batch": ("/v1/activation/single-batch", SINGLE_BATCH),
    "all": ("/v1/activation/all", ALL),
    "all-batch": ("/v1/activation/all-batch", ALL_BATCH),
    "topk": ("/v1/activation/topk-by-token", TOPK),
    "topk-batch": ("/v1/activation/topk-by-token-batch", TOPK_BATCH),
    "source": ("/v1/activation/source", ACTIVE),
    "sae-vector": ("/v1/util/sae-vector", SAE_VECTOR),
    "cossim": ("/v1/util/sae-topk-by-decoder-cossim", COSSIM),
    "tokenize": ("/v1/tokenize", TOKENIZE),
    "steer": ("/v1/steer/completion", STEER),
    "chat": ("/v1/steer/completion-chat", CHAT),
    "activations": ("/v1/activations", {"prompt": TEXT}),
    "top_k": ("/v1/top-k", {"prompt": TEXT, "source": SOURCE}),
    "friendly-steer": ("/v1/steer", {"prompt": "I", "features": [OUR_FEATURE], "max_new_tokens": 2}),
}
LEFT_OUT = Enum("Field", "LEFT_OUT").LEFT_OUT


@dataclass(frozen=True)
class Row:
    """One wrong request: a good body with some fields changed, and what must come back."""

    route: str
    status: int
    code: str
    changes: dict[str, Any]
    says: tuple[str, ...] = ()
    id: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        changed = ",".join(f"{key}={str(value)[:24]}" for key, value in self.changes.items())
        return f"{self.route}: {self.id or changed}"


def unknown(route: str, name: str, **changes: Any) -> Row:
    return Row(route, 400, "unknown_source", changes or {"source": name}, ("Unknown source",))


def too_long(route: str, **changes: Any) -> Row:
    return Row(route, 400, "limit_exceeded", changes, ("Text too long", "max is"), id="too long")


SINGLE_SOURCE_ROUTES = ("single", "single-batch", "topk", "topk-batch", "source", "sae-vector", "cossim", "top_k")

SCHEMA_ROWS = [
    Row("single", 422, "invalid_body", {"prompt": LEFT_OUT}, ("prompt", "required")),
    Row("single", 422, "invalid_body", {"prompt": 5}),
    Row("single", 422, "invalid_body", {"index": 5}),
    Row("sae-vector", 422, "invalid_body", {"index": "5"}),
    Row("sae-vector", 422, "invalid_body", {"index": 5.0}),
    Row("all", 422, "invalid_body", {"ignore_bos": "true"}),
    Row("all", 422, "invalid_body", {"num_results": -1}),
    Row("topk", 422, "invalid_body", {"top_k": 0}),
    Row("steer", 422, "invalid_body", {"steer_method": "MULTIPLY"}),
    Row("steer", 422, "invalid_body", {"types": []}),
    Row("steer", 422, "invalid_body", {"types": ["OTHER"]}),
    Row("steer", 422, "invalid_body", {"n_logprobs": 11}),
    Row("steer", 422, "invalid_body", {"n_completion_tokens": 0}),
    Row("steer", 422, "invalid_body", {"temperature": -0.1}),
    Row("steer", 422, "invalid_body", {"strength_multiplier": True}),
    Row("chat", 422, "invalid_body", {"prompt": "not messages"}),
    Row("single", 422, "invalid_body", {"vector": ["0.1"] * WIDTH}),
    Row("friendly-steer", 422, "invalid_body", {"max_new_tokens": 0}),
]

PAIR_ROWS = [
    Row("single", 400, "invalid_request", {"source": LEFT_OUT, "index": LEFT_OUT}, ("exactly one",)),
    Row("single", 400, "invalid_request", {"vector": VECTOR, "hook": HOOK}, ("exactly one",)),
    Row("single-batch", 400, "invalid_request", {"index": LEFT_OUT}, ("exactly one",)),
    Row("cossim", 400, "invalid_request", {"vector": LEFT_OUT}, ("exactly one",)),
    Row(
        "cossim", 400, "invalid_request", {"feature": {"model": MODEL, "source": SOURCE, "index": 1}}, ("exactly one",)
    ),
    Row("steer", 400, "invalid_request", {"features": LEFT_OUT}, ("exactly one",)),
    Row("steer", 400, "invalid_request", {"vectors": [BY_VECTOR]}, ("exactly one",)),
    Row("chat", 400, "invalid_request", {"features": LEFT_OUT}, ("exactly one",)),
]

SOURCE_ROWS = [
    *(unknown(route, "99-res-4k") for route in SINGLE_SOURCE_ROUTES),
    *(unknown(route, "fake-source") for route in SINGLE_SOURCE_ROUTES),
    unknown("single", "30"),
    unknown("steer", "", features=[FEATURE | {"source": "99-res-4k"}]),
    unknown("steer", "", features=[FEATURE | {"source": "fake-source"}]),
    unknown("chat", "", features=[FEATURE | {"source": "99-res-4k"}]),
    unknown("friendly-steer", "", features=[OUR_FEATURE | {"source": "99-res-4k"}]),
    unknown("all", "", selected_sources=["99-res-4k"]),
    unknown("all-batch", "", selected_sources=["99-res-4k"]),
    Row("all", 400, "unknown_source", {"source_set": "res-jb"}, ("source set", "res-4k")),
    Row("all-batch", 400, "unknown_source", {"source_set": "res-jb"}, ("source set", "res-4k")),
    Row("all", 400, "unknown_source", {"selected_sources": ["3"]}, ("res-4k",), id="source of another set"),
]

INDEX_ROWS = [
    *(
        Row(route, 400, "invalid_request", {"index": index}, says)
        for route in ("single", "single-batch")
        for index, says in (("five", ()), ("5.0", ()), ("", ()), ("-1", ()), ("4096", ("4096",)), ("9" * 400, ()))
    ),
    Row("sae-vector", 400, "invalid_request", {"index": 4096}, ("4096",)),
    Row("sae-vector", 400, "invalid_request", {"index": -1}),
    Row("activations", 400, "invalid_request", {"index": 4096, "source": SOURCE}, ("4096",)),
    *(
        Row(
            "cossim",
            400,
            "invalid_request",
            {"vector": LEFT_OUT, "feature": NP_FEATURE | {"index": index}},
            id=f"feature {index}",
        )
        for index in (4096, -1)
    ),
    *(
        Row(
            route,
            400,
            "invalid_request",
            {"features": [(OUR_FEATURE if route == "friendly-steer" else FEATURE) | {"index": index}]},
            id=f"feature {index}",
        )
        for route in ("steer", "chat", "friendly-steer")
        for index in (4096, -1, 10**30)
    ),
]

VECTOR_ROWS = [
    *(
        Row(route, 400, "invalid_request", changes, ("576",), id="vector of the wrong width")
        for route, changes in (
            ("single", {"source": LEFT_OUT, "index": LEFT_OUT, "hook": HOOK, "vector": [1.0] * 5}),
            ("single-batch", {"source": LEFT_OUT, "index": LEFT_OUT, "hook": HOOK, "vector": []}),
            ("cossim", {"vector": [1.0] * 577}),
            ("steer", {"features": LEFT_OUT, "vectors": [BY_VECTOR | {"steering_vector": [1.0]}]}),
            (
                "steer",
                {"features": LEFT_OUT, "vectors": [BY_VECTOR | {"steering_vector": [1.0]}], "types": ["DEFAULT"]},
            ),
        )
    ),
    *(
        Row("single", 400, "unknown_hook", {"source": LEFT_OUT, "index": LEFT_OUT, "vector": VECTOR, "hook": hook})
        for hook in ("blocks.99.hook_resid_post", "nonsense", "", "blocks.1.hook_nonsense", "blocks.-1.hook_resid_post")
    ),
    *(
        Row("steer", 400, "unknown_hook", {"features": LEFT_OUT, "vectors": [BY_VECTOR | {"hook": hook}]}, id=hook)
        for hook in ("blocks.30.hook_resid_post", "hook_embed", "blocks.3.mlp.hook_post", "blocks.3.attn.hook_pattern")
    ),
    *(
        Row(
            "steer",
            400,
            "invalid_request",
            {"features": LEFT_OUT, "vectors": [BY_VECTOR | {"steering_vector": [0.0] * WIDTH}], **how},
            id=f"zero vector {how}",
        )
        for how in (
            {"steer_method": "ORTHOGONAL_DECOMP"},
            {"steer_method": "PROJECTION_CAP"},
            {"normalize_steering": True},
        )
    ),
]

LIMIT_ROWS = [
    *(too_long(route, prompt=LONG) for route in ("single", "all", "topk", "steer", "activations", "top_k")),
    *(too_long(route, prompts=[LONG]) for route in ("single-batch", "all-batch", "topk-batch", "source")),
    too_long("tokenize", text=LONG),
    too_long("source", prompts=["word " * 30, "x"]),
    too_long("single", source=LEFT_OUT, index=LEFT_OUT, vector=VECTOR, hook=HOOK, prompt=LONG),
    Row("chat", 400, "limit_exceeded", {"prompt": [{"role": "user", "content": LONG}]}, ("too long",), id="too long"),
    Row("steer", 400, "limit_exceeded", {"n_completion_tokens": 5000}, ("No room to generate",)),
    Row("chat", 400, "limit_exceeded", {"n_completion_tokens": 5000}, ("No room to generate",)),
    *(
        Row(route, 400, "invalid_request", {"prompts": []}, ("At least one prompt",))
        for route in ("single-batch", "all-batch", "topk-batch", "source")
    ),
    *(
        Row(route, 400, "limit_exceeded", {"prompts": ["x"] * 5}, ("Batch size 5", "4"))
        for route in ("single-batch", "all-batch", "topk-batch", "source")
    ),
    Row("all", 400, "invalid_request", {"sort_by_token_indexes": [99]}, ("99",)),
    Row("all", 400, "invalid_request", {"sort_by_token_indexes": [-1]}, ("-1",)),
    Row("all-batch", 400, "invalid_request", {"sort_by_token_indexes": [99]}, ("99",)),
    Row("single", 400, "invalid_request", {"prompt": ""}, ("mpty",)),
    Row("single-batch", 400, "invalid_request", {"prompts": ["x", ""]}, ("mpty",)),
]

ROWS = [*SCHEMA_ROWS, *PAIR_ROWS, *SOURCE_ROWS, *INDEX_ROWS, *VECTOR_ROWS, *LIMIT_ROWS]


def body_of(row: Row) -> dict[str, Any]:
    body = {**PATHS[row.route][1], **row.changes}
    return {key: value for key, value in body.items() if value is not LEFT_OUT}


def check(answer: httpx.Response, status: int, code: str) -> str:
    """The error body is as promised, and shows nothing of the inside. Returns its sentence."""
    body = answer.json()
    assert (answer.status_code, body.get("code")) == (status, code), body
    assert isinstance(body["error"], str)
    assert body["error"]
    assert body["request_id"] == answer.headers["x-request-id"]
    for inside in ("Traceback", "Error(", "Exception", ".py", "/neuronpedia_inference"):
        assert inside not in answer.text
    return body["error"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_wrong_request_is_refused(http: httpx.Client, row: Row) -> None:
    answer = http.post(PATHS[row.route][0], json=body_of(row))
    said = check(answer, row.status, row.code)
    for words in row.says:
        assert words in said, said
    if row.status == 422:
        detail = answer.json()["detail"]
        assert detail
        assert all({"type", "loc", "msg"} <= set(entry) for entry in detail)
        assert all(entry["loc"][0] == "body" for entry in detail)


@pytest.mark.parametrize("route", sorted(PATHS))
def test_the_unchanged_bodies_are_fine(http: httpx.Client, route: str) -> None:
    path, body = PATHS[route]
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"{", "json_invalid", "not valid JSON"),
        (b"", "json_invalid", "not valid JSON"),
        (b'{"prompt": NaN}', "json_invalid", "not valid JSON"),
        (b"\xff\xfe", "json_invalid", "not valid JSON"),
        (b'{"text": "\\ud800"}', "json_invalid", "not valid JSON"),
        (b"[" * 10_000, "json_invalid", "not valid JSON"),
        (b"9" * 100_000, "json_invalid", "not valid JSON"),
        (b"[]", "dict_type", "must be a JSON object"),
        (b'"text"', "dict_type", "must be a JSON object"),
        (b"3", "dict_type", "must be a JSON object"),
        (b"null", "dict_type", "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_object(http: httpx.Client, content: bytes, kind: str, says: str) -> None:
    answer = http.post("/v1/tokenize", content=content, headers={"Content-Type": "application/json"})
    assert says in check(answer, 422, "invalid_body")
    assert answer.json()["detail"][0]["type"] == kind


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/*"])
def test_another_content_type(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = http.post("/v1/tokenize", content=json.dumps(TOKENIZE).encode(), headers=headers)
    assert "application/json" in check(answer, 422, "invalid_body")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"])
def test_every_spelling_of_json(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/tokenize", content=json.dumps(TOKENIZE).encode(), headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("text", ["\0", "a\0b", "x" * 1_000_000, "\u200b" * 1_000_000, "é" * 300_000])
@pytest.mark.parametrize("route", ["tokenize", "single", "steer", "chat", "activations"])
def test_texts_that_are_no_texts(http: httpx.Client, route: str, text: str) -> None:
    path, body = PATHS[route]
    message: dict[str, Any] = {"chat": {"prompt": [{"role": "user", "content": text}]}, "tokenize": {"text": text}}
    answer = http.post(path, json={**body, **message.get(route, {"prompt": text})})
    assert 400 <= answer.status_code < 500
    assert len(answer.text) < 5000
    check(answer, answer.status_code, answer.json()["code"])


@pytest.mark.parametrize("field", ["source", "model", "hook"])
def test_a_long_name_is_not_echoed(http: httpx.Client, field: str) -> None:
    answer = http.post("/v1/activation/single", json={**SINGLE, field: "x" * 1_000_000})
    assert answer.status_code == 422
    assert len(answer.text) < 5000


def test_a_wrong_model_is_served_unless_strict(http: httpx.Client, runtime: Runtime, serve: Serve) -> None:
    wrong = {**TOKENIZE, "model": "gpt2-small"}
    assert http.post("/v1/tokenize", json=wrong).status_code == 200
    strict = small_settings(strict_model=True)
    with serve(strict, lambda: Wrapped(runtime, settings=strict)).client() as client:
        assert "gpt2-small" in check(client.post("/v1/tokenize", json=wrong), 400, "invalid_request")
        assert client.post("/v1/tokenize", json=TOKENIZE).status_code == 200


@pytest.mark.parametrize("types", [["DEFAULT", "STEERED"], ["DEFAULT"]])
def test_default_may_come_first(http: httpx.Client, types: list[str]) -> None:
    for route in ("steer", "chat"):
        path, body = PATHS[route]
        answer = http.post(path, json={**body, "types": types})
        assert answer.status_code == 200
        assert [output["type"] for output in answer.json()["outputs"]] == types


@pytest.mark.parametrize("count", [49, 10**9])
def test_too_many_neighbours_are_cut_to_what_exists(http: httpx.Client, count: int) -> None:
    nearest = http.post("/v1/util/sae-topk-by-decoder-cossim", json={**COSSIM, "num_results": count})
    assert len(nearest.json()["topk_decoder_cossim_features"]) == min(count, 128)


def test_top_k_is_cut_to_the_features_there_are(runtime: Runtime, serve: Serve) -> None:
    wide = small_settings(max_top_k=5000)
    with serve(wide, lambda: Wrapped(runtime, settings=wide)).client() as http:
        answer = http.post("/v1/activation/topk-by-token", json={**TOPK, "prompt": "Hi", "top_k": 5000})
        assert answer.status_code == 200
        assert len(answer.json()["results"][0]["top_features"]) == 4096


def test_too_much_that_fires_is_counted_and_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    few = runtime.settings.model_copy(update={"max_result_values": 10})
    monkeypatch.setattr(runtime, "settings", few)
    with running(few, lambda: runtime) as served, served.client() as http:
        error = check(http.post("/v1/activation/source", json=ACTIVE), 400, "limit_exceeded")
    assert re.search(r"\b\d{2,} activations of 15-res-4k are not zero, the most in one answer is 10\b", error)
    assert "MAX_RESULT_VALUES" in error


@pytest.mark.parametrize(
    "path",
    [
        "/v1/lens",
        "/v1/tokenize/",
        "/nothing",
    ],
)
def test_an_unknown_path(http: httpx.Client, path: str) -> None:
    check(http.post(path, json={}), 404, "not_found")


def test_a_wrong_method(http: httpx.Client) -> None:
    answer = http.get("/v1/tokenize")
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    check(http.post("/health"), 405, "method_not_allowed")


def test_initialize_is_refused(http: httpx.Client) -> None:
    assert "restart it" in check(http.post("/initialize?custom_hf_model_id=x/y"), 409, "conflict")


def test_more_results_than_the_server_gives_are_cut_or_refused_with_the_bound(http: httpx.Client) -> None:
    most = small_settings().max_results
    for wanted in (most, most + 1, 10**9):
        answer = http.post("/v1/activation/all", json={**ALL, "num_results": wanted})
        assert len(answer.json()["activations"]) == most
    refused = http.post("/v1/activations", json={"prompt": TEXT, "num_results": most + 1})
    assert refused.status_code == 400
    assert refused.json()["code"] == "limit_exceeded"
    assert f"{most + 1}, the most is {most}" in refused.json()["error"]


def test_a_vector_whose_products_overflow_is_the_caller_s_mistake(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "model": MODEL, "hook": HOOK, "vector": [1e38] * WIDTH}
    refused = http.post("/v1/activation/single", json=body)
    assert refused.status_code == 400
    assert "too large" in refused.json()["error"]


def test_steers_are_bounded_in_number(http: httpx.Client) -> None:
    refused = http.post("/v1/steer/completion", json={**STEER, "features": [FEATURE] * 513})
    assert refused.status_code == 400
    assert "features: 513 items are too many, the most is 512" in refused.json()["error"]


@pytest.mark.parametrize(("route", "field"), [("all", "selected_sources"), ("steer", "features")])
def test_a_list_is_judged_by_its_first_bad_item(http: httpx.Client, route: str, field: str) -> None:
    """Judging millions of them would keep every other caller waiting."""
    path, body = PATHS[route]
    refused = http.post(path, json={**body, field: [{}] * 500})
    assert refused.status_code == 422
    assert {problem["loc"][2] for problem in refused.json()["detail"]} == {0}


@pytest.mark.parametrize("opened", ["[", "{", '["x",'])
def test_a_body_of_too_many_objects_and_lists_is_refused(http: httpx.Client, opened: str) -> None:
    raw = '{"prompt": ' + opened * 20_001
    answer = http.post("/v1/steer/completion", content=raw, headers={"Content-Type": "application/json"})
    assert "more than 20000 objects and lists" in check(answer, 413, "body_too_large")


def test_a_large_body_is_judged_like_a_small_one(http: httpx.Client) -> None:
    """Read in slices, because it has more than 64 KiB."""
    fits = {**SINGLE, "source": None, "index": None, "vector": VECTOR, "hook": HOOK, "padding": [0.125] * 20_000}
    assert http.post("/v1/activation/single", json=fits).status_code == 200
    ignored = {**fits, "padding": [[]] * 19_000}
    assert http.post("/v1/activation/single", json=ignored).status_code == 200
    for name, value in (("vector", ["x"] * 30_000), ("prompt", 7)):
        error = check(http.post("/v1/activation/single", json={**fits, name: value}), 422, "invalid_body")
        assert name in error
    lone = json.dumps({**fits, "prompt": "\ud800"})
    headers = {"Content-Type": "application/json"}
    error = check(http.post("/v1/activation/single", content=lone, headers=headers), 422, "invalid_body")
    assert "surrogate" in error
