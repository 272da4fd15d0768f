"""Drawing a token from logits, one row at a time, so that a row's draws do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.errors import InvalidRequest

LEAST_LOGPROB = -100.0
"""Reported in place of minus infinity, which JSON cannot carry (contract 3.8)."""


class Sampler:
    """The random stream and token counts of one row."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._counts: Tensor | None = None
        if sampling.freq_penalty and sampling.temperature:
            ids = torch.tensor(prompt_ids, dtype=torch.long)
            self._counts = torch.bincount(ids, minlength=vocab_size).double()

    def draw(self, logits: Tensor) -> int:
        """logits: [vocab]. Greedy at temperature 0, else softmax(logits / temperature − penalty × count)."""
        if not bool(torch.isfinite(logits).all()):
            raise InvalidRequest(
                "The steered model's output is not finite: the strength is too large. Lower strength or multiplier."
            )
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.double().cpu()
        # Shifted before the division, so that a tiny temperature does not overflow.
        scaled = (scaled - scaled.max()) / self.sampling.temperature
        if self._counts is not None:
            scaled = scaled - self.sampling.freq_penalty * self._counts[: len(scaled)]
        token = int(torch.multinomial(scaled.softmax(-1), 1, generator=self._generator))
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def logprobs(self, logits: Tensor, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Log-softmax of the raw logits at `token`, and the likeliest candidates, descending (contract 3.8)."""
        if self.sampling.n_logprobs == 0:
            return None, ()
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.sampling.n_logprobs, len(logprobs)))
        candidates = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return _finite(float(logprobs[token])), tuple((i, _finite(v)) for i, v in candidates)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
