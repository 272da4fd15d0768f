"""Doses that were too large, as they are told of one text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neuronpedia_inference.domain import Written
from neuronpedia_inference.edits.plan import N_TOLD, Edit
from neuronpedia_inference.schemas.watch import SteerOverDose


class Doses:
    """The largest dose of every edit so far, and where."""

    def __init__(self, edits: Sequence[Edit], bound: float) -> None:
        self._edits = edits
        self._bound = bound
        self._largest = np.zeros(len(edits))
        self._positions = np.zeros(len(edits), dtype=np.int64)
        self._n_seen = 0

    def add(self, written: Written) -> None:
        """Numbers of a text whose edits are told begin with N_TOLD of each, of which the last is the dose."""
        if written.numbers is None or not self._edits:
            return
        doses = written.numbers[:, N_TOLD - 1 : N_TOLD * len(self._edits) : N_TOLD]
        places, largest = doses.argmax(axis=0), doses.max(axis=0)
        is_larger = largest > self._largest
        self._positions[is_larger] = self._n_seen + places[is_larger]
        self._largest[is_larger] = largest[is_larger]
        self._n_seen += len(doses)

    @property
    def over(self) -> list[SteerOverDose]:
        """Those beyond the bound."""
        found = zip(self._edits, self._largest.tolist(), self._positions.tolist(), strict=True)
        return [
            SteerOverDose(edit=edit.field, id=edit.name or None, dose=dose, position=position)
            for edit, dose, position in found
            if dose > self._bound
        ]
