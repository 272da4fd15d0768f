"""util/sae-vector, util/sae-topk-by-decoder-cossim, util/similarity-matrix-pred: an SAE's vectors, and how alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations.kept_vectors import numbers_of
from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.operations.prompts import check_model, tokenize_prompts
from neuronpedia_inference.operations.rendering import Rows
from neuronpedia_inference.questions import EncoderColumn, NearestRows, PredictedSimilarity
from neuronpedia_inference.schemas.common import NPFeature
from neuronpedia_inference.schemas.util import (
    UtilSaeTopkByDecoderCossimFeature,
    UtilSaeTopkByDecoderCossimRequest,
    UtilSaeTopkByDecoderCossimResponse,
    UtilSaeVectorRequest,
    UtilSaeVectorResponse,
    UtilSimilarityMatrixPredRequest,
    UtilSimilarityMatrixPredResponse,
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


async def util_similarity_matrix_pred(
    request: UtilSimilarityMatrixPredRequest, rt: Runtime
) -> UtilSimilarityMatrixPredResponse:
    """Raises UnknownSource, InvalidRequest for an SAE that is not temporal and for an empty text, LimitExceeded."""
    check_model(request.model_id, rt)
    source = rt.shelf.source(request.source_id)
    [tokens] = tokenize_prompts(rt, [request.text], "natural")
    n, most = len(tokens), rt.settings.max_result_values
    if n * n > most:
        raise LimitExceeded(
            f"{n} tokens make a matrix of {n * n} numbers, the most in one answer is {most}. Send a shorter text, or "
            "raise MAX_RESULT_VALUES."
        )
    cosines = (await rt.ask(PredictedSimilarity(tokens, source)))[1:, 1:]
    return UtilSimilarityMatrixPredResponse.model_construct(
        similarity_matrix=Rows(len(cosines), lambda row: cosines[row].tolist()), tokens=list(tokens.strings[1:])
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
UTIL_SIMILARITY_MATRIX_PRED = Operation(
    name="util_similarity_matrix_pred",
    path="/v1/util/similarity-matrix-pred",
    request=UtilSimilarityMatrixPredRequest,
    response=UtilSimilarityMatrixPredResponse,
    summary="How alike the predictions of a temporal SAE are for the tokens of a text",
    run=util_similarity_matrix_pred,
    mirrors=False,
)
