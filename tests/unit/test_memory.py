"""Memory is counted from headers and agrees with the files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neuronpedia_inference import embedded, memory
from neuronpedia_inference.cli import app
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.settings import Settings


def test_the_embedded_model_is_counted_from_its_files() -> None:
    counted = memory.sizes(Settings.read())
    [file] = model_folder().glob("*.safetensors")
    assert counted.parameters == sum(tensor.numel() for tensor in load_file(file).values())
    saes = [load_file(embedded.sae_dir(source) / "sae_weights.safetensors") for source in embedded.SOURCES]
    assert counted.sae_numbers == sum(tensor.numel() for sae in saes for tensor in sae.values())
    assert counted.cache_numbers == 2 * 30 * 3 * 64 * 4096 * 16
    needs = counted.needs("float32", "float32")
    assert abs(needs.weights - file.stat().st_size) < 2**16
    assert needs.total == needs.weights + needs.saes + needs.cache + needs.headroom
    assert needs.gpu == "T4"


def test_fewer_saes_in_memory_need_less() -> None:
    all_three, one = (memory.sizes(Settings.read(max_loaded_saes=n)).sae_numbers for n in (3, 1))
    assert all_three == 3 * one


@pytest.mark.parametrize(("gigabytes", "gpu"), [(14, "T4"), (17, "L4"), (42, "L40S"), (75, "A100-80GB"), (500, None)])
def test_the_cheapest_gpu_that_fits(gigabytes: int, gpu: str | None) -> None:
    weights = int((gigabytes * 10**9 - memory.CONTEXT_BYTES) / (1 + memory.HEADROOM_SHARE))
    assert memory.Needs("float32", "float32", weights, 0, 0).gpu == gpu


def test_a_model_on_the_hub_is_counted_from_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach here: its two answers are given in its place."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"n_layer": 12, "n_head": 12, "n_embd": 768}))
    metadata = SimpleNamespace(parameter_count={"F32": 124_439_808})
    files = [
        SimpleNamespace(rfilename=f"blocks.{n}.hook_resid_pre/{name}", size=size)
        for n in range(12)
        for name, size in (("cfg.json", 0), ("sae_weights.safetensors", 4000))
    ]
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo: asked.append(repo) or metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(config))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, repo, files_metadata: SimpleNamespace(siblings=files)
    )
    counted = memory.sizes(Settings.read(model_id="gpt2-small", sae_sets=("res-jb",), include_sae=("^[0-9]-res-jb$",)))
    assert asked == ["openai-community/gpt2"]
    assert (counted.parameters, counted.sae_numbers, counted.n_sources) == (124_439_808, 10_000, 10)
    assert counted.cache_numbers == 2 * 12 * 768 * 4096 * 16


def test_without_the_hub_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with pytest.raises(StartupError, match="metadata of 'openai-community/gpt2' cannot be read: no route$"):
        memory.sizes(Settings.read(model_id="gpt2-small", sae_sets=()))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="holds no model"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(StartupError, match="cannot be read as safetensors"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "ok.safetensors")
    assert memory.tensor_numbers(tmp_path / "ok.safetensors") == 17


def test_the_command_shows_every_precision() -> None:
    shown = CliRunner().invoke(app, ["plan"])
    assert shown.exit_code == 0
    assert "134,515,008 parameters, 3 SAEs" in shown.output
    assert shown.output.count("T4") == 3
