"""Edits, selections and conditions in random mixes: merged, in pieces, alone, and by hand over plain Hugging Face."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import OF_DIRECTIONS, OF_FEATURES, Do
from neuronpedia_inference.engine.protocol import RowSpec
from tests import architectures, models
from tests.edits_by_hand import IN_A_BLOCK, NORMS, TRANSCODERS, WIDTH, Hand, When, greedy, sae
from tests.engine.engines import engine
from tests.engine.test_edits import SELECTIONS
from tests.engine.test_merging import PROMPTS, ids, staggered
from tests.engine.test_pieces import joined_in_pieces

assert architectures  # it adds models when it is imported
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3_moe")
N_TOKENS = 5


@cache
def size_at(family: str, layer: int, place: str) -> float:
    """Of what is there."""
    return float(models.read(models.model(family), family, PROMPTS[0], layer, place).norm(dim=-1).median())


@cache
def direction(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@st.composite
def conditions(draw: st.DrawFn, family: str, layer: int, place: str) -> When | None:
    if not draw(st.booleans()):
        return None
    at, seen = draw(st.integers(0, 2)), draw(st.sampled_from(IN_A_BLOCK))
    size = size_at(family, at, seen)
    is_late = (at, IN_A_BLOCK.index(seen)) > (layer, IN_A_BLOCK.index(place))
    n_tokens = draw(st.sampled_from((2, 3, None) if is_late else (1, 2, None)))
    of = sae("standard", size=round(size, 1))
    return When(of, draw(st.integers(0, 5)), at, seen, draw(st.floats(0.1, 1.0)) * size, n_tokens, draw(st.booleans()))


@st.composite
def edits(draw: st.DrawFn, family: str, *, can_transcode: bool) -> Hand:
    layer, place = draw(st.integers(0, 2)), draw(st.sampled_from(IN_A_BLOCK))
    kinds = ["vector", "standard", "jumprelu", "gated", *(TRANSCODERS if can_transcode else ())]
    kind = draw(st.sampled_from(kinds))
    place = "hook_mlp_out" if kind in TRANSCODERS else place
    on, chosen = draw(st.sampled_from(list(SELECTIONS.values())))
    do = draw(st.sampled_from(sorted(OF_DIRECTIONS if kind == "vector" else OF_FEATURES)))
    is_factor = do in (Do.SCALE, Do.ORTHOGONAL)
    size = 1.0 if is_factor else size_at(family, layer, place) / (WIDTH**0.5 if kind == "vector" else 1.0)
    is_dose = not is_factor and draw(st.integers(0, 4)) == 0
    common: dict[str, Any] = {
        "amount": draw(st.floats(-4, 4)) * (1.0 if is_dose else size),
        "is_dose": is_dose,
        "on": on,
        "chosen": chosen,
        "when": draw(conditions(family, layer, place)),
    }
    if kind == "vector":
        seed = draw(st.integers(0, 3))
        return Hand(
            do, layer, place, vector=direction(seed), gives_to=direction(9) if do is Do.SWAP else None, **common
        )
    norm = draw(st.sampled_from(NORMS)) if kind not in TRANSCODERS and not is_dose else "none"
    of = sae(kind, norm, subtracts=draw(st.booleans()) and kind not in TRANSCODERS, size=round(size, 1) or 1.0)
    index = draw(st.integers(0, 5))
    return Hand(do, layer, place, of=of, index=index, gives_to=index + 1 if do is Do.SWAP else None, **common)


@st.composite
def batches(draw: st.DrawFn) -> tuple[str, list[list[Hand]], list[RowSpec]]:
    family = draw(st.sampled_from(FAMILIES))
    of_rows = []
    for _ in range(draw(st.integers(2, 3))):
        transcoded = draw(st.lists(edits(family, can_transcode=True), max_size=1))
        others = draw(st.lists(edits(family, can_transcode=False), min_size=1, max_size=3))
        of_rows.append([*transcoded, *others])
    rows = [
        RowSpec(draw(st.sampled_from(PROMPTS)), Sampling(N_TOKENS), tuple(hand.resolved() for hand in hands))
        for hands in of_rows
    ]
    return family, of_rows, rows


def test_any_mix_of_edits_is_what_it_is_by_hand() -> None:
    changed: list[bool] = []

    @settings(max_examples=20)
    @given(batches())
    def check(batch: tuple[str, list[list[Hand]], list[RowSpec]]) -> None:
        family, of_rows, rows = batch
        late = staggered(engine(family).lane, rows, 1)
        pieces = joined_in_pieces(family, rows, 4)
        for hands, row, one, other in zip(of_rows, rows, late, pieces, strict=True):
            with suppress(models.NearTie):
                expected = greedy(family, hands, row.prompt_ids, N_TOKENS)
                (alone,) = staggered(engine(family).lane, [row], 1)
                assert ids(one) == ids(other) == ids(alone) == expected
                changed.append(expected != models.greedy(models.model(family), row.prompt_ids, N_TOKENS))

    check()
    assert len(changed) > 20, "most rows are compared"
    assert sum(changed) > len(changed) / 4, "and many are others without their edits"
