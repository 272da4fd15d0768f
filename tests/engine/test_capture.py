"""Captured tensors against plain Hugging Face hooks, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuronpedia_inference.errors import UnknownPoint
from neuronpedia_inference.points import PATTERN, Point
from tests import models
from tests.engine.engines import engine

PROMPTS = ([5, 6, 7, 8, 9], [12], [40, 41, 42] * 6, [100, 3, 250, 17, 9, 9, 9])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize(("family", "place"), models.with_places([*models.LLAMA_PLACES, "hook_resid_mid"]))
def test_a_padded_batch_reads_what_each_prompt_has_alone(family: str, place: str) -> None:
    point = Point(1, place)
    with torch.inference_mode():
        captured = engine(family).capture(PROMPTS, [point])
    for prompt, seen in zip(PROMPTS, captured, strict=True):
        expected = models.read(models.model(family), family, prompt, 1, place)
        assert seen[point].shape == expected.shape
        assert close(seen[point], expected)
        assert not close(seen[point] + expected.abs().mean(), expected)  # the tolerance can tell


def test_the_pass_stops_at_the_highest_layer_and_skips_the_head() -> None:
    net = models.model("llama")
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(models.blocks(net))
    ]
    head: Any = net.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_: ran.append(99)))
    try:
        with torch.inference_mode():
            engine("llama").capture([[1, 2, 3]], [Point(0, "hook_resid_pre"), Point(1, "hook_resid_post")])
        assert ran == [0, 1]
        with torch.inference_mode():
            engine("llama").capture([[1, 2, 3]], [Point(1, "hook_resid_pre")])
        assert ran == [0, 1, 0, 1]  # block 1's input is hooked in front of it, and nothing of it runs
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_are_gone_after_a_capture_and_after_a_failure() -> None:
    built = engine("llama")
    with torch.inference_mode():
        built.capture([[1, 2, 3]], [Point(2, "hook_mlp_out"), Point(0, "hook_resid_pre"), Point(1, PATTERN)])
        with pytest.raises(IndexError):
            built.capture([[1, 999_999]], [Point(0, "hook_mlp_out")])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in models.model("llama").modules())
    assert models.model("llama").config._attn_implementation == "sdpa"


def test_attention_pattern_is_the_softmax_of_the_prompt_alone() -> None:
    point = Point(1, PATTERN)
    with torch.inference_mode():
        captured = engine("llama").capture(PROMPTS, [point])
    for prompt, seen in zip(PROMPTS, captured, strict=True):
        n = len(prompt)
        assert seen[point].shape == (4, n, n)
        assert torch.allclose(seen[point].sum(-1), torch.ones(4, n), atol=1e-5)
        assert seen[point].triu(1).abs().max() == 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_normalised_residual_is_before_the_gain(family: str) -> None:
    point = Point(1, "ln2.hook_normalized")
    with torch.inference_mode():
        seen = engine(family).capture([PROMPTS[0]], [point])[0][point]
    mid = models.read(models.model(family), family, PROMPTS[0], 1, "hook_resid_mid")
    rms = (mid.double().pow(2).mean(-1, keepdim=True) + models.CONFIGS[family].rms_norm_eps).sqrt()
    assert close(seen, (mid.double() / rms).float())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.3.hook_resid_post", "layers 0 to 2"),
        ("blocks.1.hook_nonsense", "Places in a block"),
        ("blocks.-1.hook_resid_post", "expected the form"),
        ("hook_embed", "expected the form"),
        ("blocks.1.mlp.hook_pre_linear", "no hook"),
        ("blocks.1.ln2.hook_normalized", "no hook"),
    ],
)
def test_unknown_hooks_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(UnknownPoint, match=says):
        engine("gpt2").check(Point.parse(name))
