"""Weights that cannot be trusted stop the start with one line that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from neuronpedia_inference.engine.weights import load_tokenizer, load_weights, pick_device
from neuronpedia_inference.errors import StartupError
from tests import models


def load(folder: Path) -> None:
    load_weights(str(folder), dtype="auto", device="cpu", options={})


def corrupt(file: Path) -> None:
    file.write_bytes(b"\x10" + bytes(40))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (corrupt, "model.safetensors"),
        (truncate, "model.safetensors"),
        (Path.unlink, "no .* safetensors|holds no|model.safetensors"),
        (drop_a_tensor, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_damaged_weights(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    models.save("llama", tmp_path)
    load(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=says) as stopped:
        load(tmp_path)
    assert "\n" not in str(stopped.value)
    assert str(tmp_path) in str(stopped.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    import torch

    models.save("llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartupError, match="safetensors"):
        load(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    models.model("llama").save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="tokenizer"):
        load_tokenizer(str(tmp_path), {})


def test_a_device_that_is_not_there() -> None:
    import torch

    if torch.cuda.is_available():
        assert pick_device("cuda:0") == "cuda:0"
    else:
        with pytest.raises(StartupError, match="cuda"):
            pick_device("cuda")


def test_a_card_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == "cuda:1"
    with pytest.raises(StartupError, match=r"^DEVICE is 'cuda:7', but this machine has cuda:0, cuda:1 only\.$"):
        pick_device("cuda:7")


def load_both(folder: Path) -> None:
    load_tokenizer(str(folder), {})
    load(folder)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("config.json", "[]"),
        ("config.json", "3"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "3"),
    ],
)
def test_a_configuration_of_another_kind_is_one_line(tmp_path: Path, name: str, held: str) -> None:
    models.save("llama", tmp_path)
    (tmp_path / name).write_text(held)
    with pytest.raises(StartupError) as stopped:
        load_both(tmp_path)
    assert "\n" not in str(stopped.value)
    assert str(tmp_path) in str(stopped.value)
