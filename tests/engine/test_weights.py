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
        load_tokenizer(str(tmp_path))


def test_a_device_that_is_not_there() -> None:
    import torch

    if torch.cuda.is_available():
        assert pick_device("cuda:0") == "cuda:0"
    else:
        with pytest.raises(StartupError, match="cuda"):
            pick_device("cuda")
