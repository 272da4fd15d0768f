"""The embedded default model's own SAEs: where they lie, what their features are called, which ones steer.

Importing this package imports neither torch nor transformers. The model's weights: `embedded.weights`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from neuronpedia_inference.annotations import SourceAnnotations

MODEL_ID = "smollm2-135m-instruct"
SOURCE_SET = "res-4k"
SOURCES = ("10-res-4k", "15-res-4k", "20-res-4k")

_HERE = Path(__file__).resolve().parent
SAES_DIR = _HERE / "saes"
LABELS_DIR = _HERE / "labels"
STEERING_EXAMPLES = _HERE / "steering_examples.json"


@dataclass(frozen=True, slots=True)
class SteeringExample:
    """A feature that visibly steers: greedy continuations of `prompt`, plain and with `strength` added."""

    source: str
    index: int
    label: str
    prompt: str
    strength: float
    steer_method: str
    plain: str
    steered: str


def sae_dir(source: str) -> Path:
    """The SAELens folder (`cfg.json`, `sae_weights.safetensors`) of one of `SOURCES`."""
    return SAES_DIR / _known(source)


@cache
def labels(source: str) -> tuple[str, ...]:
    """One label per feature of `source`, by index; empty for features that never fired."""
    stored = json.loads((LABELS_DIR / f"{_known(source)}.json").read_text(encoding="utf-8"))
    return tuple(stored)


@cache
def source_annotations(source: str) -> SourceAnnotations:
    """What is known of the features of `source`: their labels."""
    return SourceAnnotations.of_labels(labels(source))


@cache
def steering_examples() -> tuple[SteeringExample, ...]:
    """The documented steering examples, best first."""
    stored = json.loads(STEERING_EXAMPLES.read_text(encoding="utf-8"))
    return tuple(SteeringExample(**entry) for entry in stored)


def _known(source: str) -> str:
    if source not in SOURCES:
        raise KeyError(f"{source!r} is not an embedded source: choose one of {', '.join(SOURCES)}")
    return source
