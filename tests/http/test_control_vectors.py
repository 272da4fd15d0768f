"""Control vectors in GGUF files: written as repeng writes them, steered with against plain Hugging Face, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from served import TEXT, WIDTH, Served
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import neuronpedia_inference as ni
from neuronpedia_inference.cli import app
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import InvalidRequest

DIRECTIONS = {n: np.random.default_rng(n).normal(size=WIDTH).astype("<f4") for n in (10, 15, 29)}
STRENGTH = 8


def write(path: Path, tensors: dict[str, Any], architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 30)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "v.gguf", {f"direction.{n}": one for n, one in DIRECTIONS.items()})


def by_hand(strength: float) -> torch.Tensor:
    """Log-probabilities of what follows, every direction added to what its block gives."""
    net = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(model_folder())("<|im_start|>" + TEXT, return_tensors="pt")["input_ids"]
    for layer, direction in DIRECTIONS.items():
        added = strength * torch.from_numpy(direction)
        net.model.layers[layer].register_forward_hook(lambda _, __, out, added=added: out + added)
    with torch.no_grad():
        return net(ids).logits[0, -1].log_softmax(-1)


def test_a_file_steers_as_it_does_by_hand(server: Served, file: Path) -> None:
    vector = ni.ControlVector.read(file)
    assert (list(vector.directions), vector.model_hint) == ([10, 15, 29], "llama")
    body = {"prompt": TEXT, "max_new_tokens": 1, "n_logprobs": 1, **(vector @ STRENGTH).body()}
    with server.client() as http:
        answer = http.post("/v1/steer", json=body).json()
    told, plain = (answer[kind]["logprobs"][0]["logprob"] for kind in ("steered", "default"))
    assert told == pytest.approx(float(by_hand(STRENGTH).max()), abs=2e-3)
    assert plain == pytest.approx(float(by_hand(0).max()), abs=2e-3)
    assert abs(told - plain) > 0.1


def test_there_and_back(file: Path, tmp_path: Path) -> None:
    said, back = tmp_path / "steering.json", tmp_path / "back.gguf"
    run = CliRunner().invoke(app, ["vectors", "import", str(file), "--to", str(said), "--strength", "2"])
    assert run.exit_code == 0, run.output
    assert [one["hook"] for one in json.loads(said.read_text())["vectors"]][0] == "blocks.10.hook_resid_post"
    run = CliRunner().invoke(app, ["vectors", "export", str(said), str(back), "--model-hint", "llama"])
    assert run.exit_code == 0, run.output
    read = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(back).tensors}
    assert read.keys() == {f"direction.{n}" for n in DIRECTIONS}
    for n, direction in DIRECTIONS.items():
        np.testing.assert_array_equal(read[f"direction.{n}"], 2 * direction)
    printed = CliRunner().invoke(app, ["vectors", "import", str(file), "--strength", "2"])
    assert json.loads(printed.output) == json.loads(said.read_text())


@pytest.mark.parametrize(
    ("tensors", "architecture", "says"),
    [
        ({"direction.1": np.ones(4, "f4")}, "llama", "holds llama, not a controlvector"),
        ({"direction.0": np.ones(4, "f4")}, "controlvector", "which is no direction.N"),
        ({"weight": np.ones(4, "f4")}, "controlvector", "'weight' of shape [4], which is no direction.N"),
        ({"direction.1": np.ones((2, 4), "f4")}, "controlvector", "which is no direction.N"),
        ({"direction.1": np.ones(4, "f4"), "direction.2": np.ones(8, "f4")}, "controlvector", "of several widths"),
        ({}, "controlvector", "no direction"),
    ],
)
def test_a_file_that_is_no_control_vector(tmp_path: Path, tensors: Any, architecture: str, says: str) -> None:
    with pytest.raises(ValueError, match="v.gguf") as refused:
        ni.ControlVector.read(write(tmp_path / "v.gguf", tensors, architecture))
    assert says in str(refused.value)


@pytest.mark.parametrize("kept", [0, 3, 40, 200])
def test_a_file_that_is_cut_off(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        ni.ControlVector.read(file)
    run = CliRunner().invoke(app, ["vectors", "import", str(file)])
    assert isinstance(run.exception, InvalidRequest)


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        (ni.FeatureName("15-res-4k", 3) @ 5, "it cannot hold 15-res-4k/3 @ 5"),
        (ni.Vector([1.0], "blocks.3.hook_mlp_out") @ 1, "it cannot hold vector[1] at blocks.3.hook_mlp_out"),
        (ni.Vector([1.0], "blocks.3.hook_resid_post").cap(1), "it cannot hold"),
        (ni.Vector([1.0], "blocks.0.hook_resid_post") @ 1, "no direction for block 0"),
        (ni.Vector("vec:sha256:" + "0" * 64, "blocks.1.hook_resid_post") @ 1, "where the service keeps them"),
        (ni.Steering(), "no vector in this steering"),
    ],
)
def test_a_steering_that_no_file_can_hold(steering: ni.Steering, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ni.ControlVector.of(steering)
