"""How much of a prompt may run between two decode steps, from what passes and steps have taken so far."""

from __future__ import annotations

BETWEEN_STREAMED, BETWEEN_UNSEEN = 1.0, 4.0
"""Time for everything else between two steps, in steps: where somebody reads tokens as they come, and where all wait
for the whole answer, which comes sooner if others decode with them."""
LEAST_TOKENS = 8
"""A piece of this size takes hardly longer than a smaller one: either reads every weight once."""
UNTRIED_TOKENS = 32
"""A piece when nothing has been measured."""
_WEIGHT = 0.3


class Pace:
    """A pass through the share `depth` of the layers is taken to need depth × (a step + a time for each token)."""

    def __init__(self) -> None:
        self.step_s: float | None = None
        """Seconds of a decode step, lately."""
        self._token_s: float | None = None

    def stepped(self, seconds: float) -> None:
        self.step_s = _smoothed(self.step_s, seconds)

    def passed(self, n_tokens: int, depth: float, seconds: float) -> None:
        """depth: share of the layers."""
        beyond = max(0.0, seconds / depth - (self.step_s or 0.0))
        self._token_s = _smoothed(self._token_s, beyond / n_tokens)

    def between_s(self, steps: float) -> float:
        """Seconds between two steps for what is measured and not foretold."""
        return steps * (self.step_s or 0.0)

    def tokens(self, depth: float, most: int, steps: float | None) -> int:
        """How many fit between two steps, in the time of `steps`, None for any time; at most `most`."""
        if steps is None:
            return most
        if self.step_s is None or not self._token_s:
            return min(UNTRIED_TOKENS, most)
        room_s = self.between_s(steps) / depth - self.step_s
        return max(min(LEAST_TOKENS, most), min(int(room_s / self._token_s), most))


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else (1 - _WEIGHT) * before + _WEIGHT * now
