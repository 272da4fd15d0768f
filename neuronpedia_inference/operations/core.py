"""Every operation, and the way from a JSON body to a JSON answer that all doors share."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.operations.activation import (
    ACTIVATION_ALL,
    ACTIVATION_ALL_BATCH,
    ACTIVATION_SINGLE,
    ACTIVATION_SINGLE_BATCH,
    ACTIVATION_SOURCE,
)
from neuronpedia_inference.operations.friendly import ACTIVATIONS, STEER, TOP_K
from neuronpedia_inference.operations.operation import Events, Operation
from neuronpedia_inference.operations.steer import STEER_COMPLETION, STEER_COMPLETION_CHAT
from neuronpedia_inference.operations.tokenize import TOKENIZE
from neuronpedia_inference.operations.top_k import ACTIVATION_TOPK_BY_TOKEN, ACTIVATION_TOPK_BY_TOKEN_BATCH
from neuronpedia_inference.operations.vectors import UTIL_SAE_TOPK_BY_DECODER_COSSIM, UTIL_SAE_VECTOR
from neuronpedia_inference.schemas.common import Wire

if TYPE_CHECKING:
    from neuronpedia_inference.metrics import RequestCount
    from neuronpedia_inference.runtime import Runtime

__all__ = [
    "OPERATIONS",
    "InvalidBody",
    "Operation",
    "answer",
    "answer_events",
    "by_name",
    "render",
    "validate",
]

OPERATIONS: tuple[Operation[Any], ...] = (
    ACTIVATION_SINGLE,
    ACTIVATION_SINGLE_BATCH,
    ACTIVATION_ALL,
    ACTIVATION_ALL_BATCH,
    ACTIVATION_TOPK_BY_TOKEN,
    ACTIVATION_TOPK_BY_TOKEN_BATCH,
    ACTIVATION_SOURCE,
    STEER_COMPLETION,
    STEER_COMPLETION_CHAT,
    TOKENIZE,
    UTIL_SAE_VECTOR,
    UTIL_SAE_TOPK_BY_DECODER_COSSIM,
    ACTIVATIONS,
    TOP_K,
    STEER,
)
by_name: dict[str, Operation[Any]] = {operation.name: operation for operation in OPERATIONS}

Body = Mapping[str, Any] | Wire
MOST_PROBLEMS = 8


class InvalidBody(InvalidRequest):
    """`InvalidBody(message, detail)`: the body does not have the request's shape.

    detail: every bad field as `{type, loc, msg}`; the values themselves stay out.
    """

    code = "invalid_body"
    status = 422

    def __str__(self) -> str:
        return self.message

    @property
    def detail(self) -> list[dict[str, Any]]:
        return list(self.args[1]) if len(self.args) > 1 else []

    @classmethod
    def of(cls, exc: ValidationError) -> InvalidBody:
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        detail = [{"type": e["type"], "loc": list(e["loc"]), "msg": e["msg"]} for e in errors[:MOST_PROBLEMS]]
        problems = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in detail]
        if len(errors) > MOST_PROBLEMS:
            problems.append(f"and {len(errors) - MOST_PROBLEMS} more")
        return cls("Invalid request body. " + "; ".join(problems), detail)


def validate(operation: Operation[Any], body: object) -> Wire:
    """The body as the operation's request. Raises InvalidBody (422)."""
    if isinstance(body, Wire) and isinstance(body, operation.request):
        return body
    if isinstance(body, Wire) or not isinstance(body, Mapping):
        raise InvalidBody(f"Invalid request body: {operation.name} needs a JSON object")
    try:
        return operation.request.model_validate(dict(body))
    except ValidationError as exc:
        raise InvalidBody.of(exc) from None


async def answer(operation: Operation[Any], body: Body, runtime: Runtime) -> dict[str, Any]:
    """Validates, runs, renders and counts: the JSON-ready body that HTTP would send. Never streams.

    Raises InvalidBody (422) and every other InferenceError.
    """
    with runtime.metrics.request(operation.name):
        request = validate(operation, body)
        return render(operation, _keys(body), await operation.run(request, runtime))


async def answer_events(operation: Operation[Any], body: Body, runtime: Runtime) -> Events[Any, dict[str, Any]]:
    """As `answer`, in cumulative events. Raises every 4xx before it returns; close the iterator to stop."""
    with ExitStack() as if_refused:
        count = if_refused.enter_context(runtime.metrics.request(operation.name))
        if operation.stream is None:
            raise InvalidRequest(f"{operation.name} does not stream")
        request = validate(operation, body)
        keys = _keys(body)
        events = await operation.stream(request, runtime)
        if_refused.pop_all()
    return _CountedEvents(events, lambda event: render(operation, keys, event), count)


class _CountedEvents(Events[Any, dict[str, Any]]):
    """Events of one request, which is counted when they end, fail or are closed."""

    def __init__(self, source: AsyncIterator[Any], turn: Callable[[Any], dict[str, Any]], count: RequestCount) -> None:
        super().__init__(source, turn)
        self._count = count

    async def __anext__(self) -> dict[str, Any]:
        with ExitStack() as at_the_end:
            at_the_end.push(self._count)
            event = await super().__anext__()
            at_the_end.pop_all()
            return event

    async def aclose(self) -> None:
        self._count.abandon()
        await super().aclose()


def render(operation: Operation[Any], request_keys: Iterable[str], response: Wire) -> dict[str, Any]:
    """The response as a JSON-ready dictionary, spelled for this caller.

    request_keys: the top-level keys of the request body. Raises EngineFailed if a number is not finite.
    """
    casing = _casing(operation, request_keys)
    body = _dump(operation, response, camel=casing == "camel")
    if casing == "both":
        body = _merge(body, _dump(operation, response, camel=True))
    if casing == "camel" and operation.stream is not None:
        _respell_top_logprobs(body)
    if not _is_finite(body):
        raise EngineFailed("The model produced a number that is not finite, so there is no answer")
    return body


def _keys(body: Body) -> Iterable[str]:
    return body.model_fields_set if isinstance(body, Wire) else body.keys()


def _casing(operation: Operation[Any], request_keys: Iterable[str]) -> Literal["snake", "camel", "both"]:
    """The request's own spelling where one of its fields has two words; else the operation's."""
    keys = set(request_keys)
    names = [name for name in operation.request.model_fields if to_camel(name) != name]
    if any(to_camel(name) in keys for name in names):
        return "camel"
    if any(name in keys for name in names):
        return "snake"
    return operation.casing


def _dump(operation: Operation[Any], response: Wire, *, camel: bool) -> dict[str, Any]:
    return response.model_dump(mode="json", by_alias=camel, exclude_none=operation.omits_null)


def _merge(snake: Any, camel: Any) -> Any:
    """Two dumps of one model as one: every key in both spellings."""
    if isinstance(snake, dict):
        merged = {}
        for (snake_key, value), (camel_key, twin) in zip(snake.items(), camel.items(), strict=True):
            merged[snake_key] = merged[camel_key] = _merge(value, twin)
        return merged
    if isinstance(snake, list) and snake and isinstance(snake[0], dict):
        return [_merge(value, twin) for value, twin in zip(snake, camel, strict=True)]
    return snake


def _respell_top_logprobs(body: Any) -> None:
    """Adds `top_logprobs` beside `topLogprobs`: the web application reads that one key in snake_case."""
    if isinstance(body, dict):
        if "topLogprobs" in body:
            body["top_logprobs"] = body["topLogprobs"]
            return
        for value in body.values():
            _respell_top_logprobs(value)
    elif isinstance(body, list) and body and isinstance(body[0], dict):
        for value in body:
            _respell_top_logprobs(value)


def _is_finite(value: Any) -> bool:
    """Whether a JSON tree holds neither NaN nor infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        if value and isinstance(value[0], float):
            return all(map(math.isfinite, value))
        return all(map(_is_finite, value))
    return True
