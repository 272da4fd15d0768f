"""Which positions of a text an edit acts on, and how much: arithmetic over places and token ids, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]


class Phase(StrEnum):
    PROMPT = "prompt"
    GENERATED = "generated"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions for which all that is given holds. `first`, `last`, `start` and `stop` count within each phase."""

    phase: Phase = Phase.BOTH
    positions: tuple[int, ...] | None = None
    """Of the whole text, prompt and completion; 0 is its first token."""
    start: int | None = None
    stop: int | None = None
    """The first that is not selected any more."""
    first: int | None = None
    last: int | None = None
    """Of the prompt: where generation will end nobody knows."""
    token_ids: tuple[int, ...] | None = None
    ramp: tuple[int, int] | None = None
    """The weight grows from 0 at the first of these counts to 1 at the second, and stays; it falls where they fall."""
    but: tuple[Selection, ...] = ()
    """What is taken away from all that."""

    @property
    def is_everything(self) -> bool:
        return self == EVERYTHING

    @property
    def weight_when_generated(self) -> float | None:
        """The weight of every generated position; None where they differ."""
        if self.phase is Phase.PROMPT or self.last is not None:
            return 0.0
        narrower = (self.positions, self.start, self.stop, self.first, self.token_ids, self.ramp)
        taken = [other.weight_when_generated for other in self.but]
        if any(one is not None for one in narrower) or None in taken:
            return None
        return 0.0 if any(taken) else 1.0

    def weights(self, places: NDArray[np.int64], ids: NDArray[np.int64] | None, n_prompt: int) -> Weights:
        """How much each place is edited, from 0 to 1. [pos], [pos] -> [pos]

        places: from 0, in the whole text, of which the first `n_prompt` are the prompt. ids: of the tokens there; None
        for tokens that nobody knows yet, which may be any.
        """
        is_prompt = places < n_prompt
        counts = np.where(is_prompt, places, places - n_prompt)
        chosen = np.ones(len(places), bool)
        if self.phase is not Phase.BOTH:
            chosen &= is_prompt == (self.phase is Phase.PROMPT)
        if self.positions is not None:
            chosen &= np.isin(places, self.positions)
        if self.start is not None:
            chosen &= counts >= self.start
        for bound in (self.stop, self.first):
            if bound is not None:
                chosen &= counts < bound
        if self.last is not None:
            chosen &= is_prompt & (counts >= n_prompt - self.last)
        if self.token_ids is not None and ids is not None:
            chosen &= np.isin(ids, self.token_ids)
        for other in self.but:
            is_open = ids is None and other.token_ids is not None
            chosen &= np.full(len(places), True) if is_open else other.weights(places, ids, n_prompt) == 0
        weights = chosen.astype(np.float32)
        return weights if self.ramp is None else weights * self._ramp(counts)

    def _ramp(self, counts: NDArray[np.int64]) -> Weights:
        assert self.ramp is not None
        begins, ends = self.ramp
        return np.clip((counts - begins) / (ends - begins), 0, 1).astype(np.float32)


EVERYTHING = Selection()


def ordinary(special_ids: tuple[int, ...]) -> Selection:
    """Everything but position 0, which is far larger than all others in most models, and special tokens."""
    return Selection(but=(Selection(positions=(0,)), Selection(token_ids=special_ids)))


def without_special_of_prompt(special_ids: tuple[int, ...]) -> Selection:
    """Everything but the prompt's special tokens (contract of the wire, 3.4)."""
    return Selection(but=(Selection(Phase.PROMPT, token_ids=special_ids),))
