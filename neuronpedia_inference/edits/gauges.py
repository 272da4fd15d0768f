"""Gauge numbers from what passes: every row its own, all rows in one product."""

from __future__ import annotations

from collections.abc import Sequence

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


def unit(vector: Tensor) -> Tensor:
    """v/‖v‖ in float32; [width] -> [width]. The norm must not be zero."""
    wide = vector.float()
    return wide / norms(wide)


class GaugeTable:
    """At one point, up to k numbers of every row."""

    def __init__(self, rows: Sequence[Sequence[Gauge | None]]) -> None:
        """`rows`: as many of each row; None is a number that stays 0."""
        self._shape = len(rows), len(rows[0])
        first = next((gauge for row in rows for gauge in row if gauge is not None), None)
        self._reads = first is not None
        if first is None:
            return
        blank, device = torch.zeros_like(first.column), first.column.device
        columns = [blank if one is None else one.column for row in rows for one in row]
        self._columns = torch.stack(columns).unflatten(0, self._shape).transpose(1, 2).contiguous()
        """[row, width, cell]"""
        numbers = torch.tensor([[_numbers(one) for one in row] for row in rows], device=device)
        self._shift, self._scale, self._bias, self._gate, self._threshold, self._least = numbers[:, None].unbind(-1)
        kinds = [[Norm.NONE if one is None else one.norm for one in row] for row in rows]
        self._kinds = torch.tensor(kinds, device=device)[:, None]
        self._norms = {kind for row in kinds for kind in row} - {Norm.NONE}
        self._sums = self._columns.sum(1, keepdim=True)

    @property
    def is_normalised(self) -> bool:
        """Whether what is written must be brought back to the size of what passes."""
        return self._reads and bool(self._norms)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[row, pos, width] -> [row, pos, cell], float32"""
        if not self._reads:
            return hidden.new_zeros(self._shape[0], hidden.shape[1], self._shape[1], dtype=torch.float32)
        wide = hidden.float()
        found = torch.bmm(wide, self._columns)
        if Norm.CONSTANT in self._norms:
            length = wide.shape[-1] ** 0.5 / norms(wide)
            found = torch.where(self._kinds == Norm.CONSTANT, found * length, found)
        if Norm.LAYER in self._norms:
            mean, deviation = wide.mean(-1, keepdim=True), wide.std(-1, keepdim=True)
            normalised = (found - mean * self._sums) / (deviation + _LAYER_NORM_EPS)
            found = torch.where(self._kinds == Norm.LAYER, normalised, found)
        found = found - self._shift
        size = torch.maximum(self._scale * found + self._bias, self._least)
        return torch.where(found + self._gate > self._threshold, size, 0.0)

    def sizes(self, hidden: Tensor) -> Tensor:
        """[row, pos, width] -> [row, pos, cell]: what a change of each number is multiplied by on its way back."""
        wide = hidden.float()
        back = torch.ones_like(self._kinds, dtype=torch.float32)
        back = torch.where(self._kinds == Norm.CONSTANT, norms(wide) / wide.shape[-1] ** 0.5, back)
        return torch.where(self._kinds == Norm.LAYER, wide.std(-1, keepdim=True), back)


def _numbers(gauge: Gauge | None) -> tuple[float, ...]:
    if gauge is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    return gauge.shift, gauge.scale, gauge.bias, gauge.gate, gauge.threshold, gauge.least
