"""Tokens that a direction promotes, against Hugging Face's own norms and heads, taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.engine.engines import engine

K = 6


def by_hand(family: str, d: Tensor) -> Tensor:
    """[vocab]: W_U (gain ⊙ d / |d|); for LayerNorm d without its mean, and of unit length so."""
    net: Any = models.model(family)
    if family == "gpt2":
        gain, centred = net.transformer.ln_f.weight, d - d.mean()
    elif family == "neox":
        gain, centred = net.gpt_neox.final_layer_norm.weight, d - d.mean()
    else:
        gain, centred = net.model.norm.weight, d
    if family == "gemma2":
        gain = 1 + gain
    return net.get_output_embeddings().weight @ (gain * centred / centred.norm())


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_both_ends_are_those_of_the_direct_path(family: str, size: float) -> None:
    d = torch.randn(32, generator=torch.Generator().manual_seed(5)) * size
    effects = engine(family).token_effects(d, K)
    logits = by_hand(family, d)
    for found, sign in ((effects.promoted, 1), (effects.suppressed, -1)):
        best = (sign * logits).topk(K)
        assert [one.index for one in found] == best.indices.tolist()
        assert [sign * one.value for one in found] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert effects.off_because == ""


def test_no_direction_promotes_nothing() -> None:
    effects = engine("llama").token_effects(torch.zeros(32), K)
    assert (effects.promoted, effects.off_because) == ((), "its decoder row is zero")


def test_there_are_no_more_tokens_than_the_vocabulary_has() -> None:
    effects = engine("llama").token_effects(torch.ones(32), 10_000)
    assert len(effects.promoted) == len(effects.suppressed) == models.VOCAB_SIZE
