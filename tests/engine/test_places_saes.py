"""An SAE at every place of a block, in every layout of heads: read and steered, against plain hooks written by hand."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from neuronpedia_inference.edits.plan import Do, Edit, Feature, Plan
from neuronpedia_inference.questions import OneFeature
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models
from tests.engine.test_models_start import written

LAYER, D_SAE, INDEX = 1, 24, 3
WIDE = "wide_heads"
"""Heads that together are wider than the residual stream, as in Gemma 3 and Qwen 3; the others' are as wide."""
models.MORE_CONFIGS[WIDE] = LlamaConfig(**{**models.GROUPED, "head_dim": 12})
models.MORE_PLACES[WIDE] = models.LLAMA_PLACES
PLACES = {
    "res-pre": "hook_resid_pre",
    "res-mid": "hook_resid_mid",
    "res-post": "hook_resid_post",
    "att-z": "attn.hook_z",
    "att-out": "hook_attn_out",
    "mlp-out": "hook_mlp_out",
}
"""By the names of sets."""
FAMILIES = [
    "gpt2",
    "gemma2",
    WIDE,
    *(pytest.param(family, marks=pytest.mark.long) for family in ("llama", "qwen2", "qwen3", "neox")),
]


@cache
def weights(width: int, seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (width, D_SAE), "W_dec": (D_SAE, width), "b_enc": (D_SAE,), "b_dec": (width,)}
    return {name: 0.5 * torch.randn(shape, generator=made) for name, shape in shapes.items()}


def saved(folder: Path, place: str, width: int, seed: int) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.{place}")
    reshaped = "hook_z" if place == "attn.hook_z" else "none"
    module = StandardSAE(
        StandardSAEConfig(
            d_in=width, d_sae=D_SAE, apply_b_dec_to_input=True, reshape_activations=reshaped, metadata=metadata
        )
    )
    for name, value in weights(width, seed).items():
        getattr(module, name).data.copy_(value)
    module.save_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_feature_is_read_and_added_there(family: str, tmp_path: Path) -> None:
    net, ids = models.model(family), list(range(4, 30))
    sets = {name: place for name, place in PLACES.items() if (family, place) != ("neox", "hook_resid_mid")}
    widths = {name: models.read(net, family, ids, LAYER, place).flatten(1).shape[1] for name, place in sets.items()}
    assert (widths["att-z"] != widths["att-out"]) is (family == WIDE)
    for seed, (name, place) in enumerate(sets.items()):
        saved(tmp_path / "saes" / f"{LAYER}-{name}", place, widths[name], seed)
    folder = models.save(family, tmp_path / "model")
    settings = Settings.read(
        model_id=str(folder), local_sae_dir=tmp_path / "saes", num_threads=1, token_limit=100, max_tokens=128
    )
    runtime = Runtime.load(settings)
    prompt = runtime.tokenize("The cat sat.", "once")
    for seed, (name, place) in enumerate(sets.items()):
        source = runtime.shelf.source(f"{LAYER}-{name}")
        w = weights(widths[name], seed)
        norm = w["W_dec"][INDEX].norm()
        hidden = models.read(net, family, list(prompt.ids), LAYER, place).flatten(1)
        expected = ((hidden - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() * w["W_dec"].norm(dim=1)
        index = int(expected.amax(dim=0).argmax())
        found = asyncio.run(runtime.ask(OneFeature([prompt], source, index)))[0].values
        scale = float(expected.max())
        assert scale > 0
        torch.testing.assert_close(torch.as_tensor(found), expected[:, index], rtol=1e-4, atol=1e-4 * scale)
        steered(runtime, family, place, Feature(source.name, INDEX), w["W_dec"][INDEX] / norm)
    runtime.close()


def steered(runtime: Runtime, family: str, place: str, feature: Feature, row: Tensor) -> None:
    """The unit row is added at every position, and does something."""
    net, prompt, amount = models.model(family), runtime.tokenize("The cat sat.", "once"), 60.0
    ours, plain = asyncio.run(written(runtime, prompt, [Plan((Edit(Do.ADD, feature, amount),)), None], 6))
    with models.hooked(net, family, LAYER, place, lambda h: h + amount * row.view(h.shape[2:])):
        expected = models.greedy(net, prompt.ids, len(ours))
    assert list(ours) == expected, (family, place)
    assert ours != plain, (family, place)
