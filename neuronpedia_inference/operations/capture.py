"""capture: the vectors that pass at points of the model, under any steering, as JSON or as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neuronpedia_inference.domain import ChatMessage, Positions, Tokens
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.edits import checked_plan, selection_of, skips_special_tokens
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.tensors import Arrays, prefix_of
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.states import States
from neuronpedia_inference.reproducible import reproducibly
from neuronpedia_inference.schemas.capture import CaptureRequest, CaptureResponse, CaptureResult
from neuronpedia_inference.schemas.edits import Selection
from neuronpedia_inference.schemas.inside import MAX_TEXTS

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

SMALLER = 4
"""A number as JSON takes about so many times what it takes in a tensor, and so many fewer are answered."""


async def capture(request: CaptureRequest, rt: Runtime) -> CaptureResponse:
    """Raises UnknownPoint, LimitExceeded for more than one answer may have, and InvalidRequest for an empty text."""
    if request.model is not None:
        check_model(request.model, rt)
    points = {name: Point.parse(name) for name in request.points}
    width = sum(rt.width(point) for point in points.values())
    batch, is_listed = _batch(request, rt)
    places = [_places(request.positions, tokens, number) for number, tokens in enumerate(batch)]
    n_rows = len(batch) if request.positions == "mean" else sum(map(len, places))
    most = rt.settings.max_result_values * (SMALLER if request.format == "safetensors" else 1)
    if n_rows * width > most:
        raise LimitExceeded(
            f"{n_rows} positions of {width} numbers at {len(points)} points are {n_rows * width} numbers, the most in "
            f"one answer is {most} ({SMALLER} times MAX_RESULT_VALUES with `format: safetensors`). Read fewer points, "
            "send shorter texts, or raise MAX_RESULT_VALUES."
        )
    is_chat = not isinstance(request.prompt, str) and not is_listed
    skips = skips_special_tokens(request, is_chat=is_chat)
    plan = await checked_plan(request, rt, skip_special_tokens=skips)
    positions = places if isinstance(request.positions, Selection) else request.positions
    question = States(batch, list(points.values()), positions, n_rows * width, request.dtype)
    with reproducibly(request.reproducible):
        found = await rt.ask(question, plan)
    results = []
    for number, (tokens, states) in enumerate(zip(batch, found, strict=True)):
        arrays = {name: states[point] for name, point in points.items()}
        prefix = prefix_of(number, is_listed=is_listed)
        results.append(_result(tokens, places[number], Arrays(arrays, prefix=prefix)))
    return CaptureResponse.model_construct(positions=request.positions, dtype=request.dtype, results=results)


def _batch(request: CaptureRequest, rt: Runtime) -> tuple[list[Tokens], bool]:
    """The texts as tokens, and whether they came as a list."""
    if isinstance(request.prompt, str):
        return [_tokens(request.prompt, rt)], False
    texts = [one for one in request.prompt if isinstance(one, str)]
    if not request.prompt:
        raise InvalidRequest("prompt: at least one text is required")
    if not texts:
        chat = [ChatMessage(one.role, one.content) for one in request.prompt if not isinstance(one, str)]
        return [rt.render_chat(chat)[1]], False
    if len(texts) > MAX_TEXTS:
        raise LimitExceeded(f"prompt: {len(texts)} texts are too many, the most is {MAX_TEXTS}. Send fewer.")
    return [_tokens(text, rt) for text in texts], True


def _tokens(text: str, rt: Runtime) -> Tokens:
    if not text:
        raise InvalidRequest("prompt: the text is empty, so there is nothing to read. Send at least one character.")
    return rt.tokenize(text, "once")


def _places(positions: Positions | Selection, tokens: Tokens, number: int) -> list[int]:
    """Of a text's tokens those that are read. Raises InvalidRequest for a selection that is not of a prompt."""
    if not isinstance(positions, Selection):
        special = tokens.is_special if positions == "mean" else (False,) * len(tokens)
        counted = [place for place, is_special in enumerate(special) if not is_special]
        return counted[-1:] if positions == "last" else counted
    if positions.phase == "generated":
        raise InvalidRequest("positions.phase: nothing is generated here, so there is nothing to select of it")
    if positions.ramp is not None:
        raise InvalidRequest("positions.ramp: a vector is read or not; a ramp is for edits. Give `from` and `to`.")
    weights = selection_of(positions).weights(np.arange(len(tokens)), np.asarray(tokens.ids), len(tokens))
    chosen = np.flatnonzero(weights).tolist()
    if not chosen:
        raise InvalidRequest(f"positions: selects none of the {len(tokens)} tokens of text {number}. Choose others.")
    return chosen


def _result(tokens: Tokens, places: list[int], states: Arrays) -> CaptureResult:
    return CaptureResult.model_construct(
        tokens=list(tokens.strings),
        token_ids=list(tokens.ids),
        is_special=list(tokens.is_special),
        has_bos=tokens.has_bos,
        positions=places,
        states=states,
    )


CAPTURE = Operation(
    name="capture",
    path="/v1/capture",
    request=CaptureRequest,
    response=CaptureResponse,
    summary="The vectors that pass at points of the model, under any steering",
    run=capture,
    has_tensors=True,
)
