"""Prompts that run piece by piece against the same in one pass, and against plain Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.edits.select import Selection
from neuronpedia_inference.engine.protocol import RowId, RowSpec, RowStep, only_read
from neuronpedia_inference.points import PATTERN, RESID_POST, RESID_PRE, Point
from tests import models
from tests.engine.engines import engine
from tests.engine.test_merging import PROMPTS, alone, ids, steered_rows

PLACES = ["hook_resid_pre", "hook_resid_post", "hook_mlp_out", "attn.hook_z", "attn.hook_v", PATTERN]
LONG = tuple(2 + n * 7 % 200 for n in range(23))
# Gemma 2's window is 6 here, so that pieces end inside and beyond it.


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("n_tokens", [1, 5, 14, 40])
@pytest.mark.parametrize("place", PLACES)
def test_a_capture_in_pieces_equals_one_pass(family: str, n_tokens: int, place: str) -> None:
    built, prompts = engine(family), [LONG, LONG[3:9]]
    points = [Point(1, place), Point(2, "hook_resid_post")]
    with torch.inference_mode():
        whole = built.capture(prompts, points)
        capturing = built.begin_capture([only_read(prompt) for prompt in prompts], points)
        run = []
        while not capturing.is_done:
            run.append(capturing.advance(n_tokens))
    assert sum(run) == capturing.n_tokens == 2 * len(LONG)
    assert max(run) <= max(n_tokens, len(prompts))
    for one, other in zip(capturing.result(), whole, strict=True):
        for point in points:
            assert one[point].shape == other[point].shape
            # Rounding of one float32 pass through three layers, relative to the largest value.
            torch.testing.assert_close(one[point], other[point], rtol=0, atol=2e-5 * float(other[point].abs().max()))


@pytest.mark.parametrize("family", models.CONFIGS)
def test_pieces_see_what_plain_hugging_face_sees(family: str) -> None:
    with torch.inference_mode():
        capturing = engine(family).begin_capture([only_read(LONG)], [Point(2, "hook_resid_post")])
        while not capturing.is_done:
            capturing.advance(4)
    [seen] = capturing.result()
    expected = models.read(models.model(family), family, LONG, 2, "hook_resid_post")
    torch.testing.assert_close(
        seen[Point(2, "hook_resid_post")], expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


def joined_in_pieces(family: str, rows: Sequence[RowSpec], n_tokens: int) -> list[list[RowStep]]:
    """The first row decodes while the others' prompts run, a step of it after every piece."""
    lane = engine(family).lane
    steps: list[RowStep] = []
    with torch.inference_mode():
        steps += lane.prefill([(RowId(0, 0), rows[0])])
        joining = lane.begin([(RowId(1 + n, 0), row) for n, row in enumerate(rows[1:])])
        while not joining.is_done:
            joining.advance(n_tokens)
            if lane.rows:
                steps += lane.decode()
        steps += joining.join()
        while lane.rows:
            steps += lane.decode()
    return [[step for step in steps if step.row.job == n] for n in range(len(rows))]


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("n_tokens", [1, 60])
@pytest.mark.parametrize("places", [[RESID_PRE, RESID_POST], ["attn.hook_z", "hook_mlp_out"]])
def test_rows_whose_prompts_ran_in_pieces_equal_rows_alone(family: str, n_tokens: int, places: list[str]) -> None:
    """Every method; prompts from 1 to 16 tokens, so that some end in an earlier piece than others."""
    rows = [RowSpec(PROMPTS[0], Sampling(40)), *steered_rows(family, places)]
    partly = Selection(but=(Selection(positions=(0, 1)),))
    rows[4] = replace(rows[4], edits=tuple(replace(edit, on=partly) for edit in rows[4].edits))
    for row, steps in zip(rows, joined_in_pieces(family, rows, n_tokens), strict=True):
        if any(edit.on is partly for edit in row.edits):
            assert ids(steps) == ids(joined_in_pieces(family, [rows[0], row], 1000)[1])
        else:
            assert ids(steps) == alone(family, row), row.edits
