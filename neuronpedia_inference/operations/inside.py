"""activation/raw and activation/attention: what passes inside the model, without any SAE (contract 4.2, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.operations.tensors import Columns, prefix_of
from neuronpedia_inference.points import RESID_POST, Point
from neuronpedia_inference.questions.states import HeadPattern, States
from neuronpedia_inference.schemas.inside import (
    ActivationAttentionRequest,
    ActivationAttentionResponse,
    ActivationRawRequest,
    ActivationRawResponse,
    RawActivation,
    RawResult,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

DECIMALS = 4


async def attention(request: ActivationAttentionRequest, rt: Runtime) -> ActivationAttentionResponse:
    """Raises InvalidRequest for a layer or head out of range, UnknownPoint for a layer without a pattern."""
    check_model(request.model, rt)
    for name, value, n in (("layer", request.layer, rt.model.n_layers), ("head", request.head, rt.model.n_heads)):
        if not 0 <= value < n:
            raise InvalidRequest(f"Invalid {name}: {value}. Must be in [0, {n}).")
    tokens = rt.tokenize(request.prompt, "once")
    found = await rt.ask(HeadPattern(tokens, request.layer, request.head))
    n = len(tokens)
    is_shown = n > 1  # a token by itself has nowhere else to look
    shown = slice(0, len(found.weights) if is_shown else 0)
    queries, keys, weights = found.queries[shown], found.keys[shown], found.weights[shown]
    indices, rounded = (queries * n + keys).tolist(), _rounded(weights)
    return ActivationAttentionResponse.model_construct(
        seq_len=n,
        attention_indices=Columns(len(indices), indices.__getitem__, {"queries": queries, "keys": keys}),
        attention_values=Columns(len(rounded), rounded.__getitem__, {"weights": weights}),
        max_activation=round(found.largest, DECIMALS),
        tokens=list(tokens.strings),
    )


async def raw(request: ActivationRawRequest, rt: Runtime) -> ActivationRawResponse:
    """Raises InvalidRequest for layers out of range, LimitExceeded for more numbers than one answer may have."""
    if request.model is not None:
        check_model(request.model, rt)
    if not request.prompts:
        raise InvalidRequest("At least one prompt is required")
    layers = _layers(request.layers, rt.model.n_layers)
    batch = [rt.tokenize(prompt, "once") for prompt in request.prompts]
    n_numbers = len(batch) * len(layers) * rt.model.d_model
    most = rt.settings.max_result_values
    if n_numbers > most:
        raise LimitExceeded(
            f"{len(layers)} layers of {len(batch)} prompts are {n_numbers} numbers, the most in one answer is {most}. "
            "Ask for fewer, or raise MAX_RESULT_VALUES."
        )
    points = [Point(layer, RESID_POST) for layer in layers]
    found = await rt.ask(States(batch, points, "last", n_numbers))
    is_short = rt.model.dtype != "float32"

    def by_point(place: int) -> dict[str, Numbers]:
        prefix = prefix_of(place, is_listed=True)
        return {prefix + point.name: found[place][point] for point in points}

    def result(place: int) -> RawResult:
        tokens, states = batch[place], found[place]

        def activation(number: int) -> RawActivation:
            values = states[points[number]]
            rows = [_rounded(row) if is_short else row.tolist() for row in values]
            return RawActivation(layer=layers[number], token_indices=[len(tokens) - 1], values=rows)

        def bare(number: int) -> RawActivation:
            return RawActivation(layer=layers[number], token_indices=[len(tokens) - 1], values=[])

        return RawResult.model_construct(
            token_strings=list(tokens.strings),
            token_ids=list(tokens.ids),
            activations=Columns(len(layers), activation, by_point(place), bare),
        )

    return ActivationRawResponse.model_construct(
        hook_point=request.hook_point,
        type=request.type,
        dtype=rt.model.dtype,
        device=rt.model.device,
        results=Rows(len(batch), result),
    )


def _layers(asked: Sequence[int] | None, n_layers: int) -> list[int]:
    """Each once, ascending; all if none is named. Raises InvalidRequest for those that there are not."""
    if not asked:
        return list(range(n_layers))
    unknown = [layer for layer in asked if not 0 <= layer < n_layers]
    if unknown:
        named = ", ".join(map(str, unknown[:12])) + (f" and {len(unknown) - 12} more" if len(unknown) > 12 else "")
        raise InvalidRequest(f"layers: {named} out of range, the model has {n_layers} layers (0 to {n_layers - 1})")
    return sorted(set(asked))


def _rounded(values: Numbers) -> list[float]:
    return np.round(values.astype(np.float64), DECIMALS).tolist()


ACTIVATION_ATTENTION = Operation(
    name="activation_attention",
    path="/v1/activation/attention",
    request=ActivationAttentionRequest,
    response=ActivationAttentionResponse,
    summary="Where one attention head looks",
    run=attention,
    casing="camel",
    has_tensors=True,
)
ACTIVATION_RAW = Operation(
    name="activation_raw",
    path="/v1/activation/raw",
    request=ActivationRawRequest,
    response=ActivationRawResponse,
    summary="The residual stream behind layers, at each prompt's last token",
    run=raw,
    casing="camel",
    has_tensors=True,
)
