"""Rules that take tokens back: against a plain loop over the whole text that forgets them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import N_TOLD, Do, Feature, Fires
from neuronpedia_inference.engine.cache import MaskForm, RowCache
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import NO_TOKEN, Retry, RowId, RowSpec, RowStep, Watch
from neuronpedia_inference.engine.solo import SoloLane
from neuronpedia_inference.points import Point
from neuronpedia_inference.watches.readings import ColumnsReading
from neuronpedia_inference.watches.rules import TextRule
from tests import architectures, models
from tests.edits_by_hand import Hand, HandRule, Ruling, Text, When, _encoded, _loaded, ruled, sae
from tests.engine.engines import engine
from tests.engine.test_failures import FailsAt
from tests.engine.test_merging import PROMPTS, staggered
from tests.engine.test_pieces import joined_in_pieces

assert architectures  # it adds models when it is imported
FAMILIES = ("llama", "gemma2", "gpt2", "qwen3_moe")
N_TOKENS = 9
PLACE = "hook_resid_post"


def size_of(family: str, layer: int) -> float:
    return float(models.read(models.model(family), family, PROMPTS[0], layer, PLACE).norm(dim=-1).median())


def with_rules(row: RowSpec, rules: Sequence[HandRule]) -> RowSpec:
    """With what the rules look at watched, whatever else is."""
    watches = list(row.watches)
    texts: list[TextRule] = []
    edited = {edit.point for edit in row.edits}
    for rule in rules:
        when = rule.when
        point = Point(when.layer, when.place)
        reading = ColumnsReading([_loaded(when.of, when.layer, when.place).feature(when.index)])
        column = sum(one.n_numbers for one in watches) + row.tells_edits * N_TOLD * len(row.edits)
        watches.append(Watch(point, reading, before=point in edited))
        fires = Fires(Feature(f"{len(texts)}-t", when.index), when.above, n_tokens=when.n_tokens)
        retry = Retry(rule.back, rule.times) if rule.back else None
        texts.append(TextRule(fires, retry, {fires: column}, frozenset()))
    return replace(row, watches=tuple(watches), rules=tuple(texts))


def told(steps: Sequence[RowStep]) -> Ruling:
    tokens = [step.token_id for step in steps if step.token_id != NO_TOKEN]
    refusals = [step.refusal for step in steps if step.refusal is not None]
    assert steps[-1].finish_reason is not None
    return tokens, steps[-1].finish_reason, [(one.rule, one.position, one.n_tokens) for one in refusals]


@cache
def cases(family: str) -> list[tuple[list[Hand], list[HandRule], RowSpec]]:
    """Rows whose rules act at a third of what they write without: back by one and by several, to the beginning, for
    long, to the end; beside edits whose conditions latch, and beside a rule that stops."""
    found: list[tuple[list[Hand], list[HandRule], RowSpec]] = []
    size = size_of(family, 1)
    of = sae("standard", size=round(size, 1))
    for n, (back, times, n_lasting) in enumerate(
        [(1, 3, 1), (3, 2, 1), (2, 16, 1), (2, 2, None), (8, 2, 2), (2, 6, 1)]
    ):
        direction = torch.randn(32, generator=torch.Generator().manual_seed(n))
        latch = When(of, n % 5, 1, "hook_resid_pre", 0.3 * size, n_tokens=None)
        hands = [Hand(Do.ADD, 1, PLACE, size / 5, vector=direction, when=latch)] if n % 2 else []
        row = RowSpec(PROMPTS[n], Sampling(N_TOKENS), tuple(hand.resolved() for hand in hands))
        rules = [HandRule(When(of, *fires_at(family, of, row, 0.7), n_lasting), back, times)]
        rules += [HandRule(When(of, *fires_at(family, of, row, 0.3)))] if n == 5 else []
        found.append((hands, rules, with_rules(row, rules)))
    return found


def fires_at(family: str, of: Any, row: RowSpec, share: float) -> tuple[int, int, str, float]:
    """A feature, where it is read, and a number that it is below at this share of what the row writes."""
    [steps] = staggered(engine(family).lane, [row], 1)
    text = [*row.prompt_ids, *told(steps)[0]]
    acts = of.encode(models.read(models.model(family), family, text, 1, PLACE))[len(row.prompt_ids) :]
    index = int(acts.std(dim=0).argmax())
    values = sorted(acts[:, index].tolist())
    at = int(share * (len(values) - 1))
    return index, 1, PLACE, (values[at] + values[at + 1]) / 2


def numbers(steps: Sequence[RowStep]) -> np.ndarray:
    return np.concatenate([step.numbers for step in steps if step.numbers is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_taken_back_was_never_there(family: str) -> None:
    """Merged, joining late, in pieces and alone with Hugging Face's cache: the loop that forgets."""
    of_rows = cases(family)
    rows = [row for *_, row in of_rows]
    plain = RowSpec(PROMPTS[2], Sampling(14))
    built = engine(family)
    ways = [
        staggered(built.lane, [*rows, plain], 2),
        joined_in_pieces(family, [plain, *rows], 4)[1:],
        staggered(SoloLane(lambda: Lane.alone(built.decoder)), rows, 2),
    ]
    n_refused, ends = 0, set[str]()
    for n, (hands, rules, row) in enumerate(of_rows):
        with suppress(models.NearTie):
            text = Text(family, hands, row.prompt_ids, [rule.when for rule in rules])
            expected = ruled(text, N_TOKENS, rules)
            for way in ways:
                assert told(way[n]) == expected, n
                found = numbers(way[n])
                assert len(found) == len(text.tokens)
                wanted = by_hand(text, rules, row)
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
            n_refused += len(expected[2])
            ends.add(expected[1])
    assert n_refused > 10
    assert ends > {"length", "retry_exhausted"}


def by_hand(text: Text, rules: Sequence[HandRule], row: RowSpec) -> np.ndarray:
    """What the rules look at, in the finished text: before and behind where it is edited there."""
    edited, columns = {edit.point for edit in row.edits}, []
    for when in (rule.when for rule in rules):
        before, behind = text.passed[when.layer, when.place]
        sides = (before, behind) if Point(when.layer, when.place) in edited else (behind,)
        columns += [_encoded(when.of, side)[:, when.index].numpy() for side in sides]
    return np.stack(columns, axis=1)


def refused_row() -> tuple[RowSpec, Ruling]:
    """One that goes back by two tokens, past the end of a window, and on; with what it is told."""
    row = cases("gemma2")[2][2]
    [steps] = staggered(engine("gemma2").lane, [row], 1)
    ruling = told(steps)
    assert ruling[1] == "length"
    assert ruling[2][0] == (0, 4, 2)
    return row, ruling


def to_the_end(lane: Lane, steps: list[RowStep]) -> list[RowStep]:
    while lane.rows:
        steps = [*steps, *lane.decode()]
    return steps


def test_a_failure_anywhere_while_it_goes_back_changes_nothing() -> None:
    """Every seventh operation of two steps, in which a column is emptied and another token drawn, fails in turn."""
    row, expected = refused_row()
    other = RowSpec(PROMPTS[2], Sampling(8))
    [plain] = staggered(engine("gemma2").lane, [other], 1)
    n_steps = 0
    for n in itertools.count(1, 7):
        lane, mode = Lane.merging(engine("gemma2").decoder, MaskForm.ADDITIVE), FailsAt(n)
        with torch.inference_mode():
            steps = lane.prefill([(RowId(0, 0), row), (RowId(1, 0), other)])
            while not any(step.refusal for step in steps):
                steps += lane.decode()
            for _ in range(2):
                with suppress(torch.OutOfMemoryError), mode:
                    steps += lane.decode()
            steps = to_the_end(lane, steps)
        assert told([step for step in steps if step.row.job == 0]) == expected, n
        assert [step.token_id for step in steps if step.row.job == 1] == [step.token_id for step in plain], n
        if mode.seen < n:
            n_steps = n
            break
    assert n_steps > 100


def test_what_was_taken_back_is_not_in_the_cache() -> None:
    """Columns behind a row's length are zero again before the next step reads."""
    row, _ = refused_row()
    lane = Lane.merging(engine("gemma2").decoder, MaskForm.ADDITIVE)
    with torch.inference_mode():
        steps = lane.prefill([(RowId(0, 0), row)])
        while not any(step.refusal for step in steps):
            steps = lane.decode()
        lane.decode()
        [(slot, kept)] = lane._slots.placed
        assert isinstance(lane.memory, RowCache)
        for keys, _ in filter(None, lane.memory.layers_of(slot, 10**6) or ()):
            assert bool((keys[:, : kept.length] != 0).any())
            assert not bool((keys[:, kept.length :] != 0).any())
        lane.drop(set(lane.rows))


def test_sampled_rows_go_on_with_their_uniforms_and_forget_their_counts() -> None:
    """Merged with others and alone; and a text that nothing refuses is drawn as without rules."""
    sampling = Sampling(N_TOKENS, temperature=0.9, freq_penalty=0.7, seed=5, n_logprobs=2)
    rows = [replace(row, sampling=sampling) for *_, row in cases("llama")]
    lane = engine("llama").lane
    merged = staggered(lane, rows, 3)
    assert sum(len(told(steps)[2]) for steps in merged) > 8
    for row, steps in zip(rows, merged, strict=True):
        [alone] = staggered(lane, [row], 1)
        assert told(steps) == told(alone)
        logprobs = [[step.logprob for step in some if step.token_id != NO_TOKEN] for some in (steps, alone)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
        never = replace(row, rules=(TextRule(NEVER, Retry(2, 2), {NEVER: 0}, frozenset()),))
        without = replace(row, rules=())
        tokens = [told(one)[0] for one in staggered(lane, [never, without], 2)]
        assert tokens[0] == tokens[1]


NEVER = Fires(Feature("1-t", 0), 1e9)


class After:
    """Ends a text at its sixth token. Stands for strings that end a text."""

    def begin(self) -> After:
        made = After()
        made.n_read = 0
        return made

    n_read: int

    def ends_at(self, token_id: int) -> bool:
        self.n_read += 1
        return self.n_read == 6


def test_what_reads_the_text_forgets_too() -> None:
    row, ruling = refused_row()
    [steps] = staggered(engine("gemma2").lane, [replace(row, stops=After())], 1)
    tokens, finish, refusals = told(steps)
    assert refusals[0] == ruling[2][0]
    assert (len(tokens), finish) == (6, "stop_string")
    assert tokens == ruling[0][:6]
