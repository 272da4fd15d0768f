"""Every architecture that people run: each offered place against hooks written by hand, merged and alone.

A probe decides what is offered. What it must offer, and must refuse, is stated here for each architecture.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from neuronpedia_inference.engine.generation import SoloLane
from neuronpedia_inference.engine.points import PATTERN, WRITABLE, Point
from neuronpedia_inference.errors import UnknownPoint
from tests import architectures, models
from tests.engine.engines import engine
from tests.engine.test_capture import PROMPTS, close
from tests.engine.test_merging import alone, ids, staggered, steered_rows

LAYER = 1
PARALLEL = ("gptj", "neox", "cohere", "cohere2")
"""Attention and MLP read the same input: nothing is in between."""
ALONE = {
    "phi3_longrope": "rotary angles",
    "qwen3_5": "linear_attention",
    "qwen3_5_moe": "linear_attention",
}
"""Architectures whose rows decode one at a time, with a word of the reason."""
EXPERTS = ("gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe")
UNREAD_ATTENTION = ("bloom", "gptj", "qwen3_5", "qwen3_5_moe")


def steerable(family: str) -> list[str]:
    places = [place for place in WRITABLE if not (place == "hook_resid_mid" and family in PARALLEL)]
    sums_only = ("hook_attn_out", "hook_mlp_out") if family == "gemma4_text" else ()
    return [place for place in places if place not in sums_only]


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_what_is_offered(family: str) -> None:
    built = engine(family)
    for place in WRITABLE:
        if place in steerable(family):
            built.check(Point(LAYER, place), write=True)
        else:
            with pytest.raises(UnknownPoint, match=r"not the sum|reads the sum"):
                built.check(Point(LAYER, place))
    for place, refusing in ((("mlp.hook_post"), EXPERTS), (PATTERN, UNREAD_ATTENTION)):
        if family in refusing:
            with pytest.raises(UnknownPoint, match=r"no such tensor|is not read|not their values"):
                built.check(Point(LAYER, place))
        else:
            built.check(Point(LAYER, place))
    assert (ALONE.get(family) or "") in built.unmerged_because
    assert bool(built.unmerged_because) == (family in ALONE)


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_every_place_reads_what_a_hook_by_hand_reads(family: str) -> None:
    """In one padded pass over prompts of other lengths, some past the window, and in pieces where they are allowed."""
    places = [*steerable(family), *([] if family in EXPERTS else ["mlp.hook_post"])]
    points = [Point(LAYER, place) for place in places]
    with torch.inference_mode():
        captured = engine(family).capture(PROMPTS, points)
        running = engine(family).begin_capture(PROMPTS, points)
        while not running.is_done:
            running.advance(len(PROMPTS) * 5)
        in_pieces = running.result()
    for prompt, seen, pieced in zip(PROMPTS, captured, in_pieces, strict=True):
        for point in points:
            expected = models.read(models.model(family), family, prompt, LAYER, point.place)
            assert close(seen[point], expected), point
            assert close(pieced[point], expected), point
            assert not close(seen[point] + expected.abs().mean(), expected)


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_rows_steered_everywhere_equal_plain_loops(family: str) -> None:
    """All methods at all places, joining late, past window and horizon; each against itself alone without a cache."""
    rows = steered_rows(family, steerable(family), layers=(LAYER,))
    lane = engine(family).lane
    assert isinstance(lane, SoloLane) == (family in ALONE)
    had_effect: set[str] = set()
    n_compared = 0
    for row, steps in zip(rows, staggered(lane, rows, 3), strict=True):
        with suppress(models.NearTie):
            assert ids(steps) == alone(family, row), row.steering
            n_compared += 1
            if ids(steps) != alone(family, replace(row, steering=())):
                had_effect |= {steer.point.place for steer in row.steering}
    assert n_compared > 0.7 * len(rows)
    assert had_effect  # not each place's: some of these models repeat one token whatever is added
