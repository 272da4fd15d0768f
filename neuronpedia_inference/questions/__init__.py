"""Questions about features and weights, one value per kind: what it reads, checks, takes and gives.

A question's answer has one entry per prompt, in full-prompt coordinates, nothing masked unless asked for.
"""

from neuronpedia_inference.questions.features import (
    Active,
    OneFeature,
    PredictedSimilarity,
    Projection,
    Strongest,
    TopPerToken,
)
from neuronpedia_inference.questions.question import Question
from neuronpedia_inference.questions.weights import EncoderColumn, NearestRows, Weighed

__all__ = [
    "Active",
    "EncoderColumn",
    "NearestRows",
    "OneFeature",
    "PredictedSimilarity",
    "Projection",
    "Question",
    "Strongest",
    "TopPerToken",
    "Weighed",
]
