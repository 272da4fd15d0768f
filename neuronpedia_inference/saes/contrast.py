"""Which features separate two sets of texts.

Of every text a feature has one number, its mean activation over the text's tokens (special tokens aside). The effect
size is Cohen's d of these numbers with a constant added to its denominator,

    d = (mean_a − mean_b) / (sqrt((var_a + var_b) / 2) + s0)

where s0 is the median of that root over the features that fire on some text: without it features that hardly fire, and
hardly vary, would come first (Tusher, Tibshirani and Chu, PNAS 98, 2001, equation 1). Where nothing varies, because
each set is one text, s0 is the median of their means instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuronpedia_inference.domain import ContrastedFeature, Numbers
from neuronpedia_inference.saes.encode import FeatureReader
from neuronpedia_inference.saes.order import stable_topk
from neuronpedia_inference.saes.reduce import Pauses, block_of, on_host, require_finite

ALIKE = 0.7
"""Cosine of two decoder rows from which on their features count as one."""
MOST_FIRED = 0.5
"""Share of all tokens from which on a feature of unknown density counts as dense."""
CANDIDATES = 4
"""Features looked at for each that is asked for, because some are alike."""


@dataclass(frozen=True)
class TextMeans:
    """Features of one source on several texts."""

    means: Tensor
    """[text, feature]"""
    fires: Tensor
    """[text, feature] bool"""
    fired_share: Tensor
    """[feature]: of all tokens."""


def text_means(reader: FeatureReader, xs: Sequence[Tensor], counted: Sequence[Tensor]) -> Pauses[TextMeans]:
    """xs: [pos, width] of each text; counted: [pos] bool, the tokens that count, at least one of each text."""
    n_features = reader.source.n_features
    means = torch.zeros(len(xs), n_features)
    n_fired = torch.zeros(len(xs), n_features)
    for text, (x, counts) in enumerate(zip(xs, counted, strict=True)):
        for first, every in reader.blocks(x, block_of(x)):  # of the whole text, for some attend to earlier tokens
            acts = every[counts.to(every.device)]
            del every
            require_finite(acts, reader)
            columns = slice(first, first + acts.shape[1])
            means[text, columns] = acts.mean(dim=0).cpu()
            n_fired[text, columns] = (acts > 0).sum(dim=0).float().cpu()
            del acts
            yield
    n_tokens = sum(int(counts.sum()) for counts in counted)
    return TextMeans(means, n_fired > 0, n_fired.sum(dim=0) / n_tokens)


def effect_sizes(means: Tensor, n_a: int) -> Tensor:
    """[text, feature], of which the first n_a texts are set a -> [feature]: above zero where a has more."""
    a, b = means[:n_a], means[n_a:]
    spread = ((a.var(dim=0, correction=0) + b.var(dim=0, correction=0)) / 2).sqrt()
    fires = (means != 0).any(dim=0)
    if not bool(fires.any()):
        return torch.zeros(means.shape[1])
    least = spread[fires].median()
    if float(least) == 0.0:
        least = means.mean(dim=0)[fires].median()
    return (a.mean(dim=0) - b.mean(dim=0)) / (spread + least)


def strongest(
    reader: FeatureReader, found: TextMeans, n_a: int, limit: int, dense: Tensor | None
) -> tuple[list[ContrastedFeature], int]:
    """The candidates of one source for both sides, by falling absolute effect size; how many were left out as dense.

    dense: [feature] bool; None where nothing is known, when those that fire on half of all tokens are.
    """
    effect = effect_sizes(found.means, n_a)
    left_out = found.fired_share > MOST_FIRED if dense is None else dense
    effect = torch.where(left_out, 0.0, effect)
    chosen: list[int] = []
    for side in (effect, -effect):
        values, indices = stable_topk(side, min(CANDIDATES * limit, len(side)))
        chosen += indices[values > 0].tolist()
    features = [_feature(reader, found, n_a, index, float(effect[index])) for index in chosen]
    n_dense = int((left_out & found.fires.any(dim=0)).sum())
    return sorted(features, key=lambda one: -abs(one.effect_size)), n_dense


def _feature(reader: FeatureReader, found: TextMeans, n_a: int, index: int, effect: float) -> ContrastedFeature:
    means, fires = found.means[:, index], found.fires[:, index].float()
    return ContrastedFeature(
        source=reader.source.name,
        index=index,
        effect_size=effect,
        mean_a=float(means[:n_a].mean()),
        mean_b=float(means[n_a:].mean()),
        share_a=float(fires[:n_a].mean()),
        share_b=float(fires[n_a:].mean()),
        row=_unit_row(reader, index),
    )


def _unit_row(reader: FeatureReader, index: int) -> Numbers | None:
    if not reader.has_rows:
        return None
    row = reader.decoder_row(index)
    return on_host(row / row.norm().clamp(min=1e-8))


def grouped(features: Sequence[ContrastedFeature], limit: int) -> list[list[ContrastedFeature]]:
    """The first `limit` groups: each feature joins the first group whose leader's decoder row is like its own."""
    groups: list[list[ContrastedFeature]] = []
    for feature in features:
        group = next((group for group in groups if _are_alike(group[0], feature)), None)
        if group is not None:
            group.append(feature)
        else:
            groups.append([feature])
    return groups[:limit]


def _are_alike(one: ContrastedFeature, other: ContrastedFeature) -> bool:
    if one.row is None or other.row is None or one.row.shape != other.row.shape:
        return False
    return float(one.row @ other.row) >= ALIKE
