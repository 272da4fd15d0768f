"""The OpenAPI document, made from the operations."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, cast

from pydantic.json_schema import models_json_schema

from neuronpedia_inference import __version__
from neuronpedia_inference.operations import OPERATIONS, Operation
from neuronpedia_inference.operations.operation import IN_PATH
from neuronpedia_inference.schemas.common import Ours, Wire
from neuronpedia_inference.schemas.openai_answers import OpenAIError
from neuronpedia_inference.schemas.service import Capabilities, ErrorBody, Health, Ready
from neuronpedia_inference.schemas.vectors import PUT_VECTORS
from neuronpedia_inference.tensor_files import MEDIA_TYPE
from neuronpedia_inference.web.answers import Problem
from neuronpedia_inference.web.auth import HEADER
from neuronpedia_inference.web.dialects import DIALECTS
from neuronpedia_inference.web.explained import EXPLAINED, status_of
from neuronpedia_inference.web.words import openai_error, openai_status

TITLE = "Neuronpedia inference"
SECURITY, BEARER = "SimpleSecretAuth", "BearerAuth"
MEANINGS = {
    400: "The request cannot be honoured as asked",
    401: "Missing or wrong secret",
    404: "No such model, or no vector of this digest",
    403: "A web page that may not call, or a name that is not the server's",
    408: "The body did not come in time",
    409: "The server's state forbids it",
    413: "The body is too large",
    422: "The body is not JSON, or does not fit the schema",
    429: "It would have to wait, and was not to",
    431: "The headers are too large",
    500: "A fault of the server",
    503: "Loading, full or out of memory; see Retry-After",
}
START, NEURONPEDIA, OPENAI, SERVICE = "Start here", "Neuronpedia", "OpenAI", "Service"
GROUPS = {
    START: "Features by their labels, steering with its comparison: the routes that are this server's own.",
    NEURONPEDIA: "The wire of Neuronpedia and of its published client.",
    OPENAI: "The wire of OpenAI's clients.",
    SERVICE: "What the server says of itself.",
}
"""Parts of the reference, in its order."""
STREAMED = {
    "sse": "With `stream`: events `data: {json}`, each holding the whole answer so far.",
    "openai": "With `stream`: events `data: {json}`, each holding what is new, and `data: [DONE]` at the end.",
    "ndjson": "Unless `stream` is false: lines of JSON, each a part of the answer by its `kind`.",
}
ANYWHERE = (403, 431)
"""What every request may be answered, whatever it asks."""
WITHOUT_A_BODY = (400, 401, 422, 500, 503)
FAILURES = (*WITHOUT_A_BODY, 408, 413)
Refs = dict[Any, dict[str, Any]]


@cache
def document() -> dict[str, Any]:
    """The whole document. Callers share it and must not change it."""
    refs, definitions = _schemas()
    paths = {openapi_path(op): {op.method.lower(): _operation(op, refs)} for op in OPERATIONS}
    return {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": __version__},
        "tags": [{"name": name, "description": about} for name, about in GROUPS.items()],
        "paths": {**_service_paths(refs), **paths},
        "components": {
            "schemas": definitions["$defs"],
            "responses": {
                **{str(status): _failure(status, refs) for status in MEANINGS},
                **{f"openai-{status}": _openai_failure(status, refs) for status in MEANINGS if status != 422},
            },
            "securitySchemes": {
                SECURITY: {"type": "apiKey", "in": "header", "name": HEADER},
                BEARER: {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{SECURITY: []}, {BEARER: []}],
    }


def _schemas() -> tuple[Refs, dict[str, Any]]:
    """References by (model, mode), and what they refer to."""
    asked: list[Any] = [(op.request, "validation") for op in OPERATIONS if op.method != "GET"]
    given: list[Any] = [(op.response, "serialization") for op in OPERATIONS]
    service: list[Any] = [(model, "serialization") for model in (Capabilities, ErrorBody, Health, OpenAIError, Ready)]
    wanted = list(dict.fromkeys(asked + given + service))
    refs, definitions = models_json_schema(wanted, by_alias=False, ref_template="#/components/schemas/{model}")
    return cast("Refs", refs), definitions


def _operation(operation: Operation[Any], refs: Refs) -> dict[str, Any]:
    content = _json(refs[operation.response, "serialization"])
    if operation.stream is not None:
        content[DIALECTS[operation.dialect].media_type] = {
            "schema": {"type": "string", "description": STREAMED[operation.dialect]}
        }
    if operation.has_tensors:
        content[MEDIA_TYPE] = {"schema": {"type": "string", "format": "binary"}}
    return {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [group_of(operation)],
        **_asked(operation, refs),
        "responses": {"200": {"description": "The answer", "content": content}, **_failures_of(operation)},
    }


def group_of(operation: Operation[Any]) -> str:
    """The part of the reference that it stands in."""
    if operation.dialect == "openai":
        return OPENAI
    return START if issubclass(operation.request, Ours) else NEURONPEDIA


def _may_name_a_vector(operation: Operation[Any]) -> bool:
    return f"`{PUT_VECTORS}`" in json.dumps(operation.request.model_json_schema())


def _failures_of(operation: Operation[Any]) -> dict[str, Any]:
    """On OpenAI's routes in OpenAI's words, where what does not fit the schema is a 400."""
    codes = {*(WITHOUT_A_BODY if operation.method == "GET" else FAILURES)}
    if operation.dialect == "openai":
        return _failures(*({*codes, 404} - {422}), named="openai-")
    more = {404: _may_name_a_vector(operation), 429: operation.dialect == "ndjson"}
    return _failures(*codes, *(code for code, is_there in more.items() if is_there))


def openapi_path(operation: Operation[Any]) -> str:
    """The path with its fields in braces."""
    return IN_PATH.sub(r"{\1}", operation.path)


def _asked(operation: Operation[Any], refs: Refs) -> dict[str, Any]:
    """The body, or the parameters of a GET."""
    if operation.method != "GET":
        as_json = {"schema": refs[operation.request, "validation"], "examples": _examples(operation.request)}
        content: dict[str, Any] = {"application/json": as_json}
        if operation.from_tensors is not None:
            content[MEDIA_TYPE] = {"schema": {"type": "string", "format": "binary"}}
        return {"requestBody": {"required": True, "content": content}}
    schema = operation.request.model_json_schema(by_alias=False)
    example = schema["examples"][0]
    in_path = set(IN_PATH.findall(operation.path))
    parameters = [
        {
            "name": name,
            "in": "path" if name in in_path else "query",
            "required": name in schema.get("required", ()),
            "description": about.get("description", ""),
            "schema": {key: value for key, value in about.items() if key not in ("title", "description")},
            **({"example": example[name]} if name in example else {}),
        }
        for name, about in schema["properties"].items()
    ]
    return {"parameters": parameters}


def _examples(request: type[Wire]) -> dict[str, Any]:
    """Bodies that can be sent as they are."""
    bodies = request.model_json_schema(by_alias=False)["examples"]
    return {f"example {place}": {"value": body} for place, body in enumerate(bodies, 1)}


def _service_paths(refs: Refs) -> dict[str, Any]:
    def get(name: str, summary: str, model: Any, *codes: int) -> dict[str, Any]:
        answer = {"description": "The answer", "content": _json(refs[model, "serialization"])}
        about = {"operationId": name, "summary": summary, "tags": [SERVICE]}
        return {**about, "responses": {"200": answer, **_failures(*codes)}}

    refused = {
        "operationId": "initialize",
        "summary": "Refused: a running server keeps its model",
        "tags": [SERVICE],
        "responses": _failures(401, 409),
    }
    return {
        "/health": {"get": {**get("health", "The process lives", Health), "security": []}},
        "/ready": {"get": {**get("ready", "The model is loaded and serves", Ready, 503), "security": []}},
        "/v1/capabilities": {"get": get("capabilities", "Model, sources and limits", Capabilities, 401, 503)},
        "/metrics": {"get": _metrics(refs)},
        "/initialize": {"post": refused},
    }


def _metrics(refs: Refs) -> dict[str, Any]:
    text = {"schema": {"type": "string", "description": "Prometheus' text format"}}
    return {
        "operationId": "metrics",
        "summary": "Counters and gauges for Prometheus",
        "tags": [SERVICE],
        "responses": {
            "200": {"description": "The answer", "content": {"text/plain": text}},
            **_failures(401, 503),
        },
    }


def _failures(*codes: int, named: str = "") -> dict[str, Any]:
    return {str(code): {"$ref": f"#/components/responses/{named}{code}"} for code in sorted({*codes, *ANYWHERE})}


def _failure(status: int, refs: Refs) -> dict[str, Any]:
    """What an answer with this status looks like: an example for each of its codes."""
    examples = {
        code: {"summary": about.remedy, "value": about.body(code)}
        for code, about in EXPLAINED.items()
        if status_of(code) == status
    }
    content = {"schema": refs[ErrorBody, "serialization"], "examples": examples}
    return {"description": MEANINGS[status], "content": {"application/json": content}}


def _openai_failure(status: int, refs: Refs) -> dict[str, Any]:
    """As `_failure`, in OpenAI's words."""
    examples = {
        code: {"summary": about.remedy, "value": openai_error(Problem(status_of(code), code, about.example))}
        for code, about in EXPLAINED.items()
        if openai_status(status_of(code)) == status
    }
    content = {"schema": refs[OpenAIError, "serialization"], "examples": examples}
    return {"description": MEANINGS[status], "content": {"application/json": content}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
