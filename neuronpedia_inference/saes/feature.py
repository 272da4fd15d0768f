"""Some columns of an encoder, and one feature by itself: what they answer. x̂ is the input, normalised as the SAE says,
less b_dec where the SAE takes it off; q = e·x̂ for an encoder's column e.

    relu        relu(q + b_enc)                                           Cunningham et al., arXiv 2309.08600
    jumprelu    relu(q + b_enc) where q + b_enc > θ, else 0               Rajamanoharan et al., arXiv 2407.14435
    gated       relu(exp(r)·q + b_mag) where q + b_gate > 0, else 0       Rajamanoharan et al., arXiv 2404.16014

TopK and matching pursuit compare features, and temporal SAEs attend to earlier positions: theirs have columns and rows,
but none can be read by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuronpedia_inference.domain import TEMPORAL, Source
from neuronpedia_inference.errors import InvalidRequest

LAYER_NORM, CONSTANT_NORM = "layer_norm", "constant_norm_rescale"
NORMALISATIONS = ("none", LAYER_NORM, CONSTANT_NORM)
"""What is done to the input while reading, in SAELens's words."""
_EPSILON = 1e-5
"""Added to the standard deviation."""
ACROSS_LAYERS = "cross_layer_transcoder"
"""One layer of it: features read there, and write to every later layer."""


class OneReader(Protocol):
    """What is needed to read one feature. `x` is one prompt's hook tensor [pos, width]."""

    @property
    def source(self) -> Source: ...

    def encode_feature(self, x: Tensor, index: int) -> Tensor:
        """[pos, width] -> [pos], float32"""
        ...

    def encoder_column(self, index: int) -> Tensor:
        """[width], a float32 copy. Raises InvalidRequest for neurons."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Of an encoder whose features do not depend on each other."""

    weights: Tensor
    """[width, feature]"""
    bias: Tensor
    """[feature]: b_enc, of a gated SAE b_gate"""
    threshold: Tensor | None = None
    """[feature]: θ of JumpReLU"""
    r_mag: Tensor | None = None
    """[feature], of a gated SAE"""
    b_mag: Tensor | None = None
    """[feature], of a gated SAE"""

    def __call__(self, inputs: Tensor) -> Tensor:
        """x̂ [pos, width] -> activations [pos, feature]"""
        before = inputs @ self.weights + self.bias
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = inputs @ (self.weights * self.r_mag.exp()) + self.b_mag
            return magnitude.relu() * (before > 0)
        return before.relu() if self.threshold is None else before.relu() * (before > self.threshold)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureWeights:
    """One feature of an SAE, folded as the whole SAE is (contract 2.5): a copy, in the SAE's precision.

    It is on the host where it was read from a file. Others may have it too, so nobody writes to it.
    """

    source: Source
    index: int
    encoder: Tensor
    """[width]: e"""
    bias: Tensor
    """[]: b_enc, of a gated SAE b_gate; zero where there is none"""
    decoder: Tensor | None
    """[decoder width]: d. None for a layer of a cross-layer transcoder, which has no row."""
    b_dec: Tensor | None = None
    """[width], where the SAE takes it off its input; None where it does not"""
    threshold: Tensor | None = None
    """[]: θ of JumpReLU"""
    r_mag: Tensor | None = None
    """[], of a gated SAE"""
    b_mag: Tensor | None = None
    """[], of a gated SAE"""
    normalisation: str = "none"
    """One of NORMALISATIONS where features are read alone."""

    def encode(self, x: Tensor) -> Tensor:
        """[pos, width] -> [pos], float32, as the whole SAE does on x's device. Only where features are read alone."""
        assert self.source.is_read_by_column, self.source
        inputs = normalised(x.to(self.encoder.dtype), self.normalisation)
        if self.b_dec is not None:
            inputs = inputs - self.b_dec.to(x.device)
        columns = Columns(
            self.encoder[:, None].to(x.device),
            self.bias[None].to(x.device),
            threshold=None if self.threshold is None else self.threshold[None].to(x.device),
            r_mag=None if self.r_mag is None else self.r_mag[None].to(x.device),
            b_mag=None if self.b_mag is None else self.b_mag[None].to(x.device),
        )
        return columns(inputs)[:, 0].float()

    def encode_feature(self, x: Tensor, index: int) -> Tensor:
        """As that of a whole reader."""
        assert index == self.index, (index, self.index)
        return self.encode(x)

    def encoder_column(self, index: int) -> Tensor:
        """As that of a whole reader."""
        assert index == self.index, (index, self.index)
        return self.encoder.to(torch.float32, copy=True)

    @property
    def offsets(self) -> tuple[float | None, float | None]:
        """b_enc and the threshold of JumpReLU, None where the kind of SAE has no such number."""
        has_bias = self.source.architecture not in ("gated", "matching_pursuit", TEMPORAL)
        return float(self.bias) if has_bias else None, None if self.threshold is None else float(self.threshold)

    @property
    def nbytes(self) -> int:
        parts = (self.encoder, self.bias, self.decoder, self.b_dec, self.threshold, self.r_mag, self.b_mag)
        return sum(part.nbytes for part in parts if part is not None)


def check_rows(source: Source) -> None:
    """Raises InvalidRequest where decoder rows mean nothing."""
    if source.architecture == ACROSS_LAYERS:
        raise InvalidRequest(
            f"Source {source.name!r} is one layer of a cross-layer transcoder: its features write to every "
            "later layer, so it has no decoder rows. Its activations are served."
        )


def normalised(x: Tensor, kind: str) -> Tensor:
    """[pos, width] -> [pos, width], as SAELens does it (contract 2.5)."""
    if kind == LAYER_NORM:
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.std(dim=-1, keepdim=True) + _EPSILON)
    if kind == CONSTANT_NORM:
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
    assert kind == "none", kind
    return x
