"""Rows that must not depend on others: their numbers to the bit, and that nobody waits for more than one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.plan import Do
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep
from tests import models
from tests.engine.engines import engine
from tests.engine.test_merging import PROMPTS, alone, ids, steering

LONG = tuple(3 + 7 * n % 200 for n in range(150))
"""Several pieces."""


def rows(family: str) -> list[RowSpec]:
    steered = (steering(family, "hook_resid_post", Do.ADD, 1, 1),)
    sampling = Sampling(6, n_logprobs=2)
    return [
        RowSpec(LONG, sampling, steered),
        RowSpec(PROMPTS[2], sampling),
        RowSpec(PROMPTS[4], replace(sampling, temperature=0.8, seed=3)),
    ]


def together(family: str, specs: list[RowSpec]) -> list[list[RowStep]]:
    lane = engine(family).reproducible_lane
    with torch.inference_mode():
        steps = lane.prefill([(RowId(n, 0), spec) for n, spec in enumerate(specs)])
        while lane.rows:
            steps += lane.decode()
    return [[replace(step, row=RowId(0, 0)) for step in steps if step.row.job == n] for n in range(len(specs))]


@pytest.mark.parametrize("family", models.CONFIGS)
def test_the_same_to_the_bit_alone_and_beside_others(family: str) -> None:
    specs = rows(family)
    beside = together(family, specs)
    assert beside == [together(family, [spec])[0] for spec in specs]
    assert beside == together(family, specs[::-1])[::-1]
    assert [ids(steps) for steps in beside[:2]] == [alone(family, spec) for spec in specs[:2]]
    assert alone(family, specs[0]) != alone(family, replace(specs[0], edits=()))


def test_one_row_steps_at_a_time_and_parked_ones_do_not() -> None:
    lane = engine("llama").reproducible_lane
    names = [RowId(n, 0) for n in range(3)]
    with torch.inference_mode():
        lane.prefill(list(zip(names, rows("llama"), strict=True)))
        assert [[step.row for step in lane.decode()] for _ in range(4)] == [[names[n % 3]] for n in range(4)]
        lane.park(names[2:])
        assert [[step.row for step in lane.decode()] for _ in range(3)] == [[names[n]] for n in (1, 0, 1)]
        lane.resume(names)
        assert {step.row for _ in range(3) for step in lane.decode()} == set(names)
        lane.drop(names)
    assert lane.decode() == []
