"""The rules of one row: which of them acts once a token has been read, and what is held back from the reader for them.

A row with rules holds its newest tokens back: as many as a rule takes back, and at least the one that none of them has
seen. What has been told stays. So what is refused never gets out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from neuronpedia_inference.domain import Numbers, Refusal
from neuronpedia_inference.engine.protocol import NO_TOKEN, RowStep, Rule


class Ruled:
    """What one row's rules have seen and done. No tensors."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._lookouts = [rule.begin() for rule in rules]
        self._n_left = [0 if rule.retry is None else rule.retry.times for rule in rules]
        """Of every rule, how often it may still take tokens back."""
        self._n_held = max((1 if rule.retry is None else rule.retry.back for rule in rules), default=0)
        self._held: deque[RowStep] = deque()
        self._refusal: Refusal | None = None
        """That nobody was told of."""

    def see(self, numbers: Numbers, ids: Sequence[int]) -> int | None:
        """What was read at the next positions, and their tokens; the first rule that acts at the last of them."""
        wants = [lookout.see(numbers, ids) for lookout in self._lookouts]
        return wants.index(True) if any(wants) else None

    def refuse(self, rule: int, n_generated: int) -> tuple[int, bool]:
        """A rule takes the newest tokens back, of those that are held: how many, and whether others are drawn in their
        place."""
        retry = self._rules[rule].retry
        assert retry is not None, rule
        n_tokens = min(retry.back, len(self._held))
        for lookout in self._lookouts:
            lookout.forget(n_tokens)
        for _ in range(n_tokens):
            self._held.pop()
        self._refusal = Refusal(rule, n_generated - n_tokens, n_tokens)
        self._n_left[rule] -= 1
        return n_tokens, self._n_left[rule] >= 0

    def told(self, step: RowStep) -> list[RowStep]:
        """What the reader is told now that the row has made this step: something, or a step that says nothing.

        What was read in a step belongs to the newest token that is held: it has been the input.
        """
        if not self._rules or step.error is not None:
            return [step]
        steps: list[RowStep] = []
        if self._refusal is not None:
            steps.append(RowStep(step.row, NO_TOKEN, refusal=self._refusal))
            self._refusal = None
        elif step.numbers is not None and self._held:
            self._held[-1] = replace(self._held[-1], numbers=step.numbers)
        elif step.numbers is not None:
            steps.append(RowStep(step.row, NO_TOKEN, numbers=step.numbers))
        if step.token_id != NO_TOKEN:
            self._held.append(replace(step, numbers=None))
        has_ended = step.token_id == NO_TOKEN and step.finish_reason is not None
        steps += self._released(0 if has_ended else self._n_held)
        return _with_end(steps, step) if has_ended else steps or [RowStep(step.row, NO_TOKEN)]

    def _released(self, n_kept: int) -> list[RowStep]:
        n_released = max(0, len(self._held) - n_kept)
        seen = [self._held.popleft() for _ in range(n_released)]
        return [replace(one, finish_reason=None, is_awaited=False) for one in seen]


def _with_end(steps: Sequence[RowStep], end: RowStep) -> list[RowStep]:
    """The end is told with the last token, if that is kept."""
    *before, last = steps
    if last.token_id == NO_TOKEN:
        return [*steps, RowStep(end.row, NO_TOKEN, finish_reason=end.finish_reason)]
    return [*before, replace(last, finish_reason=end.finish_reason, rule=end.rule)]
