"""Two ways to the same numbers agree up to rounding; what overflows agrees with nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.engine.agreement import agree, logits_agree

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def row(*numbers: float, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.tensor([numbers], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_up_to_rounding(dtype: torch.dtype) -> None:
    expected = row(3, 4, dtype=dtype)
    assert agree(expected * (1 + torch.finfo(dtype).eps), expected)
    assert not agree(expected * 1.5, expected)
    assert not agree(row(3, dtype=dtype), expected)


@pytest.mark.parametrize(
    ("found", "expected", "beside"),
    [
        ((-7, 900), (1, INF), ()),
        ((-7, 900), (1, 2), ((1, INF),)),
        ((1, INF), (1, INF), ()),
        ((1, INF), (1, 2), ()),
        ((1, NAN), (1, 2), ()),
        ((1, 2), (1, 2), ((NAN, 1),)),
    ],
)
def test_what_is_not_finite_agrees_with_nothing(
    found: tuple[float, ...], expected: tuple[float, ...], beside: tuple[tuple[float, ...], ...]
) -> None:
    """The allowed error would be infinite too."""
    assert not agree(row(*found), row(*expected), *(row(*one) for one in beside))
    if not beside:
        assert not logits_agree(row(*found), row(*expected), torch.float16)
