"""Gauge numbers from what passes: every row its own, all rows in one product."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuronpedia_inference.edits.rows import Gauge, Norm

_LAYER_NORM_EPS = 1e-5
"""SAELens's."""


def norms(vectors: Tensor) -> Tensor:
    """[..., width] -> [..., 1], float32; scaled by the largest number, so that squares neither overflow nor vanish."""
    wide = vectors.float()
    largest = wide.abs().amax(-1, keepdim=True)
    safe = torch.where(largest > 0, largest, 1.0)
    return largest * (wide / safe).norm(dim=-1, keepdim=True)


def unit(vectors: Tensor) -> Tensor:
    """v/‖v‖ in float32; [..., width] -> [..., width]. A norm of zero gives no numbers."""
    wide = vectors.float()
    return wide / norms(wide)


class Gauges(NamedTuple):
    """Gauges as tensors, side by side."""

    columns: Tensor
    """[..., gauge, width], float32"""
    numbers: Tensor
    """[..., gauge, 7], float32: shift, scale, bias, gate, threshold, least and the norm by its number. Zeros are a
    number that stays 0."""

    @classmethod
    def of(cls, gauges: Sequence[Gauge], columns: Tensor) -> Gauges:
        """columns: theirs, [gauge, width]"""
        return cls(columns, torch.tensor([_numbers(gauge) for gauge in gauges], device=columns.device))


class GaugeTable:
    """At one point, as many numbers of every row."""

    def __init__(self, gauges: Gauges, norms_used: Collection[Norm], *, are_directions: bool = False) -> None:
        """gauges: [row, cell, ...]. norms_used: what some of them divide by. are_directions: nothing but a = q."""
        self._columns = gauges.columns.transpose(1, 2)
        """[row, width, cell]"""
        numbers = gauges.numbers[:, None].unbind(-1)
        self._shift, self._scale, self._bias, self._gate, self._threshold, self._least, self._kinds = numbers
        self._norms = set(norms_used) - {Norm.NONE}
        self._are_directions = are_directions
        self._sums = self._columns.sum(1, keepdim=True) if Norm.LAYER in self._norms else None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Gauge | None]]) -> GaugeTable:
        """As many gauges of every row, at least one of them; None is a number that stays 0."""
        gauges = [gauge for row in rows for gauge in row if gauge is not None]
        there = Gauges.of(gauges, torch.stack([gauge.column for gauge in gauges]))
        found = Gauges(*(part.new_zeros(len(rows), len(rows[0]), part.shape[-1]) for part in there))
        at = [(row, cell) for row, of in enumerate(rows) for cell, one in enumerate(of) if one is not None]
        for into, part in zip(found, there, strict=True):
            into[tuple(torch.tensor(at, device=part.device).T)] = part
        return cls(found, {gauge.norm for gauge in gauges})

    @property
    def is_normalised(self) -> bool:
        """Whether what is written must be brought back to the size of what passes."""
        return bool(self._norms)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[row, pos, width] -> [row, pos, cell], float32"""
        wide = hidden.float()
        found = torch.bmm(wide, self._columns)
        if self._are_directions:
            return found
        if Norm.CONSTANT in self._norms:
            length = wide.shape[-1] ** 0.5 / norms(wide)
            found = torch.where(self._kinds == Norm.CONSTANT, found * length, found)
        if self._sums is not None:
            mean, deviation = wide.mean(-1, keepdim=True), wide.std(-1, keepdim=True)
            normalised = (found - mean * self._sums) / (deviation + _LAYER_NORM_EPS)
            found = torch.where(self._kinds == Norm.LAYER, normalised, found)
        found = found - self._shift
        size = torch.maximum(self._scale * found + self._bias, self._least)
        return torch.where(found + self._gate > self._threshold, size, 0.0)

    def sizes(self, hidden: Tensor) -> Tensor:
        """[row, pos, width] -> [row, pos, cell]: what a change of each number is multiplied by on its way back."""
        wide = hidden.float()
        back = torch.ones_like(self._kinds)
        back = torch.where(self._kinds == Norm.CONSTANT, norms(wide) / wide.shape[-1] ** 0.5, back)
        return torch.where(self._kinds == Norm.LAYER, wide.std(-1, keepdim=True), back)


def _numbers(gauge: Gauge) -> tuple[float, ...]:
    return gauge.shift, gauge.scale, gauge.bias, gauge.gate, gauge.threshold, gauge.least, float(gauge.norm)
