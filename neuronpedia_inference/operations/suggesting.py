"""Which strength to take, of what a sweep has found: the largest effect before the text breaks. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_LOST = 1.5
"""Nats per token that steered texts may be less likely than unsteered ones."""
MOST_REPEATED = 0.25
"""By how much more of their runs of three tokens may repeat."""


@dataclass(frozen=True)
class Mean:
    """All texts of one steering at one strength, against the unsteered ones of the same prompts and seeds."""

    strength: float
    lost: float
    """Nats per token."""
    repeated: float
    """As a share; of texts that repeat less than the unsteered ones 0."""
    effect: float
    """How far what the strength is for has moved."""

    @property
    def holds(self) -> bool:
        """Likely text that does not repeat: what loops is likely, and what falls apart does not repeat."""
        return self.lost <= MOST_LOST and self.repeated <= MOST_REPEATED


def suggested(means: Sequence[Mean]) -> float | None:
    """The strength with the largest effect among those that hold, of equal ones the weakest; None if none has any."""
    held = [one for one in means if one.holds and one.effect > 0]
    best = max(held, key=lambda one: (one.effect, -abs(one.strength)), default=None)
    return None if best is None else best.strength
