"""Which numbers features are used with: a digest of each, so that a later request can be told from this one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronpedia_inference.domain import FeatureDigest, Numbers, Source, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.points import Point
from neuronpedia_inference.questions.checks import check_index
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Weights

DECODER_ROW = "decoder_row"
PARTS = {
    DECODER_ROW: "decoder",
    "encoder_column": "encoder",
    "bias": "bias",
    "threshold": "threshold",
    "gate_scale": "r_mag",
    "gate_bias": "b_mag",
    "decoder_bias": "b_dec",
}
"""Of a feature, by the name that a digest has and the name in FeatureWeights."""


@dataclass(frozen=True)
class UsedFeature:
    """A feature that a request steers by, or also reads."""

    source: Source
    index: int
    is_read: bool
    """Whether its encoder is used, and not its decoder row alone."""


@dataclass(frozen=True)
class Fingerprints:
    """A digest of every number that these features are used with."""

    features: tuple[UsedFeature, ...]

    @property
    def prompts(self) -> Sequence[Tokens]:
        return ()

    @property
    def points(self) -> frozenset[Point]:
        return frozenset()

    @property
    def n_bytes(self) -> int:
        return 0

    def check(self, places: Places, vocab_size: int) -> None:
        for one in self.features:
            check_index(one.source, one.index)

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[FeatureDigest]]:
        found: list[FeatureDigest] = []
        for one in self.features:
            if one.is_read:
                with (yield weights.feature(one.source, one.index)) as feature:
                    parts = {part: getattr(feature, name) for part, name in PARTS.items()}
            else:
                with (yield weights.decoder_row(one.source, one.index)) as row:
                    parts = {DECODER_ROW: row}
            numbers = {part: _numbers(tensor) for part, tensor in parts.items() if tensor is not None}
            norm = norm_of(numbers[DECODER_ROW]) if DECODER_ROW in numbers else None
            digests = {part: sha256_of(value) for part, value in numbers.items()}
            found.append(FeatureDigest(one.source.name, one.index, digests, norm))
            yield None
        return found


def sha256_of(numbers: Sequence[float] | Numbers) -> str:
    """Of the numbers in float32, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(numbers, "<f4").tobytes()).hexdigest()


def norm_of(numbers: Sequence[float] | Numbers) -> float:
    """In float64, of the numbers in float32."""
    return float(np.linalg.norm(np.asarray(numbers, np.float32).astype(np.float64)))


def _numbers(tensor: Any) -> Numbers:
    return tensor.float().cpu().numpy()
