"""Every operation, and the way from a JSON body to a JSON answer that all doors share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.activation import (
    ACTIVATION_ALL,
    ACTIVATION_ALL_BATCH,
    ACTIVATION_SINGLE,
    ACTIVATION_SINGLE_BATCH,
    ACTIVATION_SOURCE,
)
from neuronpedia_inference.operations.capture import CAPTURE
from neuronpedia_inference.operations.chat_template import APPLY_CHAT_TEMPLATE
from neuronpedia_inference.operations.contrast import CONTRAST
from neuronpedia_inference.operations.features import FEATURE, SEARCH
from neuronpedia_inference.operations.friendly import STEER
from neuronpedia_inference.operations.health import STEER_HEALTH
from neuronpedia_inference.operations.inside import ACTIVATION_ATTENTION, ACTIVATION_RAW
from neuronpedia_inference.operations.kept_vectors import PUT_VECTORS
from neuronpedia_inference.operations.lens import LENS_PROMPT
from neuronpedia_inference.operations.openai.chat import CHAT_COMPLETIONS
from neuronpedia_inference.operations.openai.completions import COMPLETIONS
from neuronpedia_inference.operations.openai.models import MODEL, MODELS
from neuronpedia_inference.operations.operation import Events, Operation
from neuronpedia_inference.operations.persona import PERSONA_MONITOR
from neuronpedia_inference.operations.reading import ACTIVATIONS, TOP_K
from neuronpedia_inference.operations.rendering import Spelling, json_pieces, plain_pieces
from neuronpedia_inference.operations.score import SCORE
from neuronpedia_inference.operations.steer import STEER_COMPLETION, STEER_COMPLETION_CHAT
from neuronpedia_inference.operations.sweep import SWEEP
from neuronpedia_inference.operations.tensors import apart, tensor_file
from neuronpedia_inference.operations.tokenize import TOKENIZE
from neuronpedia_inference.operations.top_k import ACTIVATION_TOPK_BY_TOKEN, ACTIVATION_TOPK_BY_TOKEN_BATCH
from neuronpedia_inference.operations.vectors import (
    UTIL_SAE_TOPK_BY_DECODER_COSSIM,
    UTIL_SAE_VECTOR,
    UTIL_SIMILARITY_MATRIX_PRED,
)
from neuronpedia_inference.pacing import paced, paced_pieces
from neuronpedia_inference.scheduler.stay import Stay
from neuronpedia_inference.schemas.common import Wire, lists_of_objects
from neuronpedia_inference.tensor_files import MEDIA_TYPE

if TYPE_CHECKING:
    from neuronpedia_inference.metrics import RequestCount
    from neuronpedia_inference.runtime import Runtime

__all__ = [
    "OPERATIONS",
    "InvalidBody",
    "Operation",
    "answer",
    "answer_events",
    "answer_events_json",
    "answer_pieces",
    "by_name",
    "validate",
    "validate_texts",
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
    UTIL_SIMILARITY_MATRIX_PRED,
    ACTIVATION_ATTENTION,
    ACTIVATION_RAW,
    APPLY_CHAT_TEMPLATE,
    LENS_PROMPT,
    STEER_HEALTH,
    PERSONA_MONITOR,
    ACTIVATIONS,
    TOP_K,
    STEER,
    SEARCH,
    FEATURE,
    CONTRAST,
    CAPTURE,
    PUT_VECTORS,
    SCORE,
    SWEEP,
    CHAT_COMPLETIONS,
    COMPLETIONS,
    MODELS,
    MODEL,
)
by_name: dict[str, Operation[Any]] = {operation.name: operation for operation in OPERATIONS}

Body = Mapping[str, Any] | Wire
Out = TypeVar("Out")
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


def validate_texts(operation: Operation[Any], fields: Mapping[str, str]) -> Wire:
    """The parts of a path and a query as the operation's request: numbers are read from texts. Raises InvalidBody."""
    try:
        return operation.request.model_validate_strings(dict(fields), strict=False)
    except ValidationError as exc:
        raise InvalidBody.of(exc) from None


async def validate_in_turns(operation: Operation[Any], body: object) -> Wire:
    """As `validate`, but the items of long lists one by one, so that others have their turns in between."""
    if not isinstance(body, Mapping):
        return validate(operation, body)
    return validate(operation, await paced(_with_items(operation, body)))


def _with_items(operation: Operation[Any], body: Mapping[str, Any]) -> Generator[None, None, dict[str, Any]]:
    """The body with objects in lists replaced by what they are read as, up to the first that does not fit."""
    read = dict(body)
    for name, (model, most) in lists_of_objects(operation.request).items():
        for key in {name, to_camel(name)} & read.keys():
            items = read[key]
            if isinstance(items, list) and len(items) <= most:
                read[key] = list(items)
                for place, item in enumerate(items):
                    try:
                        read[key][place] = model.model_validate(item)
                    except ValidationError:
                        break  # the whole says it, with its place
                    yield
    return read


async def answer(operation: Operation[Any], body: Body, runtime: Runtime) -> dict[str, Any]:
    """Validates, runs, renders and counts: the JSON-ready body that HTTP would send. Never streams.

    Raises InvalidBody (422) and every other InferenceError.
    """
    with runtime.metrics.request(operation.name), closing(Stay()) as stay, stay:
        request = await validate_in_turns(operation, body)
        if _is_of_tensors(operation, request):
            raise InvalidRequest("format: this answer is a dictionary, which cannot be safetensors. Leave it out.")
        return await _dictionary(operation, _spelling(operation, body), await operation.run(request, runtime))


async def answer_pieces(
    operation: Operation[Any], body: Body, runtime: Runtime, *, accepts_tensors: bool = False
) -> Events[Any, bytes]:
    """As `answer`, as the pieces of its JSON text, one if it is small, or of a file of tensors: `media_type` says so.

    accepts_tensors: whether it should be one where the body does not say. Close the iterator to stop.

    Raises every 4xx before it returns. The request ends, and is counted, with its last piece.
    """
    with ExitStack() as if_refused:
        count = if_refused.enter_context(runtime.metrics.request(operation.name))
        with Stay() as stay:
            request = await validate_in_turns(operation, body)
            spelling = _spelling(operation, body)
            if accepts_tensors and operation.has_tensors and getattr(request, "format", None) is None:
                request = request.model_copy(update={"format": "safetensors"})
            reply = await operation.run(request, runtime)
            is_file = _is_of_tensors(operation, request)
            file = await paced(tensor_file(*apart(reply), spelling)) if is_file else None
        if_refused.pop_all()
    if file is not None:
        counted = _Counted(paced_pieces(file), _itself, count, stay)
        counted.media_type, counted.n_bytes = MEDIA_TYPE, file.n_bytes
        return counted
    return _Counted(paced_pieces(json_pieces(reply, spelling, omit_null=operation.omits_null)), _itself, count, stay)


def _is_of_tensors(operation: Operation[Any], request: Wire) -> bool:
    return operation.has_tensors and getattr(request, "format", None) == "safetensors"


async def answer_events(operation: Operation[Any], body: Body, runtime: Runtime) -> Events[Any, dict[str, Any]]:
    """As `answer`, in cumulative events. Raises every 4xx before it returns; close the iterator to stop."""
    return await _events(operation, body, runtime, _dictionary)


async def answer_events_json(operation: Operation[Any], body: Body, runtime: Runtime) -> Events[Any, bytes]:
    """As `answer_events`, each event as its JSON text."""
    return await _events(operation, body, runtime, _text)


async def _events(
    operation: Operation[Any], body: Body, runtime: Runtime, render: Callable[..., Awaitable[Out]]
) -> Events[Any, Out]:
    with ExitStack() as if_refused:
        count = if_refused.enter_context(runtime.metrics.request(operation.name))
        if operation.stream is None:
            raise InvalidRequest(f"{operation.name} does not stream")
        with Stay() as stay:
            request = await validate_in_turns(operation, body)
            events = await operation.stream(request, runtime)
        if_refused.pop_all()
    return _Counted(events, partial(render, operation, _spelling(operation, body)), count, stay)


class _Counted(Events[Any, Any]):
    """Events of one request, which is counted, and gives back what it held, when they end, fail or are closed."""

    def __init__(
        self, source: AsyncIterator[Any], render: Callable[[Any], Awaitable[Any]], count: RequestCount, stay: Stay
    ) -> None:
        super().__init__(source, render)
        self._count = count
        self._stay = stay
        self._loop = asyncio.get_running_loop()
        self._is_inside = True

    async def __anext__(self) -> Any:
        with ExitStack() as at_the_end:
            at_the_end.callback(self._leave)
            at_the_end.push(self._count)
            with self._stay:
                event = await (await super().__anext__())
            at_the_end.pop_all()
            return event

    async def aclose(self) -> None:
        self._leave()
        await super().aclose()

    def __del__(self) -> None:
        """A caller who was stopped within the await that gives this has nothing to close.

        The garbage collector may come in the middle of anything, with any lock held: so the loop does it.
        """
        if self._is_inside:
            try:
                self._loop.call_soon_threadsafe(self._leave)
            except RuntimeError:  # it has closed
                self._leave()

    def _leave(self) -> None:
        """No effect on a request that has ended."""
        self._is_inside = False
        self._count.abandon()
        self._stay.close()


async def _itself(piece: bytes) -> bytes:
    return piece


async def _dictionary(operation: Operation[Any], spelling: Spelling, reply: Wire) -> dict[str, Any]:
    """Raises EngineFailed if a number is not finite."""
    return await paced(plain_pieces(reply, spelling, omit_null=operation.omits_null))


async def _text(operation: Operation[Any], spelling: Spelling, reply: Wire) -> bytes:
    """Raises EngineFailed if a number is not finite."""
    pieces = json_pieces(reply, spelling, omit_null=operation.omits_null)
    return b"".join([piece async for piece in paced_pieces(pieces)])


def _spelling(operation: Operation[Any], body: Body) -> Spelling:
    """The request's own where one of its fields has two words and is mirrored; else the operation's."""
    if not operation.mirrors:
        return operation.casing
    keys = body.model_fields_set if isinstance(body, Wire) else body.keys()
    names = [name for name in operation.request.model_fields if to_camel(name) != name]
    if any(to_camel(name) in keys for name in names):
        return "camel"
    if any(name in keys for name in names):
        return "snake"
    return operation.casing
