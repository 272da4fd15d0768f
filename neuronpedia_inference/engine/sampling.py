"""Drawing tokens: one pass over the logits of all rows, on their device and in float32, and one copy to the host.

A row's draw is a function of its logits, its own numbers and its own uniforms, whoever is beside it. Distributions are
inverted in two stages, a block of the vocabulary and a token in it, each with a uniform of its own: a cumulative sum
over the whole vocabulary in float32 would round the unlikely tokens away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronpedia_inference.domain import Numbers, Sampling

LEAST_LOGPROB = -100.0
"""Reported in place of minus infinity, which JSON cannot carry (contract 3.8)."""
BLOCK = 256
"""Tokens of the vocabulary whose weights are summed first."""
_UNIFORMS_AT_ONCE = 64
"""Steps; what is made for them together is a whole number of the generator's counts."""
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Below it the likeliest token is drawn for certain, unless logits differ by less than 1e-36."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one draw gave one row."""

    token_id: int
    logprob: float | None
    """Log-softmax of the raw logits at the token; None if no candidates are reported."""
    top: tuple[tuple[int, float], ...]
    """The likeliest candidates, descending."""
    is_finite: bool
    """Whether all logits were; if not, the rest means nothing."""
    is_possible: bool
    """Whether temperature and penalty left a distribution; if not, the token means nothing."""


class Counts:
    """Tokens, and how often each has been seen. A token keeps its place."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.ids, self.times = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
        self._places = {int(token): place for place, token in enumerate(self.ids)}

    def add(self, token_id: int, times: int = 1) -> None:
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids = np.append(self.ids, token_id)
            self.times = np.append(self.times, 0)
        self.times[place] += times


class Sampler:
    """The uniforms and the token counts of one row. Only `commit` and `take_back` change what the next draw will be."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self._n_drawn = 0
        """Also of tokens that were taken back."""
        self._n_tokens = 0
        self._banned: dict[int, list[int]] = {}
        """By the number of tokens before: which are not drawn there."""
        self._uniforms: tuple[int, Numbers] | None = None
        self._seen = Counts(prompt_ids if self.is_penalised else ())
        self._written = Counts()
        for token_id, _ in sampling.logit_bias:
            self._written.add(token_id, 0)
        self._biases = np.array([bias for _, bias in sampling.logit_bias])
        self._is_counted = bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.logit_bias)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def is_penalised(self) -> bool:
        """After the temperature, by prompt and output."""
        return self.sampling.freq_penalty != 0 and not self.is_greedy

    @property
    def banned(self) -> Sequence[int]:
        """Ids that are not drawn next."""
        return self._banned.get(self._n_tokens, ())

    @property
    def is_shifted(self) -> bool:
        """Before the temperature: by biases and the output, or because tokens are banned."""
        return self._is_counted or bool(self.banned)

    def uniforms(self) -> Numbers:
        """[2] of float32 in [0, 1): Philox keyed by the seed, at the count of the row's draws."""
        block, at = divmod(self._n_drawn, _UNIFORMS_AT_ONCE)
        if self._uniforms is None or self._uniforms[0] != block:
            numbers = np.random.Philox(key=self.sampling.seed % 2**64, counter=block * _UNIFORMS_AT_ONCE)
            drawn = np.random.Generator(numbers).random((_UNIFORMS_AT_ONCE, 2), dtype=np.float32)
            self._uniforms = block, drawn
        return self._uniforms[1][at]

    def penalties(self, n_vocab: int) -> tuple[Numbers, Numbers]:
        """Ids that have been seen, below `n_vocab`, and what is added to each after the temperature, float64."""
        known = self._seen.ids < n_vocab
        with np.errstate(over="ignore"):
            return self._seen.ids[known], -self.sampling.freq_penalty * self._seen.times[known]

    def shifts(self) -> tuple[Numbers, Numbers]:
        """Ids that have a bias, have been written or are banned, and what is added to the logit of each, float64."""
        times = self._written.times
        amounts = -self.sampling.frequency_penalty * times - self.sampling.presence_penalty * (times > 0)
        amounts[: len(self._biases)] += self._biases
        amounts[np.isin(self._written.ids, self.banned)] = -np.inf
        return self._written.ids, amounts

    def commit(self, token_id: int) -> None:
        """The token has been drawn: the next draw takes the next uniforms, and counts it."""
        self._n_drawn += 1
        self._n_tokens += 1
        self._count([token_id], 1)

    def take_back(self, token_ids: Sequence[int]) -> None:
        """The newest tokens are not there any more, and the first of them is not drawn there again.

        The uniforms go on: the same ones would give the same tokens.
        """
        self._n_tokens -= len(token_ids)
        self._banned = {place: ids for place, ids in self._banned.items() if place <= self._n_tokens}
        self._banned.setdefault(self._n_tokens, []).append(token_ids[0])
        self._count(token_ids, -1)
        self._written.add(token_ids[0], 0)

    def _count(self, token_ids: Sequence[int], times: int) -> None:
        for token in token_ids:
            if self.is_penalised:
                self._seen.add(token, times)
            if self._is_counted:
                self._written.add(token, times)


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[Drawn]:
    """One token for every row; commits nothing. logits: [row, vocab], float32.

    With z = logits + bias − frequency_penalty × times written − presence_penalty if written: the largest z at
    temperature 0, else from softmax(z / temperature − freq_penalty × times seen), of which `top_p` keeps the likeliest
    tokens, in order, until their probabilities reach it. Reports are of the logits.
    """
    least, most = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)  # aminmax takes twenty times as long
    finite = (torch.isfinite(least) & torch.isfinite(most)).long()[:, 0]
    shifts = [(row, *one.shifts()) for row, one in enumerate(samplers) if one.is_shifted]
    shifted = logits
    if shifts:
        shifted = logits.clone()
        _add(shifted, shifts)
        most = shifted.amax(-1, keepdim=True)
    greedy = [row for row, one in enumerate(samplers) if one.is_greedy]
    sampled = [row for row, one in enumerate(samplers) if not one.is_greedy]
    tokens = torch.zeros(len(samplers), dtype=torch.long, device=logits.device)
    possible = torch.ones_like(tokens)
    if greedy:
        _put(tokens, greedy, _of(shifted, greedy).argmax(-1))
    if sampled:
        chosen = [samplers[row] for row in sampled]
        drawn, total = _drawn(_of(shifted, sampled), _of(most, sampled), chosen)
        _put(tokens, sampled, drawn)
        _put(possible, sampled, torch.isfinite(total).long())
    return _reported(logits, torch.stack([tokens, finite, possible], 1), samplers)


def _reported(logits: Tensor, found: Tensor, samplers: Sequence[Sampler]) -> list[Drawn]:
    """What has been found, [row, 3] of token, is_finite and is_possible, with the log-probabilities asked for."""
    reporting = [row for row, one in enumerate(samplers) if one.sampling.n_logprobs]
    n_top = min(max((one.sampling.n_logprobs for one in samplers), default=0), logits.shape[1])
    # Whole numbers and the bits of the others in one tensor, which is the one that the host reads.
    parts = [found.int()]
    if reporting:
        report = parts[0].new_zeros(len(samplers), 1 + 2 * n_top)
        _put(report, reporting, _report(_of(logits, reporting), _of(found[:, 0], reporting), n_top))
        parts.append(report)
    read = _on_host(torch.cat(parts, 1))
    return [_told(row, one.sampling.n_logprobs) for row, one in zip(read, samplers, strict=True)]


def _drawn(logits: Tensor, most: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor]:
    """Tokens [row], and the sum of the weights they were drawn from, which is no number if nothing can be drawn.

    most: [row, 1], the largest logits.
    """
    n_rows, n_vocab = logits.shape
    numbers = np.empty((4, n_rows, 1), dtype=np.float32)
    for row, one in enumerate(samplers):
        # A temperature beyond float32 becomes infinite: all finite logits are alike then, as they should be.
        with np.errstate(over="ignore"):
            numbers[0, row] = max(one.sampling.temperature, _LEAST_TEMPERATURE)
        numbers[1, row] = one.sampling.top_p
        numbers[2:, row, 0] = one.uniforms()
    temperature, top_p, for_block, for_token = torch.from_numpy(numbers).to(logits.device)
    n_blocks = -(-n_vocab // BLOCK)
    scaled = logits.new_empty(n_rows, n_blocks * BLOCK)
    scaled[:, n_vocab:] = -torch.inf
    # Shifted before the division, so that a tiny temperature does not overflow.
    torch.sub(logits, most, out=scaled[:, :n_vocab]).div_(temperature)
    _add(scaled[:, :n_vocab], [(row, *one.penalties(n_vocab)) for row, one in enumerate(samplers) if one.is_penalised])
    weights = scaled.softmax(-1)
    cut = [row for row, one in enumerate(samplers) if one.sampling.top_p < 1]
    if cut:
        _put(weights, cut, _nucleus(_of(weights, cut), _of(top_p, cut)))
    blocks = weights.view(n_rows, n_blocks, BLOCK)
    sums = blocks.sum(-1)
    block = _inverted(sums, for_block)
    rows = torch.arange(n_rows, device=logits.device)
    token = _inverted(blocks[rows, block], for_token)
    return block * BLOCK + token, sums.sum(-1)


def _add(logits: Tensor, found: Sequence[tuple[int, Numbers, Numbers]]) -> None:
    """In place: to these rows at these ids these amounts, up to one number for all of a row. logits: [row, vocab]"""
    if not found:
        return
    # The largest reward is taken off all instead of added to some: beside it, in float32, logits would lose digits.
    rewards = np.zeros((len(logits), 1))
    for row, _, amounts in found:
        rewards[row] = max(0.0, amounts.max(initial=0.0))
    at = np.concatenate([np.stack([np.full(len(ids), row), ids]) for row, ids, _ in found], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        rests = np.concatenate([amounts - rewards[row] for row, _, amounts in found]).astype(np.float32)
        offsets = rewards.astype(np.float32)
    rows, ids = torch.from_numpy(at).to(logits.device)
    sums = logits[rows, ids] + torch.from_numpy(rests).to(logits.device)
    if offsets.any():
        logits.sub_(torch.from_numpy(offsets).to(logits.device))
    logits[rows, ids] = sums


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Zero but for the likeliest tokens: each that those before it have not brought to top_p. Of equal ones the first.

    [row, vocab] -> [row, vocab]; top_p: [row, 1].
    """
    if weights.device.type != "cpu":
        return _in_order(weights, top_p)
    # Here nobody waits for how many they are, so only those are put in order that may be kept. All others together have
    # less than half of what top_p leaves out.
    totals = weights.cumsum(-1)[:, -1:]
    bounds = (1 - top_p) * totals / (2 * weights.shape[-1])
    kept = torch.zeros_like(weights)
    for into, of_row, bound, share, total in zip(kept, weights, bounds, top_p, totals, strict=True):
        likely = (~(of_row < bound)).nonzero()[:, 0]
        into[likely] = _in_order(of_row[likely], share, total)
    return kept


def _in_order(weights: Tensor, top_p: Tensor, total: Tensor | None = None) -> Tensor:
    """As `_nucleus`, of all tokens, or of the likeliest with the sum of all. [..., n], [..., 1] -> [..., n]"""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1)
    is_kept = sums - ordered < top_p * (sums[..., -1:] if total is None else total)
    is_kept[..., 0] = True
    return torch.zeros_like(weights).scatter_(-1, order, ordered.masked_fill_(~is_kept, 0))


def _inverted(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place at which the running sum passes uniform × total; never one of weight 0. [row, n], [row, 1] -> [row]"""
    sums = weights.cumsum(-1)
    passed = (sums > uniform * sums[:, -1:]) & (weights > 0)
    return passed.int().argmax(-1)  # the first of them


def _report(logits: Tensor, tokens: Tensor, n_top: int) -> Tensor:
    """[row, 1 + 2 × n_top] of int32: bits of the token's log-probability, candidates, bits of theirs (contract 3.8)."""
    norms = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(n_top)
    own = logits.gather(1, tokens[:, None]) - norms
    return torch.cat([own.view(torch.int32), top.indices.int(), (top.values - norms).view(torch.int32)], 1)


def _told(row: Sequence[int], n_logprobs: int) -> Drawn:
    """One row of what the host has read."""
    token, finite, possible, *report = row
    if not n_logprobs:
        return Drawn(token, None, (), bool(finite), bool(possible))
    n_top = len(report) // 2
    numbers = np.asarray(report, dtype=np.int32).view(np.float32).tolist()
    candidates = zip(report[1 : 1 + n_top], numbers[1 + n_top :], strict=True)
    top = [(token_id, max(value, LEAST_LOGPROB)) for token_id, value in candidates][:n_logprobs]
    return Drawn(token, max(numbers[0], LEAST_LOGPROB), tuple(top), bool(finite), bool(possible))


def _on_host(tensor: Tensor) -> list[list[int]]:
    """The copy, for which the host waits until the step is done."""
    return tensor.tolist()


def _of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows; no copy if they are all."""
    return tensor if len(rows) == len(tensor) else tensor[torch.tensor(rows, device=tensor.device)]


def _put(tensor: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """In place."""
    if len(rows) == len(tensor):
        tensor.copy_(values)
    else:
        tensor[torch.tensor(rows, device=tensor.device)] = values
