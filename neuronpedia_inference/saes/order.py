"""Largest first, ties by index: an order that does not depend on how the work was cut into blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64
"""Values of which at first only the largest is looked at."""
WORTH_BLOCKS = 8
"""So many blocks for each that is chosen, or more, are looked at that way."""

Choice = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""[..., n] -> the k largest along the last axis and their indices, both [..., k]"""


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[..., n] -> the k largest along the last axis and their indices, both [..., k]; equal values by index.

    `torch.topk` picks any of several equal values; a stable sort of everything costs several times as much.
    """
    return _by_blocks(values, k, _stable)


def any_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.topk`, which of several equal values picks any, in about the time of reading long rows once."""
    return _by_blocks(values, k, torch.topk)


def _by_blocks(values: Tensor, k: int, choose: Choice) -> tuple[Tensor, Tensor]:
    """The k largest lie in the k blocks with the largest maxima: whatever lies in another has k before it."""
    n = values.shape[-1]
    n_blocks = n // BLOCK
    if n_blocks < WORTH_BLOCKS * max(1, k):
        return choose(values, k)
    end = n_blocks * BLOCK
    maxima = values[..., :end].unflatten(-1, (n_blocks, BLOCK)).amax(-1)
    blocks = choose(maxima, k)[1].sort(-1).values[..., None]
    inside = (BLOCK * blocks + torch.arange(BLOCK, device=values.device)).flatten(-2)
    behind = torch.arange(end, n, device=values.device).expand(*values.shape[:-1], -1)
    indices = torch.cat((inside, behind), dim=-1)  # ascending, so that equal values keep their order
    found, places = choose(values.gather(-1, indices), k)
    return found, indices.gather(-1, places)


def _stable(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 0:
        return values[..., :0], torch.empty_like(values[..., :0], dtype=torch.long)
    top = values.topk(k, dim=-1)
    least = top.values[..., -1:]
    # Index precision: float32 is exact up to 2**24 features.
    countdown = -torch.arange(values.shape[-1], dtype=torch.float32, device=values.device)
    tied = torch.where(values == least, countdown, -torch.inf).topk(k, dim=-1).indices
    above = (top.values > least).sum(dim=-1, keepdim=True)
    place = torch.arange(k, device=values.device)
    fill = tied.gather(-1, (place - above).clamp(min=0))
    chosen = torch.where(place < above, top.indices, fill).sort(dim=-1).values
    found, order = values.gather(-1, chosen).sort(dim=-1, descending=True, stable=True)
    return found, chosen.gather(-1, order)


def merge_topk(kept: tuple[Tensor, ...], more: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    """Join two results of `stable_topk` (values, indices), all indices of `kept` below those of `more`.

    What else comes with them goes the way of the indices.
    """
    values, order = torch.cat((kept[0], more[0]), dim=-1).sort(dim=-1, descending=True, stable=True)
    others = (torch.cat(pair, dim=-1).gather(-1, order[..., :k]) for pair in zip(kept[1:], more[1:], strict=True))
    return values[..., :k], *others
