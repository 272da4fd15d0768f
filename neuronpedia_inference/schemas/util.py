"""Vectors of an SAE: a feature's encoder column, and nearest decoder rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    ModelName,
    NPFeature,
    Reply,
    SourceName,
    Wire,
    examples,
)
from neuronpedia_inference.schemas.vectors import Vector

_MODEL = "smollm2-135m-instruct"


class UtilSaeVectorRequest(Wire):
    """The vector that detects a feature."""

    model: ModelName
    source: SourceName
    index: int = Field(description="Index of the feature in its source.")

    model_config = ConfigDict(json_schema_extra=examples({"model": _MODEL, "source": "15-res-4k", "index": 42}))


class UtilSaeVectorResponse(Reply):
    """A feature's encoder column (not its decoder row), scaled as the activations are."""

    vector: list[float] = Field(description="The encoder column, as wide as the hook; not of unit length.")
    # camelCase in every spelling of the wire
    hookName: str = Field(description='Hook that the SAE reads, such as "blocks.15.hook_resid_post".')


class UtilSaeTopkByDecoderCossimRequest(Wire):
    """Features whose decoder rows point as a feature's row or a vector does: give one of the two."""

    feature: NPFeature | None = Field(default=None, description="Feature of any source; its decoder row is the query.")
    vector: Vector | None = Field(default=None, description="The query itself, as wide as the source's hook.")
    model: ModelName
    source: SourceName
    num_results: Annotated[int, Field(ge=1)] = Field(
        description="Features returned; 128 and the number of features in the source are the ceiling."
    )

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "feature": {"model": _MODEL, "source": "15-res-4k", "index": 42},
                "model": _MODEL,
                "source": "20-res-4k",
                "num_results": 5,
            },
            {"vector": [0.1] * 576, "model": _MODEL, "source": "20-res-4k", "num_results": 5},
        )
    )


class UtilSimilarityMatrixPredRequest(Wire):
    """How alike the predictions of a temporal SAE are for the tokens of a text."""

    model_id: ModelName
    source_id: SourceName
    index: int | None = Field(default=None, description="Ignored: the matrix is of all features together.")
    text: str = Field(description="Text to run through the model.")

    model_config = ConfigDict(
        strict=False,
        json_schema_extra=examples(
            {"model_id": "gemma-2-2b", "source_id": "12-temporal-res", "index": 0, "text": "The cat sat on the mat."}
        ),
    )


class UtilSimilarityMatrixPredResponse(Reply):
    """Of every two tokens but the first, which nothing is before."""

    similarity_matrix: list[list[float]] = Field(
        description="[token, token]: cosines of the features that the SAE predicts at the tokens from those before "
        "them, less their mean over the text; symmetric."
    )
    tokens: list[str] = Field(description="The tokens of rows and columns as text; position 0 is left out.")


class UtilSaeTopkByDecoderCossimFeature(Reply):
    """A feature of the searched source."""

    feature: NPFeature = Field(description="The feature.")
    cosine_similarity: float = Field(description="Cosine of the angle between its decoder row and the query.")


class UtilSaeTopkByDecoderCossimResponse(Reply):
    """The nearest features, nearest first."""

    feature: NPFeature | None = Field(default=None, description="The feature asked about; null for a vector.")
    topk_decoder_cossim_features: list[UtilSaeTopkByDecoderCossimFeature] = Field(
        description="Nearest first; the feature itself leads when it belongs to the searched source."
    )
