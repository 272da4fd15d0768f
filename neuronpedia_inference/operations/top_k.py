"""activation/topk-by-token and its batch form. One prompt is a batch of one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Tokens, TopFeatures
from neuronpedia_inference.errors import LimitExceeded
from neuronpedia_inference.operations.activation import peculiarity
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model, check_size, counted_from, tokenize_prompts
from neuronpedia_inference.operations.tensors import Columns, prefix_of
from neuronpedia_inference.questions import TopPerToken
from neuronpedia_inference.schemas.activation import (
    ActivationTopkByTokenBatchRequest,
    ActivationTopkByTokenBatchResponse,
    ActivationTopkByTokenRequest,
    ActivationTopkByTokenResponse,
    ActivationTopkByTokenResult,
    TopkFields,
)
from neuronpedia_inference.schemas.common import SeveralPrompts

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

DEFAULT_TOP_K = 5


async def activation_topk_by_token(request: ActivationTopkByTokenRequest, rt: Runtime) -> ActivationTopkByTokenResponse:
    """As the batch form, for one prompt of full length."""
    [result] = await _top_k(request, [request.prompt], rt)
    return result


async def activation_topk_by_token_batch(
    request: ActivationTopkByTokenBatchRequest, rt: Runtime
) -> ActivationTopkByTokenBatchResponse:
    """The strongest features per token, per prompt. Raises UnknownSource, LimitExceeded."""
    return ActivationTopkByTokenBatchResponse.model_construct(results=await _top_k(request, request.prompts, rt))


async def _top_k(request: TopkFields, prompts: Sequence[str], rt: Runtime) -> list[ActivationTopkByTokenResponse]:
    def result(number: int, tokens: Tokens, top: TopFeatures) -> ActivationTopkByTokenResponse:
        prefix = prefix_of(number, is_listed=isinstance(request, SeveralPrompts))
        return _result(tokens, top, counted_from(tokens, ignore_bos=request.ignore_bos), prefix)

    return [result(number, *one) for number, one in enumerate(await tops(request, prompts, rt))]


async def tops(
    request: TopkFields, prompts: Sequence[str], rt: Runtime, *, relative: bool = False
) -> list[tuple[Tokens, TopFeatures]]:
    """Each prompt with the strongest features of all its tokens. Raises as `activation_topk_by_token_batch`.

    relative: ranked by `SourceAnnotations.peculiarity` times the activation.
    """
    check_model(request.model, rt)
    source = rt.shelf.source(request.source)
    batch = tokenize_prompts(rt, prompts, "once")
    k = min(DEFAULT_TOP_K if request.top_k is None else _checked(request.top_k, rt), source.n_features)
    check_size(k, batch, "features", rt)
    scales = peculiarity(source, rt) if relative else None
    return list(zip(batch, await rt.ask(TopPerToken(batch, source, k, scales)), strict=True))


def _checked(top_k: int, rt: Runtime) -> int:
    most = rt.settings.max_top_k
    if top_k > most:
        raise LimitExceeded(f"top_k is {top_k}, the most is {most}. Ask for fewer or raise MAX_TOP_K.")
    return top_k


def _result(tokens: Tokens, top: TopFeatures, start: int, prefix: str) -> ActivationTopkByTokenResponse:
    """Tokens from `start` on; their positions still count from the beginning of the prompt."""
    assert len(top) == len(tokens), (len(top), len(tokens))

    def at(place: int, *, bare: bool = False) -> ActivationTopkByTokenResult:
        position = start + place
        strongest = slice(0, 0 if bare else None)
        pairs = zip(top.indices[position][strongest].tolist(), top.values[position][strongest].tolist(), strict=True)
        return ActivationTopkByTokenResult.model_validate(
            {
                "token_position": position,
                "token": tokens.strings[position],
                "is_special": tokens.is_special[position],
                "top_features": [{"feature_index": index, "activation_value": value} for index, value in pairs],
            }
        )

    return ActivationTopkByTokenResponse.model_construct(
        results=Columns(
            len(tokens) - start,
            at,
            {f"{prefix}indices": top.indices[start:], f"{prefix}values": top.values[start:]},
            partial(at, bare=True),
        ),
        tokens=list(tokens.strings[start:]),
    )


ACTIVATION_TOPK_BY_TOKEN = Operation(
    name="activation_topk_by_token",
    path="/v1/activation/topk-by-token",
    request=ActivationTopkByTokenRequest,
    response=ActivationTopkByTokenResponse,
    summary="The strongest features at each token of one prompt",
    run=activation_topk_by_token,
    has_tensors=True,
)
ACTIVATION_TOPK_BY_TOKEN_BATCH = Operation(
    name="activation_topk_by_token_batch",
    path="/v1/activation/topk-by-token-batch",
    request=ActivationTopkByTokenBatchRequest,
    response=ActivationTopkByTokenBatchResponse,
    summary="The strongest features at each token of up to 4 prompts",
    run=activation_topk_by_token_batch,
    has_tensors=True,
)
