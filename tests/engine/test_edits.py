"""Every edit against the same done by hand over plain Hugging Face and SAELens, merged and alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.edits.row_table import RowTable
from neuronpedia_inference.edits.select import Phase, Selection
from neuronpedia_inference.edits.table import EditTable
from neuronpedia_inference.engine.protocol import RowId, RowSpec
from tests import models
from tests.edits_by_hand import KINDS, NORMS, TRANSCODERS, WIDTH, Hand, Text, When, edited, greedy, sae
from tests.engine.engines import engine
from tests.engine.test_merging import PROMPTS, ids, staggered
from tests.engine.test_pieces import joined_in_pieces
from tests.host_reads import HostReads

PLACE = "hook_resid_post"
FAMILIES = ("llama", "gemma2", "gpt2")
ROUNDING = 1e-5
"""Relative to the largest number: √32 products of float32 are off by 3e-7, and SAELens adds in another order thrice."""


def states(n: int = 9, size: float = 3.0) -> Tensor:
    """[pos, width], seeded, one of them far larger than the others."""
    found = size * torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))
    found[1] *= 50
    return found


def after(h: Tensor, *hands: Hand) -> Tensor:
    """What the library makes of it. [pos, width] -> [pos, width]"""
    return EditTable([RowTable([hand.resolved() for hand in hands])])(h[None])[0]


def by_hand(h: Tensor, *hands: Hand) -> Tensor:
    return edited(h, hands, Text("llama", hands, range(len(h))), 1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())


OF_FEATURES = (
    Hand(Do.CLAMP, 1, PLACE, 5.0),
    Hand(Do.SCALE, 1, PLACE, 2.5),
    Hand(Do.SCALE, 1, PLACE, 0.0),
    Hand(Do.AT_LEAST, 1, PLACE, 2.0),
    Hand(Do.AT_MOST, 1, PLACE, 1.0),
    Hand(Do.SWAP, 1, PLACE, gives_to=7),
)


@pytest.mark.parametrize(("kind", "norm", "subtracts"), list(product(KINDS, NORMS, (False, True))))
def test_what_an_sae_does_not_explain_stays(kind: str, norm: str, subtracts: bool) -> None:
    """h' − decode(edited activations) = h − decode(encode(h)), by SAELens's own encode and decode."""
    of, h = sae(kind, norm, subtracts=subtracts, size=3.0), states()
    numbers = of.encode(h)
    firing = [index for index in range(24) if 2 < int((numbers[:, index] > 0).sum()) < len(h)][:4]
    assert len(firing) == 4, "features must fire on some positions and not on others"
    clamped, scaled, raised, silenced = firing
    hands = [
        Hand(Do.CLAMP, 1, PLACE, 5.0, of=of, index=clamped),
        Hand(Do.SCALE, 1, PLACE, 2.5, of=of, index=scaled),
        Hand(Do.AT_LEAST, 1, PLACE, 2.0, of=of, index=raised),
        Hand(Do.SCALE, 1, PLACE, 0.0, of=of, index=silenced),
    ]
    changed = after(h, *hands)
    wanted = numbers.clone()
    wanted[:, clamped] = 5.0
    wanted[:, scaled] *= 2.5
    wanted[:, raised] = wanted[:, raised].clamp(min=2.0)
    wanted[:, silenced] = 0.0
    of.encode(h)
    left = h - of.decode(numbers)
    of.encode(h)
    assert close(changed - of.decode(wanted), left)
    assert not close(changed, h)


@pytest.mark.parametrize(("kind", "norm", "subtracts"), list(product(KINDS, NORMS, (False, True))))
def test_a_feature_is_read_in_the_units_that_activations_are_told_in(kind: str, norm: str, subtracts: bool) -> None:
    """A number that is set to what it is anyway changes nothing; one that is not does."""
    of, h = sae(kind, norm, subtracts=subtracts, size=3.0), states()
    numbers = of.encode(h)
    at = int(numbers.max(-1).values.argmax())
    index = int(numbers[at].argmax())
    same = after(h, Hand(Do.CLAMP, 1, PLACE, float(numbers[at, index]), of=of, index=index))
    assert (same[at] - h[at]).norm() <= ROUNDING * h[at].norm()
    more = after(h, Hand(Do.CLAMP, 1, PLACE, 2 * float(numbers[at, index]), of=of, index=index))
    assert (more[at] - h[at]).norm() > 100 * ROUNDING * h[at].norm()


@pytest.mark.parametrize("hand", OF_FEATURES, ids=lambda hand: f"{hand.do.value} {hand.amount:g}")
@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_of_a_feature(hand: Hand, kind: str) -> None:
    of, h = sae(kind, size=3.0), states()
    index = int((of.encode(h) > 0).sum(0).argmax())
    hand = replace(hand, of=of, index=index, gives_to=hand.gives_to and (index + 1) % 24)
    assert close(after(h, hand), by_hand(h, hand))
    assert not close(after(h, hand), h)


def test_every_edit_of_a_direction() -> None:
    h = states()
    vector, other = (torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    for do, amount in ((Do.ADD, 2.0), (Do.ORTHOGONAL, -3.0), (Do.CAP, 0.5), (Do.FLOOR, 0.5), (Do.PROJECT_OUT, 0.0)):
        hand = Hand(do, 1, PLACE, amount, vector=vector)
        assert close(after(h, hand), by_hand(h, hand)), do
        assert not close(after(h, hand), h), do
    swap = Hand(Do.SWAP, 1, PLACE, vector=vector, gives_to=other)
    assert close(after(h, swap), by_hand(h, swap))
    assert not close(after(h, swap), by_hand(h, Hand(Do.PROJECT_OUT, 1, PLACE, vector=vector)))


@pytest.mark.parametrize("do", [Do.ADD, Do.CLAMP, Do.AT_LEAST, Do.AT_MOST, Do.CAP, Do.FLOOR])
def test_a_dose_is_measured_before_the_first_edit(do: Do) -> None:
    """The vector before it makes h ten times as long."""
    h = states()
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    first = Hand(Do.ADD, 1, PLACE, 30.0, vector=torch.ones(WIDTH))
    of = sae("standard", size=3.0)
    along: dict[str, Any] = {"vector": vector} if do in (Do.CAP, Do.FLOOR) else {"of": of, "index": 3}
    dosed = Hand(do, 1, PLACE, 0.4, is_dose=True, **along)
    assert close(after(h, first, dosed), by_hand(h, first, dosed))
    assert not close(after(h, first, dosed), after(h, dosed) + 30.0) or do is Do.ADD
    assert not close(after(h, first, dosed), by_hand(h, first, replace(dosed, is_dose=False)))


def test_the_norm_of_a_dose_neither_overflows_nor_vanishes() -> None:
    up = torch.zeros(WIDTH).index_fill(0, torch.tensor([2]), 1.0)
    for size in (1e30, 1e-30):
        h = torch.full((1, WIDTH), size)
        moved = after(h, Hand(Do.ADD, 1, PLACE, 0.5, vector=up, is_dose=True)) - h
        assert float(moved[0, 2]) == pytest.approx(0.5 * size * WIDTH**0.5, rel=1e-5)
    still = after(torch.zeros(1, WIDTH), Hand(Do.ADD, 1, PLACE, 0.5, vector=up, is_dose=True))
    assert bool((still == 0).all())


def test_features_of_a_group_read_the_same_h_and_act_on_one_number() -> None:
    of, h = sae("standard", size=3.0), states()
    first, second = (int(i) for i in (of.encode(h) > 0).sum(0).topk(2).indices)
    clamp = Hand(Do.CLAMP, 1, PLACE, 60.0, of=of, index=first)
    half = Hand(Do.SCALE, 1, PLACE, 0.5, of=of, index=first)
    other = Hand(Do.CLAMP, 1, PLACE, 8.0, of=of, index=second)
    assert close(after(h, clamp, half), by_hand(h, replace(clamp, amount=30.0)))
    assert close(after(h, clamp, other, half), by_hand(h, clamp, other, half))
    # One after the other, each would read what the one before has left, which is something else.
    assert not close(after(h, clamp, other), after(after(h, clamp), other))
    swap = Hand(Do.SWAP, 1, PLACE, of=of, index=first, gives_to=second)
    assert close(after(h, clamp, swap, other), by_hand(h, clamp, swap, other))
    assert close(after(h, clamp, swap), by_hand(h, clamp, swap))


def test_an_addition_ends_a_group() -> None:
    of, h = sae("standard", size=3.0), states()
    index = int((of.encode(h) > 0).sum(0).argmax())
    clamp = Hand(Do.CLAMP, 1, PLACE, 6.0, of=of, index=index)
    add = Hand(Do.ADD, 1, PLACE, 9.0, of=of, index=index)
    assert close(after(h, clamp, add, clamp), by_hand(h, clamp, add, clamp))
    assert not close(after(h, clamp, add, clamp), after(h, clamp, add))


SELECTIONS: dict[str, tuple[Selection, Any]] = {
    "prompt": (Selection(Phase.PROMPT), lambda at, token, n: at < n),
    "generated": (Selection(Phase.GENERATED), lambda at, token, n: at >= n),
    "positions": (Selection(positions=(1, 2, 9)), lambda at, token, n: at in (1, 2, 9)),
    "from to": (Selection(start=1, stop=3), lambda at, token, n: 1 <= (at if at < n else at - n) < 3),
    "first": (Selection(Phase.GENERATED, first=2), lambda at, token, n: n <= at < n + 2),
    "last": (Selection(Phase.PROMPT, last=2), lambda at, token, n: n - 2 <= at < n),
    "tokens": (Selection(token_ids=tuple(range(40, 130))), lambda at, token, n: 40 <= token < 130),
    "except": (
        Selection(but=(Selection(positions=(0,)), Selection(token_ids=(33, 44)))),
        lambda at, token, n: at != 0 and token not in (33, 44),
    ),
    "ramp": (Selection(Phase.GENERATED, ramp=(1, 4)), lambda at, token, n: min(1, (at - n - 1) / 3) if at > n else 0),
    "fade": (Selection(ramp=(4, 0)), lambda at, token, n: max(0, min(1, 1 - (at if at < n else at - n) / 4))),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_selection_merged_in_pieces_and_alone(family: str) -> None:
    """One row for each, which decode in one batch, against loops by hand."""
    hidden = models.read(models.model(family), family, PROMPTS[0], 1, PLACE)
    size = float(hidden.norm(dim=-1).mean())
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    rows, hands = [], []
    for number, (on, chosen) in enumerate(SELECTIONS.values()):
        do = (Do.ADD, Do.CAP)[number % 2]
        amount = 1.5 * size / float(vector.norm()) if do is Do.ADD else -2 * size
        hands.append([Hand(do, 1, PLACE, amount, vector=vector, on=on, chosen=chosen)])
        rows.append(RowSpec(PROMPTS[number % 4], Sampling(8), (hands[-1][0].resolved(),)))
    same_tokens(family, rows, hands)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["hook_resid_post", "hook_resid_mid", "attn.hook_z", "hook_mlp_out"])
def test_rows_with_different_edits_decode_in_one_batch(family: str, place: str) -> None:
    hidden = models.read(models.model(family), family, PROMPTS[0], 1, place)
    size = float(hidden.norm(dim=-1).median())
    of = sae("jumprelu", size=size / WIDTH**0.5)
    gated = sae("gated", "constant_norm_rescale")
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    some: dict[str, Any] = {"on": SELECTIONS["except"][0], "chosen": SELECTIONS["except"][1]}
    hands = [
        [Hand(Do.CLAMP, 1, place, 3 * size, of=of, index=2, **some)],
        [Hand(Do.CLAMP, 1, place, 30.0, of=gated, index=3), Hand(Do.SCALE, 1, place, 9.0, of=gated, index=4)],
        [],
        [Hand(Do.SCALE, 1, place, -20.0, of=of, index=5), Hand(Do.ADD, 1, place, 2 * size, of=of, index=1)],
        [Hand(Do.ADD, 1, place, 3.0, vector=vector, is_dose=True), Hand(Do.FLOOR, 1, place, 5 * size, vector=vector)],
        [Hand(Do.AT_LEAST, 1, place, 4 * size, of=of, index=6), Hand(Do.SWAP, 1, place, of=of, index=6, gives_to=7)],
    ]
    rows = [RowSpec(PROMPTS[n], Sampling(8), tuple(hand.resolved() for hand in of)) for n, of in enumerate(hands)]
    same_tokens(family, rows, hands)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_transcoders_are_read_where_they_read_and_written_where_they_write(family: str) -> None:
    """Beside others at the same place, one group wherever they stand."""
    out = models.read(models.model(family), family, PROMPTS[0], 1, "hook_mlp_out")
    size = float(out.norm(dim=-1).median())
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    hands = []
    for number, kind in enumerate(TRANSCODERS):
        of = sae(kind, size=2.0)
        clamp = Hand(Do.CLAMP, 1, "hook_mlp_out", 4 * size, of=of, index=number)
        scale = Hand(Do.SCALE, 1, "hook_mlp_out", -9.0 * size, of=of, index=number + 1)
        cap = Hand(Do.CAP, 1, "hook_mlp_out", -size, vector=vector)
        hands.append([[clamp], [scale, cap], [cap, clamp, scale], [clamp, scale]][number])
    rows = [RowSpec(PROMPTS[n], Sampling(8), tuple(hand.resolved() for hand in of)) for n, of in enumerate(hands)]
    same_tokens(family, rows, hands)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("watched", [(0, PLACE), (1, "hook_resid_mid"), (2, PLACE)])
def test_conditions_merged_in_pieces_and_alone(family: str, watched: tuple[int, str]) -> None:
    """A trigger before the edit, in the block of the edit, and behind it, where it acts from the next token on."""
    layer, place = watched
    seen = models.read(models.model(family), family, PROMPTS[3], layer, place)
    size = float(seen.norm(dim=-1).median())
    of = sae("standard", size=size / WIDTH**0.5)
    numbers = of.encode(seen)[1:]
    index = int(((numbers > numbers.max(0).values / 2).float().mean(0) - 0.3).abs().argmin())
    above = float(numbers[:, index].max()) / 2
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    push = Hand(Do.ADD, 1, PLACE, 3 * float(seen.norm(dim=-1).mean()) / float(vector.norm()), vector=vector)
    is_late = layer == 2
    hands = [
        [replace(push, when=When(of, index, layer, place, above, n_tokens, negated))]
        for n_tokens, negated in ((2 if is_late else 1, False), (3, False), (None, False), (2, True))
    ]
    rows = [RowSpec(PROMPTS[(0, 3, 5, 2)[n]], Sampling(9), (of[0].resolved(),)) for n, of in enumerate(hands)]
    same_tokens(family, rows, hands)


def same_tokens(family: str, rows: Sequence[RowSpec], hands: Sequence[Sequence[Hand]]) -> None:
    """As by hand, joining late, in pieces, and alone; most texts are others without the edits."""
    late = staggered(engine(family).lane, rows, 2)
    pieces = joined_in_pieces(family, rows, 5)
    n_compared, n_changed = 0, 0
    for row, of, one, other in zip(rows, hands, late, pieces, strict=True):
        (alone,) = staggered(engine(family).lane, [row], 1)
        with suppress(models.NearTie):
            expected = greedy(family, of, row.prompt_ids, row.sampling.max_new_tokens)
            assert ids(one) == ids(other) == ids(alone) == expected, of
            n_compared += 1
            n_changed += expected != models.greedy(models.model(family), row.prompt_ids, len(expected))
    assert n_compared >= len(rows) - 2
    assert n_changed >= n_compared // 2


def test_the_host_waits_for_the_device_once_a_step_whatever_is_edited() -> None:
    """For the tokens that are drawn; `numpy` is of the tokens that are fed, which are on the host."""
    of = sae("jumprelu", size=3.0)
    on, chosen = SELECTIONS["except"]
    when = When(of, 2, 0, PLACE, 1.0, None)
    later = replace(when, n_tokens=3)
    vector = torch.ones(WIDTH)
    hands = [
        [Hand(Do.CLAMP, 1, PLACE, 6.0, of=of, index=3, on=on, chosen=chosen)],
        [Hand(Do.SWAP, 1, PLACE, of=of, index=3, gives_to=4, when=when), Hand(Do.ADD, 1, PLACE, 2.0, of=of, index=1)],
        [Hand(Do.CAP, 1, "hook_resid_mid", 0.5, vector=vector, is_dose=True, when=later)],
    ]
    rows = [RowSpec(PROMPTS[n], Sampling(6), tuple(hand.resolved() for hand in of)) for n, of in enumerate(hands)]
    lane = engine("llama").lane
    with torch.inference_mode():
        lane.prefill([(RowId(n, 0), row) for n, row in enumerate(rows)])
        for _ in range(3):
            with HostReads() as reads:
                assert len(lane.decode()) == 3
            assert reads.names.count("tolist") == 1
            assert set(reads.names) == {"numpy", "tolist"}, reads.names
        lane.drop(set(lane.rows))


def test_an_edit_says_what_it_found_and_what_became_of_it() -> None:
    of, h = sae("jumprelu", size=3.0), states()
    index = int((of.encode(h) > 0).sum(0).argmax())
    hands = [Hand(Do.ADD, 1, PLACE, 2.0, of=of, index=1), Hand(Do.CLAMP, 1, PLACE, 6.0, of=of, index=index)]
    told: list[Tensor] = []
    edits = [hand.resolved() for hand in hands]
    found = h + 2.0 * of.W_dec[1]
    table = EditTable([None, RowTable(edits)])
    changed = table(torch.stack([h, h]), None, lambda numbers, norm: told.append(numbers))
    share, before, target, afterwards, _ = told[0][1, :, int(table.places(1)[1])].unbind(-1)
    assert bool((share == 1).all())
    assert close(before, of.encode(found)[:, index])
    assert bool((target == 6.0).all())
    assert close(afterwards, of.encode(changed[1])[:, index])
    assert not close(afterwards, target), "a feature that is read again need not be what it was set to"
