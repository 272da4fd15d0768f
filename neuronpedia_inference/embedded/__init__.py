"""The embedded default model's own SAEs: where they lie, what their features are called, which ones steer.

Importing this package imports neither torch nor transformers. The model's weights: `embedded.weights`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from neuronpedia_inference.annotations import SourceAnnotations

MODEL_ID = "smollm2-135m-instruct"
SOURCE_SET = "res-4k"
SOURCES = ("10-res-4k", "15-res-4k", "20-res-4k")

_HERE = Path(__file__).resolve().parent
SAES_DIR = _HERE / "saes"
JACOBIANS = _HERE / "jacobians.safetensors"
JACOBIAN_METRICS = _HERE / "jacobians.json"
LABELS_DIR = _HERE / "labels"
FEATURES_DIR = _HERE / "features"
PERSONA_FOLDER = _HERE / "persona"
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
    """What is known of the features of `source`: labels, how often and how strongly they fire, and where.

    Measured on the texts that MODEL_CARD.md lists, position 0 and attention sinks left out.
    """
    stored = json.loads((FEATURES_DIR / f"{_known(source)}.json").read_text(encoding="utf-8"))
    density, maximum, mean = (np.array(stored[name], np.float64) for name in ("density", "max", "mean"))
    return SourceAnnotations(labels(source), density, maximum, mean, read_contexts=partial(_contexts, source))


def _contexts(source: str) -> dict[int, bytes]:
    """From lines `{"index":12,"contexts":[...]}`, whose lists are kept as they are."""
    with gzip.open(FEATURES_DIR / f"{source}.jsonl.gz") as lines:
        parts = (line.strip()[len(b'{"index":') : -1].partition(b',"contexts":') for line in lines)
        return {int(index): contexts for index, _, contexts in parts}


@cache
def steering_examples() -> tuple[SteeringExample, ...]:
    """The documented steering examples, best first."""
    stored = json.loads(STEERING_EXAMPLES.read_text(encoding="utf-8"))
    return tuple(SteeringExample(**entry) for entry in stored)


def _known(source: str) -> str:
    if source not in SOURCES:
        raise KeyError(f"{source!r} is not an embedded source: choose one of {', '.join(SOURCES)}")
    return source
