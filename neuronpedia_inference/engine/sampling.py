"""Drawing a token from logits, one row at a time, so that a row's draws do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling

LEAST_LOGPROB = -100.0
"""Reported in place of minus infinity, which JSON cannot carry (contract 3.8)."""


class Sampler:
    """The random stream and token counts of one row."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen = list(prompt_ids)
        """Ids so far, which the penalty counts."""

    def draw(self, logits: Tensor) -> int:
        """logits: [vocab], finite. Greedy at temperature 0, else softmax(logits / temperature − penalty × count)."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # In float64 on the host: not every device has it.
        scaled = logits.cpu().double()
        # Shifted before the division, so that a tiny temperature does not overflow.
        scaled = (scaled - scaled.max()) / self.sampling.temperature
        if self.sampling.freq_penalty:
            counts = torch.bincount(torch.tensor(self._seen, dtype=torch.long), minlength=len(scaled))
            scaled = scaled - self.sampling.freq_penalty * counts[: len(scaled)]
        token = int(torch.multinomial(scaled.softmax(-1), 1, generator=self._generator))
        self._seen.append(token)
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
