"""Every architecture that people run: each offered place against hooks written by hand, merged and alone.

A probe decides what is offered. What it must offer, and must refuse, is stated here for each architecture.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BioGptConfig

from neuronpedia_inference.engine import tree
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.description import Part
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import only_read
from neuronpedia_inference.engine.solo import SoloLane
from neuronpedia_inference.errors import StartupError, UnknownPoint
from neuronpedia_inference.points import HOOK_Z, MLP_POST, PATTERN, RESID_MID, WRITABLE, Point
from tests import architectures, models
from tests.engine.engines import engine
from tests.engine.test_capture import PROMPTS, close
from tests.engine.test_merging import alone, ids, staggered, steered_rows

LAYERS = (0, 1, 2)
PARALLEL = ("gptj", "neox", "cohere", "cohere2")
"""Attention and MLP read the same input: nothing is in between."""
ALONE = {
    "phi3_longrope": "rotary angles",
    "llama_dynamic": "rotary angles",
    "qwen3_5": "linear_attention",
    "qwen3_5_moe": "linear_attention",
}
"""Architectures whose rows decode one at a time, with a word of the reason."""
EXPERTS = ("gpt_oss", "qwen3_moe", "mixtral", "qwen3_5_moe")
"""No layer has neurons; of deepseek_v3 the first has."""
REFUSALS = r"not the sum|reads the sum|no such tensor|is not read|not their values"
UNREAD_ATTENTION = ("bloom", "gptj", "qwen3_5", "qwen3_5_moe")


def is_offered(family: str, point: Point) -> bool:
    """As read in the architecture's source."""
    if point.place == RESID_MID:
        return family not in PARALLEL
    if point.place in ("hook_attn_out", "hook_mlp_out"):
        return family != "gemma4_text"  # it scales what it has added up, and adds a third part
    if point.place == HOOK_Z:
        return not family.startswith("qwen3_5") or point.layer == 1  # the only layer with softmax attention
    if point.place == MLP_POST:
        return family not in EXPERTS and (family != "deepseek_v3" or point.layer == 0)
    return point.place != PATTERN or family not in UNREAD_ATTENTION


def offered(family: str, places: tuple[str, ...]) -> list[Point]:
    return [p for p in (Point(layer, place) for layer in LAYERS for place in places) if is_offered(family, p)]


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_what_is_offered(family: str) -> None:
    built = engine(family)
    for layer in LAYERS:
        for place in (*WRITABLE, MLP_POST, PATTERN):
            point = Point(layer, place)
            if is_offered(family, point):
                built.check(point, write=place in WRITABLE)
            else:
                with pytest.raises(UnknownPoint, match=REFUSALS):
                    built.check(point)
    assert (ALONE.get(family) or "") in built.unmerged_because
    assert bool(built.unmerged_because) == (family in ALONE)


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_every_place_reads_what_a_hook_by_hand_reads(family: str) -> None:
    """In one padded pass over prompts of other lengths, some past the window, and in pieces where they are allowed."""
    points = offered(family, (*WRITABLE, MLP_POST))
    with torch.inference_mode():
        captured = engine(family).capture(PROMPTS, points)
        running = engine(family).begin_capture([only_read(prompt) for prompt in PROMPTS], points)
        while not running.is_done:
            running.advance(len(PROMPTS) * 5)
        in_pieces = running.result()
    for prompt, seen, pieced in zip(PROMPTS, captured, in_pieces, strict=True):
        for point in points:
            expected = models.read(models.model(family), family, prompt, point.layer, point.place)
            assert close(seen[point], expected), point
            assert close(pieced[point], expected), point
            assert not close(seen[point] + expected.abs().mean(), expected)


@pytest.mark.parametrize("family", architectures.CONFIGS)
def test_rows_steered_everywhere_equal_plain_loops(family: str) -> None:
    """All methods at all places, joining late, past window and horizon; each against itself alone without a cache."""
    rows = steered_rows(
        family, [point.place for point in offered(family, WRITABLE) if point.layer == 1], layers=(1,), strength=8
    )
    lane = engine(family).lane
    assert isinstance(lane, SoloLane) == (family in ALONE)
    had_effect: set[str] = set()
    n_compared = 0
    for row, steps in zip(rows, staggered(lane, rows, 3), strict=True):
        with suppress(models.NearTie):
            assert ids(steps) == alone(family, row), row.edits
            n_compared += 1
            if ids(steps) != alone(family, replace(row, edits=())):
                had_effect |= {steer.point.place for steer in row.edits}
    assert n_compared > 0.7 * len(rows)
    # At each place steering must show, but for one at most: some of these models repeat a token whatever is added.
    assert len(had_effect) >= len({steer.point.place for row in rows for steer in row.edits}) - 1


def test_modules_that_are_named_wrongly_are_refused_and_the_rest_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TransformerLens says of an architecture is not believed."""
    described = tree.describe(models.model("llama"))
    block = described.parts["blocks"].submodules
    wrong = {
        "attn": replace(block["attn"], submodules={**block["attn"].submodules, "o": Part("k_proj")}),
        "mlp": replace(block["mlp"], submodules={**block["mlp"].submodules, "out": Part("up_proj")}),
        "ln2": Part("input_layernorm"),
    }
    blocks = replace(described.parts["blocks"], submodules={**block, **wrong})
    misled = replace(described, parts={**described.parts, "blocks": blocks})
    monkeypatch.setattr(tree, "describe", lambda *_: misled)
    with torch.inference_mode(False):
        built = ModelEngine(models.model("llama"), model_id="llama", name="llama", stop_ids=())
    for place in (HOOK_Z, MLP_POST, RESID_MID, PATTERN):
        with pytest.raises(UnknownPoint):
            built.check(Point(1, place))
    points = [Point(1, place) for place in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")]
    with torch.inference_mode():
        (seen,) = built.capture([PROMPTS[0]], points)
    for point in points:
        built.check(point, write=True)
        assert close(seen[point], models.read(models.model("llama"), "llama", PROMPTS[0], 1, point.place))


def test_an_architecture_that_nobody_knows_is_one_line() -> None:
    net = AutoModelForCausalLM.from_config(
        BioGptConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    )
    with pytest.raises(StartupError, match="BioGptForCausalLM"):
        tree.Tree(net)


def test_want_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that ran out of memory says nothing of the model: it ends the start and is not kept."""
    from neuronpedia_inference.engine import merging

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(merging, "_steps", full)
    with torch.inference_mode(False), pytest.raises(MemoryError):
        ModelEngine(models.model("llama"), model_id="llama", name="llama", stop_ids=())


def test_what_a_trial_raised_is_in_the_log_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from neuronpedia_inference.engine import merging

    def broken(*_: object) -> None:
        raise ValueError("no such cache\nand much more")

    monkeypatch.setattr(merging, "_steps", broken)
    with torch.inference_mode(False), caplog.at_level("INFO"):
        built = ModelEngine(models.model("llama"), model_id="llama", name="llama", stop_ids=())
    assert built.unmerged_because.endswith("ValueError: no such cache")
    said = [record.getMessage() for record in caplog.records if "was tried" in record.getMessage()]
    assert said == [
        f"merging rows with {form} masks was tried and is not served: ValueError: no such cache" for form in MaskForm
    ]
