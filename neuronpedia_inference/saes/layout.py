"""Where the tensors of an SAE lie in its files, by format, and one feature read from there, folded as all are.

What loading does to whole tensors is done here to one feature's part of them, in the same order and precision, so the
numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import Source
from neuronpedia_inference.saes.asks import centred
from neuronpedia_inference.saes.feature import ACROSS_LAYERS, FeatureWeights
from neuronpedia_inference.saes.kinds import BIASES, LEAST_NORM, SCALED_BY_NORMS, shapes_of
from neuronpedia_inference.saes.stored import Stored


@dataclass(frozen=True, slots=True)
class Part:
    """One of an SAE's tensors, as it lies in a file."""

    stored: Stored
    is_turned: bool = False
    """Rows and columns are swapped, against SAELens's order."""
    is_log: bool = False
    """What is stored is the logarithm."""
    is_summed: bool = False
    """[feature, layer, width]: the sum over layers is meant."""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.stored.shape
        if self.is_summed:
            return shape[0], *shape[2:]
        return shape[::-1] if self.is_turned else shape

    def whole(self, dtype: torch.dtype) -> Tensor:
        """In SAELens's order. Of what is stored plainly, or turned."""
        assert not self.is_log, self
        assert not self.is_summed, self
        tensor = self.stored.whole().to(dtype)
        return tensor.T if self.is_turned else tensor

    def row(self, index: int, dtype: torch.dtype) -> Tensor:
        """[columns]; of a vector []"""
        if self.is_turned:
            return self.stored.column(index).to(dtype)
        if self.is_log:  # of all of them, for a vector's tail may be computed otherwise than a number
            return self.stored.whole().to(dtype).exp()[index].clone()
        row = self.stored.row(index).to(dtype)
        return row[None].sum(dim=1)[0] if self.is_summed else row

    def column(self, index: int, dtype: torch.dtype) -> Tensor:
        """[rows]"""
        return (self.stored.row(index) if self.is_turned else self.stored.column(index)).to(dtype)


@dataclass(frozen=True)
class Layout:
    """The tensors of one SAE by SAELens's names, before norms are folded."""

    parts: Mapping[str, Part]
    threshold: float | None = None
    """θ of every feature, where no tensor has it."""
    scale: float | None = None
    """A factor of the input that is folded into W_enc, and out of W_dec and b_dec."""

    @property
    def dtype(self) -> torch.dtype:
        """The least precision that holds all of them."""
        return reduce(torch.promote_types, (part.stored.dtype for part in self.parts.values()))

    def check(self, config: Any) -> None:
        """Raises ValueError where a tensor is missing or has another shape than the configuration says.

        config: with SAELens's names.
        """
        wanted = shapes_of(config)
        if self.threshold is not None:
            del wanted["threshold"]
        for name, shape in wanted.items():
            if name not in self.parts:
                raise ValueError(f"it has no {name}")
            if self.parts[name].shape != shape:
                raise ValueError(f"its {name} is {list(self.parts[name].shape)}, its configuration says {list(shape)}")

    def row(self, index: int, dtype: torch.dtype, *, folds: bool) -> Tensor:
        """[decoder width]: a decoder row and nothing else. Raises OSError."""
        row = self._scaled_row(index, dtype)
        return row / _norm(row) if folds else row

    def feature(self, source: Source, index: int, dtype: torch.dtype, *, config: Any, folds: bool) -> FeatureWeights:
        """config: with SAELens's names. folds: whether the decoder's norms are. Raises OSError."""
        row = self._scaled_row(index, dtype)
        if "W_enc" in self.parts:
            column = self.parts["W_enc"].column(index, dtype)
            column = column if self.scale is None else column * self.scale
        else:
            column = row.clone()
        numbers = {name: part.row(index, dtype) for name, part in self.parts.items() if name in SCALED_BY_NORMS}
        if self.threshold is not None:
            numbers["threshold"] = torch.ones((), dtype=dtype) * self.threshold
        takes_off = config.apply_b_dec_to_input and not source.is_transcoder
        b_dec = self.parts["b_dec"].stored.whole().to(dtype) if takes_off else None
        if self.scale is not None and b_dec is not None:
            b_dec /= self.scale
        if source.is_centred:
            columns, gains = centred(column[None], b_dec)
            column, numbers["b_enc"] = columns[0], (numbers["b_enc"][None] + gains.to(dtype))[0]
        if folds:
            norm = _norm(row)
            row, column = row / norm, column * norm
            numbers = {name: (number[None] * norm)[0] for name, number in numbers.items()}
        bias = next((numbers[name] for name in BIASES if name in numbers), torch.zeros((), dtype=dtype))
        return FeatureWeights(
            source=source,
            index=index,
            encoder=column,
            bias=bias,
            decoder=None if source.architecture == ACROSS_LAYERS else row,
            b_dec=b_dec,
            threshold=numbers.get("threshold"),
            r_mag=self.parts["r_mag"].row(index, dtype) if "r_mag" in self.parts else None,
            b_mag=numbers.get("b_mag"),
            normalisation=config.normalize_activations,
        )

    def _scaled_row(self, index: int, dtype: torch.dtype) -> Tensor:
        row = self.parts["W_dec"].row(index, dtype)
        return row if self.scale is None else row / self.scale


def _norm(row: Tensor) -> Tensor:
    """[width] -> [1], summed as those of all rows are."""
    return row[None].norm(dim=-1).clamp(min=LEAST_NORM)
