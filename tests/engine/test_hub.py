"""Real start-ups through Hugging Face's hub code and SAELens's directory, offline, from a cache laid out on disk.

The cache holds a small seeded GPT-2 under the real name and two seeded SAEs under those of the `res-jb` release, so
everything but the download runs: names, resolution, loading, folding, checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, GPT2Config

from neuronpedia_inference.domain import CENTRED
from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from tests import models
from tests.modal.local_modal.hub import a_hub
from tests.rounding import differences

ROOT = Path(__file__).resolve().parents[2]
MODEL_REPO = "openai-community/gpt2"
SAE_REPO = "jbloom/GPT2-Small-SAEs-Reformatted"
LAYERS = (1, 2)
D_SAE = 48
REVISION = "0" * 40


def seeded_sae(layer: int) -> StandardSAE:
    """An SAE whose decoder rows do not have unit norm and whose biases are not zero."""
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_pre", model_name="gpt2-small", context_size=64)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=D_SAE, apply_b_dec_to_input=True, metadata=metadata))
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return sae


def save_as_then(sae: StandardSAE, folder: Path) -> None:
    """With a configuration from before SAELens 6, as the release has: to such alone it adds what the directory says."""
    sae.save_model(folder)
    config = {
        "model_name": "gpt2-small",
        "hook_point": sae.cfg.metadata.hook_name,
        "hook_point_head_index": None,
        "d_in": 32,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "mps",
        "activation_fn_str": "relu",
        "context_size": 128,
        "lr": 4e-4,
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def snapshot(hub: Path, repo: str) -> Path:
    """The folder that the hub's cache keeps for a repository's main revision."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    files = folder / "snapshots" / REVISION
    files.mkdir(parents=True)
    return files


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hf")
    models.save("gpt2", snapshot(home / "hub", MODEL_REPO))
    saes = snapshot(home / "hub", SAE_REPO)
    for layer in LAYERS:
        save_as_then(seeded_sae(layer), saes / f"blocks.{layer}.hook_resid_pre")
    return home


def start(home: Path, **environment: str) -> dict[str, Any]:
    """The answers of a fresh process with exactly these settings."""
    kept = ("PATH", "HOME", "OMP_NUM_THREADS", "LANG", CACHE_VARIABLE)
    base = {k: v for k, v in os.environ.items() if k in kept}
    env = {**base, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "SAE_SETS": "res-jb"}
    env |= {"INCLUDE_SAE": "^[12]-res-jb$", "NUM_THREADS": "1", **environment}
    done = subprocess.run(  # noqa: PLW1510  (a start that is meant to fail answers too)
        [sys.executable, "-m", "tests.engine.hub_start"],
        capture_output=True,
        text=True,
        cwd=home,
        env={k: v for k, v in env.items() if v},
        timeout=300,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def expected_activations(ids: list[int], layer: int) -> torch.Tensor:
    """[pos, d_sae]: a plain hook, SAELens's own encode, times the decoder norms that folding moves (contract 2.5)."""
    hidden = models.read(models.model("gpt2"), "gpt2", ids, layer, "hook_resid_pre")
    sae = seeded_sae(layer)
    with torch.no_grad():
        hidden = hidden - hidden.mean(dim=1, keepdim=True)  # the directory asks for centred writing weights
        return sae.encode(hidden) * sae.W_dec.norm(dim=1)


@pytest.fixture(scope="module")
def answered(hub: Path) -> dict[str, Any]:
    return start(hub, MODEL_ID="gpt2-small")


def test_the_short_name_finds_weights_and_saes(answered: dict[str, Any]) -> None:
    assert [s["name"] for s in answered["sources"]] == ["1-res-jb", "2-res-jb"]
    assert [s["hook"] for s in answered["sources"]] == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert [s["asks"] for s in answered["sources"]] == [[CENTRED], [CENTRED]]
    assert {MODEL_REPO, "gpt2-small"} <= set(answered["known_names"])
    assert answered["ids"][0] == 0  # BOS once


def test_numbers_equal_a_plain_hook_and_saelens(answered: dict[str, Any]) -> None:
    expected = {layer: expected_activations(answered["ids"], layer) for layer in LAYERS}
    assert answered["values"] == pytest.approx(expected[2][:, 3].tolist(), rel=1e-4, abs=1e-4)
    both = torch.cat([expected[1], expected[2]], dim=1)
    both[0] = 0
    best = both.amax(0).topk(4)
    got = [(source, index) for source, index, _ in answered["ranked"]]
    assert got == [(f"{i // D_SAE + 1}-res-jb", i % D_SAE) for i in best.indices.tolist()]
    assert [max(values) for _, _, values in answered["ranked"]] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_steering_with_a_feature_is_its_unit_decoder_row(answered: dict[str, Any]) -> None:
    net, row = models.model("gpt2"), seeded_sae(2).W_dec[3].detach()
    edit = models.formula("add", row / row.norm(), 40.0)
    with models.hooked(net, "gpt2", 2, "hook_resid_pre", edit):
        assert answered["generated"][0] == models.greedy(net, answered["ids"], 8)
    assert answered["generated"][1] == models.greedy(net, answered["ids"], 8)
    assert answered["generated"][0] != answered["generated"][1]


def test_local_folders_give_the_same_answers(hub: Path, tmp_path: Path, answered: dict[str, Any]) -> None:
    models.save("gpt2", tmp_path / "model")
    for layer in LAYERS:
        sae = seeded_sae(layer)
        sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
        sae.save_model(tmp_path / "saes" / f"{layer}-res-jb")
    empty = tmp_path / "no-cache"
    empty.mkdir()
    local = start(
        empty, MODEL_ID=str(tmp_path / "model"), LOCAL_SAE_DIR=str(tmp_path / "saes"), SAE_SETS="", INCLUDE_SAE=""
    )
    for key in ("ids", "values", "ranked", "generated"):
        assert differences(local[key], answered[key]) == []


def test_a_name_alone_starts_from_the_cache_and_asks_nobody(tmp_path: Path) -> None:
    """`MODEL_ID=gpt2-small`: its weights and its canonical residual SAEs are here, and a hub would answer."""
    torch.manual_seed(0)
    config = {**models.CONFIGS["gpt2"].to_dict(), "n_layer": 12}
    net: Any = AutoModelForCausalLM.from_config(GPT2Config(**config)).eval()
    folder = snapshot(tmp_path / "hub", MODEL_REPO)
    net.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    saes = snapshot(tmp_path / "hub", SAE_REPO)
    for layer in range(12):
        save_as_then(seeded_sae(layer), saes / f"blocks.{layer}.hook_resid_pre")
    save_as_then(seeded_sae(11), saes / "blocks.11.hook_resid_post")
    with a_hub({}) as (address, asked):
        alone = {"SAE_SETS": "", "INCLUDE_SAE": "", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        answered = start(tmp_path, MODEL_ID="gpt2-small", **alone)
    assert asked == []
    assert [source["name"] for source in answered["sources"]] == [f"{n}-res-jb" for n in range(13)]
    assert answered["generated"][1] == models.greedy(net, answered["ids"], 8)
    assert answered["generated"][0] != answered["generated"][1]
