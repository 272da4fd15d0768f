"""The operations, each written once: what a request means, without HTTP and without tensors."""

from neuronpedia_inference.operations.core import (
    OPERATIONS,
    InvalidBody,
    answer,
    answer_events,
    answer_events_json,
    answer_pieces,
    by_name,
    validate,
    validate_texts,
)
from neuronpedia_inference.operations.operation import Events, Operation

__all__ = [
    "OPERATIONS",
    "Events",
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
