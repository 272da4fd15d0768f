"""Memory is counted from headers and agrees with the files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from httpx2 import HTTPError
from huggingface_hub.errors import NotASafetensorsRepoError
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


def a_hub(monkeypatch: pytest.MonkeyPatch, config: Path, files: dict[str, int]) -> list[str]:
    """The hub itself is out of reach here: its answers are given in its place. Returns what is asked."""
    config.write_text(json.dumps({"n_layer": 12, "n_head": 12, "n_embd": 768}))
    tensors = {"wte.weight": (100, 8), "h.0.attn.c_attn.bias": (24,), "h.0.attn.bias": (1, 1, 50, 50)}
    weights = SimpleNamespace(
        tensors={
            name: SimpleNamespace(shape=shape, data_offsets=(0, 4 * prod(shape))) for name, shape in tensors.items()
        }
    )
    metadata = SimpleNamespace(files_metadata={"model.safetensors": weights})
    listed = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    asked: list[str] = []
    answers: dict[str, Any] = {
        "get_safetensors_metadata": lambda repo: asked.append(repo) or metadata,
        "hf_hub_download": lambda repo, name: str(config),
        "parse_safetensors_file_metadata": lambda repo, name: (
            asked.append(name) or SimpleNamespace(parameter_count={"BF16": 900, "F32": 50})
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(huggingface_hub, name, answer)
    info = SimpleNamespace(siblings=listed)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, files_metadata: info)
    return asked


def test_a_model_on_the_hub_is_counted_from_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are no parameters; only an SAE's weights count, one header for files of one size."""
    folders = [f"blocks.{n}.hook_resid_pre" for n in range(12)]
    names = {"cfg.json": 10, "sparsity.safetensors": 70, "sae_weights.safetensors": 4000}
    files = {
        f"{folder}{more}/{name}": size for folder in folders for more in ("", "_big") for name, size in names.items()
    }
    asked = a_hub(monkeypatch, tmp_path / "config.json", files)
    counted = memory.sizes(Settings.read(model_id="gpt2-small", sae_sets=("res-jb",), include_sae=("^[0-9]-res-jb$",)))
    assert asked == ["openai-community/gpt2", "blocks.0.hook_resid_pre/sae_weights.safetensors"]
    assert (counted.parameters, counted.sae_numbers, counted.n_sources) == (824, 9500, 10)
    assert counted.cache_numbers == 2 * 12 * 768 * 4096 * 16


def test_saes_in_other_formats_are_stored_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_hub(monkeypatch, tmp_path / "config.json", {"layer_1/width_16k/average_l0_102/params.npz": 4000})
    counted = memory.sizes(Settings.read(model_id="gemma-2-2b", sae_sets=("1-gemmascope-res-16k",)))
    assert counted.sae_numbers == 1000


def test_a_layer_of_a_cross_layer_transcoder_is_counted_as_it_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoder, a matrix for each later layer in its file, is summed to the size of the encoder."""
    asked = a_hub(monkeypatch, tmp_path / "config.json", {"W_enc_3.safetensors": 4000, "W_dec_3.safetensors": 90000})
    counted = memory.sizes(Settings.read(model_id="gemma-2-2b", sae_sets=("3-clt-hp",)))
    assert (asked[1:], counted.sae_numbers) == (["W_enc_3.safetensors"], 2 * 950)


def test_a_budget_for_saes_bounds_them() -> None:
    bounded = memory.sizes(Settings.read(sae_memory_gib=0.001)).needs("float32", "float32")
    assert bounded.saes == 2**30 // 1000
    assert memory.sizes(Settings.read()).needs("float32", "float32").saes > bounded.saes


def test_quantised_weights_take_what_their_files_do(tmp_path: Path) -> None:
    about = {"n_layer": 2, "n_head": 2, "n_embd": 8, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"a": torch.zeros(300, 40, dtype=torch.int32)}, tmp_path / "model.safetensors")
    counted = memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    needs = [counted.needs(dtype, "float32").weights for dtype in ("float32", "bfloat16")]
    assert needs == [(tmp_path / "model.safetensors").stat().st_size] * 2


def test_an_sae_that_the_hub_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_hub(monkeypatch, tmp_path / "config.json", {"README.md": 1})
    with pytest.raises(StartupError, match="lists no weights under 'blocks.0.hook_resid_pre'"):
        memory.sizes(Settings.read(model_id="gpt2-small", sae_sets=("res-jb",)))


@pytest.mark.parametrize("kind", [ConnectionError, HTTPError, NotASafetensorsRepoError])
def test_without_the_hub_there_is_one_clear_line(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo: str) -> None:
        raise kind("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with pytest.raises(StartupError, match="metadata of 'openai-community/gpt2' cannot be read: no route$"):
        memory.sizes(Settings.read(model_id="gpt2-small", sae_sets=()))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="holds no model"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match="has no 'n_layer'"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(StartupError, match="cannot be read as safetensors"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=()))
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "ok.safetensors")
    assert memory.tensor_numbers(tmp_path / "ok.safetensors") == 17


def test_what_is_loaded_otherwise_than_it_lies_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2, "n_head": 2, "n_embd": 8}))
    save_file({"a": torch.zeros(300, 40)}, tmp_path / "model.safetensors")
    four_bits = {"quantization_config": {"load_in_4bit": True}}
    for options in ({"n_layer": 1}, four_bits):
        settings = Settings.read(model_id=str(tmp_path), sae_sets=(), model_from_pretrained_kwargs=options)
        assert memory.needs_at_start(settings) is None
    with pytest.raises(StartupError, match="quantised while loading: not counted"):
        memory.sizes(Settings.read(model_id=str(tmp_path), sae_sets=(), model_from_pretrained_kwargs=four_bits))
    anywhere = Settings.read(model_id=str(tmp_path), sae_sets=(), model_from_pretrained_kwargs={"token": "t"})
    needs = memory.needs_at_start(anywhere)
    assert needs is not None
    assert needs.weights == 4 * 12_000


def test_a_precision_that_only_the_whole_says_is_that_of_the_text(tmp_path: Path) -> None:
    about = {"dtype": "bfloat16", "text_config": {"n_layer": 2, "n_head": 2, "n_embd": 8}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file({"a": torch.zeros(300, 40, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    needs = memory.needs_at_start(Settings.read(model_id=str(tmp_path), sae_sets=()))
    assert needs is not None
    assert (needs.model_dtype, needs.weights) == ("bfloat16", 2 * 12_000)


def test_the_command_shows_every_precision() -> None:
    shown = CliRunner().invoke(app, ["plan"])
    assert shown.exit_code == 0
    assert "134,515,008 parameters, 3 SAEs" in shown.output
    assert shown.output.partition("US dollars")[0].count("T4") == 6


def test_saes_that_fit_nowhere_leave_a_gpu_for_features_one_by_one() -> None:
    needs = memory.Needs("bfloat16", "float32", weights=54 * 2**30, saes=651 * 2**30, cache=2**30)
    assert needs.gpu is None
    assert needs.one_by_one.gpu == "A100-80GB"
    assert needs.one_by_one.total == 55 * 2**30 + memory.CONTEXT_BYTES + int(memory.HEADROOM_SHARE * 55 * 2**30)
