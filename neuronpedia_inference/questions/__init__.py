"""What is asked of the model, one value per kind: questions about features and weights, and texts to go on with.

A question's answer has one entry per prompt, in full-prompt coordinates, nothing masked unless asked for.
"""

from neuronpedia_inference.questions.completion import Begun, Completion
from neuronpedia_inference.questions.features import Active, OneFeature, Projection, Strongest, TopPerToken
from neuronpedia_inference.questions.question import Question
from neuronpedia_inference.questions.weights import EncoderColumn, NearestRows, Weighed

__all__ = [
    "Active",
    "Begun",
    "Completion",
    "EncoderColumn",
    "NearestRows",
    "OneFeature",
    "Projection",
    "Question",
    "Strongest",
    "TopPerToken",
    "Weighed",
]
