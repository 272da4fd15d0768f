"""Edits, selections, conditions, limits of doses, rules and what is told of edits in random mixes: merged, in pieces,
alone, and by hand over plain Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import OF_DIRECTIONS, OF_FEATURES, Do
from neuronpedia_inference.engine.protocol import RowSpec
from tests import architectures, models
from tests.edits_by_hand import IN_A_BLOCK, NORMS, TRANSCODERS, Hand, HandRule, Text, When, ruled, sae
from tests.engine.engines import engine
from tests.engine.test_edits import SELECTIONS
from tests.engine.test_merging import PROMPTS, staggered
from tests.engine.test_pieces import joined_in_pieces
from tests.engine.test_retry import by_hand, numbers, told, with_rules

assert architectures  # it adds models when it is imported
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3_moe")
N_TOKENS = 5
LAYERS = {models.EMBEDDED: (2, 13, 24)}
"""Where others than the first three are edited and looked at."""


def layer_of(family: str, number: int) -> int:
    return LAYERS.get(family, (0, 1, 2))[number]


def width_of(family: str) -> int:
    return models.model(family).config.hidden_size


@cache
def size_at(family: str, layer: int, place: str) -> float:
    """Of what is there."""
    return float(models.read(models.model(family), family, PROMPTS[0], layer, place).norm(dim=-1).median())


@cache
def direction(seed: int, width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@st.composite
def conditions(draw: st.DrawFn, family: str, layer: int, place: str) -> When | None:
    if not draw(st.booleans()):
        return None
    at, seen = layer_of(family, draw(st.integers(0, 2))), draw(st.sampled_from(IN_A_BLOCK))
    size = size_at(family, at, seen)
    is_late = (at, IN_A_BLOCK.index(seen)) > (layer, IN_A_BLOCK.index(place))
    n_tokens = draw(st.sampled_from((2, 3, None) if is_late else (1, 2, None)))
    of = sae("standard", size=round(size, 1), width=width_of(family))
    return When(of, draw(st.integers(0, 5)), at, seen, draw(st.floats(0.1, 1.0)) * size, n_tokens, draw(st.booleans()))


@st.composite
def edits(draw: st.DrawFn, family: str, *, can_transcode: bool) -> Hand:
    layer, place = layer_of(family, draw(st.integers(0, 2))), draw(st.sampled_from(IN_A_BLOCK))
    width = width_of(family)
    kinds = ["vector", "standard", "jumprelu", "gated", *(TRANSCODERS if can_transcode else ())]
    kind = draw(st.sampled_from(kinds))
    place = "hook_mlp_out" if kind in TRANSCODERS else place
    on, chosen = draw(st.sampled_from(list(SELECTIONS.values())))
    do = draw(st.sampled_from(sorted(OF_DIRECTIONS if kind == "vector" else OF_FEATURES)))
    is_factor = do in (Do.SCALE, Do.ORTHOGONAL)
    size = 1.0 if is_factor else size_at(family, layer, place) / (width**0.5 if kind == "vector" else 1.0)
    is_dose = not is_factor and draw(st.integers(0, 4)) == 0
    common: dict[str, Any] = {
        "amount": draw(st.floats(-4, 4)) * (1.0 if is_dose else size),
        "is_dose": is_dose,
        "on": on,
        "chosen": chosen,
        "when": draw(conditions(family, layer, place)),
        "most": draw(st.sampled_from((math.inf, math.inf, 0.3))),
    }
    if kind == "vector":
        seed = draw(st.integers(0, 3))
        given = direction(9, width) if do is Do.SWAP else None
        return Hand(do, layer, place, vector=direction(seed, width), gives_to=given, **common)
    norm = draw(st.sampled_from(NORMS)) if kind not in TRANSCODERS and not is_dose else "none"
    subtracts = draw(st.booleans()) and kind not in TRANSCODERS
    of = sae(kind, norm, subtracts=subtracts, size=round(size, 1) or 1.0, width=width)
    index = draw(st.integers(0, 5))
    return Hand(do, layer, place, of=of, index=index, gives_to=index + 1 if do is Do.SWAP else None, **common)


@st.composite
def rules(draw: st.DrawFn, family: str) -> HandRule:
    """On a feature of a block's output, which fires at about every third token."""
    layer = layer_of(family, draw(st.integers(0, 2)))
    size = size_at(family, layer_of(family, 0), "hook_resid_post")
    of = sae("standard", size=round(size, 1), width=width_of(family))
    above = draw(st.floats(0.3, 1.2)) * size
    when = When(of, draw(st.integers(0, 5)), layer, "hook_resid_post", above, draw(st.sampled_from((1, 2))))
    return HandRule(when, draw(st.integers(0, 3)), draw(st.integers(1, 2)))


Mix = tuple[list[Hand], list[HandRule], RowSpec]


@st.composite
def batches(draw: st.DrawFn, families: Sequence[str]) -> tuple[str, list[Mix]]:
    family = draw(st.sampled_from(families))
    mixes: list[Mix] = []
    for _ in range(draw(st.integers(2, 3))):
        transcoded = draw(st.lists(edits(family, can_transcode=True), max_size=1))
        hands = [*transcoded, *draw(st.lists(edits(family, can_transcode=False), min_size=1, max_size=3))]
        ruling = draw(st.lists(rules(family), max_size=2))
        edited = tuple(hand.resolved() for hand in hands)
        row = RowSpec(draw(st.sampled_from(PROMPTS)), Sampling(N_TOKENS), edited, tells_edits=draw(st.booleans()))
        mixes.append((hands, ruling, with_rules(row, ruling)))
    return family, mixes


def numbers_by_hand(text: Text, mix: Mix) -> np.ndarray:
    """[pos, n]: what is told of the edits, which is nothing where they do not act, and then what the rules look at, at
    every token of the finished text."""
    hands, ruling, row = mix
    done = [text.done[hand].numpy() for hand in hands] if row.tells_edits else []
    found = [np.where(one[:, :1] > 0, one, 0) for one in done]
    return np.concatenate([*found, *([by_hand(text, ruling, row)] if ruling else [])], axis=1)


def check_mixes(n_examples: int, families: Sequence[str] = FAMILIES) -> tuple[int, int, int]:
    """Rows that were compared, those of them that their edits change, and tokens that were taken back."""
    n_compared = n_changed = n_refused = 0

    @settings(max_examples=n_examples)
    @given(batches(families))
    def check(batch: tuple[str, list[Mix]]) -> None:
        nonlocal n_compared, n_changed, n_refused
        family, mixes = batch
        rows = [row for *_, row in mixes]
        late = staggered(engine(family).lane, rows, 1)
        pieces = joined_in_pieces(family, rows, 4)
        for mix, one, other in zip(mixes, late, pieces, strict=True):
            hands, ruling, row = mix
            with suppress(models.NearTie):
                text = Text(family, hands, row.prompt_ids, [rule.when for rule in ruling])
                expected = ruled(text, N_TOKENS, ruling)
                (alone,) = staggered(engine(family).lane, [row], 1)
                for way in (one, other, alone):
                    assert told(way) == expected
                    if row.is_read:
                        wanted = numbers_by_hand(text, mix)
                        size = np.abs(wanted).max(axis=0).clip(1)
                        np.testing.assert_allclose(numbers(way) / size, wanted / size, rtol=0, atol=1e-4)
                n_compared += 1
                n_refused += len(expected[2])
                n_changed += expected[0] != models.greedy(models.model(family), row.prompt_ids, N_TOKENS)

    check()
    return n_compared, n_changed, n_refused


def test_any_mix_of_edits_is_what_it_is_by_hand() -> None:
    n_compared, n_changed, n_refused = check_mixes(20)
    assert n_compared > 20, "most rows are compared"
    assert n_changed > n_compared / 4, "and many are others without their edits"
    assert n_refused > 0


def test_any_mix_of_edits_of_the_embedded_model_is_what_it_is_by_hand() -> None:
    n_compared = n_changed = 0
    while not n_changed and n_compared < 20:  # by chance none of a few changes the text
        found = check_mixes(2, [models.EMBEDDED])
        n_compared, n_changed = n_compared + found[0], n_changed + found[1]
    assert n_compared > 2
    assert n_changed > 0


@pytest.mark.long
def test_many_mixes_of_edits_of_the_embedded_model_are_what_they_are_by_hand() -> None:
    n_compared, n_changed, n_refused = check_mixes(8, [models.EMBEDDED])
    assert n_compared > 8
    assert n_changed > 0
    assert n_refused > 0


@pytest.mark.long
def test_many_mixes_of_edits_are_what_they_are_by_hand() -> None:
    n_compared, _, n_refused = check_mixes(200)
    assert n_compared > 200
    assert n_refused > 20
