"""util/sae-vector and util/sae-topk-by-decoder-cossim: vectors of an SAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations.kept_vectors import numbers_of
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model
from neuronpedia_inference.questions import EncoderColumn, NearestRows
from neuronpedia_inference.schemas.common import NPFeature
from neuronpedia_inference.schemas.util import (
    UtilSaeTopkByDecoderCossimFeature,
    UtilSaeTopkByDecoderCossimRequest,
    UtilSaeTopkByDecoderCossimResponse,
    UtilSaeVectorRequest,
    UtilSaeVectorResponse,
)

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

MAX_NEAREST = 128
QUERY_RULE = "Invalid request data: exactly one of feature or vector must be provided"


async def util_sae_vector(request: UtilSaeVectorRequest, rt: Runtime) -> UtilSaeVectorResponse:
    """The encoder column. Raises UnknownSource, and InvalidRequest for neurons or an index out of range."""
    check_model(request.model, rt)
    source = _sae(request.source, rt)
    column = await rt.ask(EncoderColumn(source, request.index))
    return UtilSaeVectorResponse(vector=list(column), hookName=source.hook)


async def util_sae_topk_by_decoder_cossim(
    request: UtilSaeTopkByDecoderCossimRequest, rt: Runtime
) -> UtilSaeTopkByDecoderCossimResponse:
    """The query is the row of `feature` in its own source, which need not be the one searched."""
    check_model(request.model, rt)
    if (request.feature is None) == (request.vector is None):
        raise InvalidRequest(QUERY_RULE)
    source = _sae(request.source, rt)
    feature = request.feature and (_sae(request.feature.source, rt), request.feature.index)
    limit = min(request.num_results, MAX_NEAREST, source.n_features)
    vector = () if request.vector is None else numbers_of(request.vector, rt)
    nearest = await rt.ask(NearestRows(source, limit, vector, feature))
    return UtilSaeTopkByDecoderCossimResponse(
        feature=request.feature,
        topk_decoder_cossim_features=[
            UtilSaeTopkByDecoderCossimFeature(
                feature=NPFeature(model=request.model, source=source.name, index=row.index),
                cosine_similarity=row.value,
            )
            for row in nearest
        ],
    )


def _sae(name: str, rt: Runtime) -> Source:
    source = rt.shelf.source(name)
    if source.is_neurons:
        raise InvalidRequest(f"Source {name!r} stands for neurons, which have no SAE vectors")
    return source


UTIL_SAE_VECTOR = Operation(
    name="util_sae_vector",
    path="/v1/util/sae-vector",
    request=UtilSaeVectorRequest,
    response=UtilSaeVectorResponse,
    summary="The encoder column of a feature and the hook it reads",
    run=util_sae_vector,
)
UTIL_SAE_TOPK_BY_DECODER_COSSIM = Operation(
    name="util_sae_topk_by_decoder_cossim",
    path="/v1/util/sae-topk-by-decoder-cossim",
    request=UtilSaeTopkByDecoderCossimRequest,
    response=UtilSaeTopkByDecoderCossimResponse,
    summary="Features whose decoder rows are nearest to a feature's row or to a vector",
    run=util_sae_topk_by_decoder_cossim,
)
