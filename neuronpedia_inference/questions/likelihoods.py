"""How likely the model finds tokens that are given: of continuations, of what was written, of a prompt itself.

As in `features`, the tensors are worked on where the reduction runs. Logits are made from what the last block gives, as
`engine.readout` does, for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neuronpedia_inference.costs import LOGITS_AT_ONCE, score_bytes
from neuronpedia_inference.domain import Likelihood, Numbers, Tokens
from neuronpedia_inference.engine.protocol import Captured
from neuronpedia_inference.errors import EngineFailed, InvalidRequest
from neuronpedia_inference.points import RESID_POST, Point
from neuronpedia_inference.questions.checks import check_prompts
from neuronpedia_inference.questions.features import Steps
from neuronpedia_inference.questions.question import Places, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities of the tokens of texts, each given all tokens before it. The last token is not run itself."""

    texts: Sequence[Tokens]
    n_given: Sequence[int]
    """Tokens at the beginning of each text that are only gone on from: 1 at the least, and not all."""
    last_layer: int
    vocab_size: int
    """Logits of a position."""
    n_top: int = 0
    """Likeliest tokens that are told at each position."""
    is_edited: bool = False
    """Whether what is not finite may be the edits' fault."""

    @property
    def scored(self) -> list[tuple[Tokens, int]]:
        """Every text, and how many of its tokens are given."""
        return list(zip(self.texts, self.n_given, strict=True))

    @property
    def prompts(self) -> Sequence[Tokens]:
        return [text.before(len(text) - 1) for text in self.texts]

    @property
    def point(self) -> Point:
        """What logits are made from."""
        return Point(self.last_layer, RESID_POST)

    @property
    def points(self) -> set[Point]:
        return {self.point}

    @property
    def n_bytes(self) -> int:
        n_scored = sum(map(len, self.texts)) - sum(self.n_given)
        return score_bytes(self.vocab_size, n_scored * (1 + 2 * self.n_top))

    def check(self, places: Places, vocab_size: int) -> None:
        places.check_lens()
        check_prompts(self.texts, vocab_size, at_least=2)
        for number, (text, n_given) in enumerate(self.scored):
            if not 0 < n_given < len(text):
                raise InvalidRequest(
                    f"Text {number} has {len(text)} tokens, of which {n_given} are given: at least one has to be, "
                    "and one has to follow."
                )

    def reduce(self, captured: Sequence[Captured], weights: Weights) -> Steps[list[Likelihood]]:
        found: list[Likelihood] = []
        at_once = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for (text, n_given), seen in zip(self.scored, captured, strict=True):
            parts: list[Likelihood] = []
            states = seen[self.point]
            for first in range(n_given, len(text), at_once):
                ids = text.ids[first : first + at_once]
                parts.append(self._of(weights.readout(states[first - 1 : first - 1 + len(ids)]), ids))
                yield None
            found.append(Likelihood.joined(parts))
        return found

    def _of(self, logits: Tensor, ids: Sequence[int]) -> Likelihood:
        """logits [pos, vocab], float32, and what comes at each position."""
        from neuronpedia_inference.saes.order import stable_topk

        total = logits.logsumexp(-1)
        top, top_ids = stable_topk(logits, max(1, self.n_top))
        chosen = logits[range(len(ids)), list(ids)]
        logprobs: Numbers = (chosen - total).cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise self._not_finite()
        likeliest = (top - total[:, None])[:, : self.n_top]
        is_likeliest = (chosen >= top[:, 0]).cpu().numpy()
        return Likelihood(logprobs, is_likeliest, top_ids[:, : self.n_top].cpu().numpy(), likeliest.cpu().numpy())

    def _not_finite(self) -> Exception:
        if self.is_edited:
            return InvalidRequest("The steered model's output is not finite: the strength is too large. Lower it.")
        return EngineFailed("The model's output is not finite on this text.")
