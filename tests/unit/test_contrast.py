"""Effect sizes and groups, against formulas written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuronpedia_inference.domain import ContrastedFeature
from neuronpedia_inference.saes.contrast import effect_sizes, grouped


def test_effect_sizes_by_hand() -> None:
    a = np.array([[4.0, 1.0, 0.0, 2.0], [6.0, 1.0, 0.0, 0.0]])
    b = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 3.0, 0.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
    spread = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2)
    least = np.sort(spread[[0, 1, 3]])[1]
    expected = (a.mean(axis=0) - b.mean(axis=0)) / (spread + least)
    found = effect_sizes(torch.tensor(np.concatenate((a, b)), dtype=torch.float32), 2)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert found[2] == 0, "what never fires has no effect"


def test_one_text_against_one() -> None:
    found = effect_sizes(torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), 1)
    assert found.tolist() == [4.0, 0.0, -2.0]  # the median of the means 2, 1, 1 is 1
    assert effect_sizes(torch.zeros(2, 3), 1).tolist() == [0, 0, 0]


def one(index: int, *row: float) -> ContrastedFeature:
    return ContrastedFeature("s", index, 1.0, 1.0, 0.0, 1.0, 0.0, np.array(row, np.float32) if row else None)


def test_features_that_point_the_same_way_are_one_group() -> None:
    features = [one(1, 1, 0), one(2, 0, 1), one(3, 0.8, 0.6), one(4), one(5, 1, 0, 0), one(6, -1, 0)]
    groups = [[member.index for member in group] for group in grouped(features, 10)]
    assert groups == [[1, 3], [2], [4], [5], [6]]
    assert len(grouped(features, 2)) == 2
