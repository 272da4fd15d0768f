"""A model that does not fit says so in one line: what it needs, what there is, and what helps."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuronpedia_inference import memory
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import OutOfMemory, StartupError
from neuronpedia_inference.memory import CONTEXT_BYTES, GIB, Needs, needs_at_start, sizes
from neuronpedia_inference.room import Room, allocating, check_fits, room_on
from neuronpedia_inference.settings import Settings
from tests import models

NEEDS = Needs("bfloat16", "float32", 17 * GIB, 0, GIB // 2)
NINE = "google/gemma-2-9b"


def refused(needs: Needs | None, room: Room) -> str:
    with pytest.raises(StartupError) as raised:
        check_fits(NINE, needs, room)
    return str(raised.value)


def test_a_card_that_is_too_small() -> None:
    text = refused(NEEDS, Room("Tesla T4", 15 * GIB, is_gpu=True))
    assert "needs 19.0 GiB (17.0 for weights, 0.5 for one completion of MAX_TOKENS, 1.5 for CUDA)" in text
    assert "this Tesla T4 had 15.0 GiB free. GPU=L4 has the memory." in text
    assert "\n" not in text


def test_the_gpu_that_is_named_fits() -> None:
    name = NEEDS.gpu
    assert name is not None
    check_fits(NINE, NEEDS, Room(name, int(memory.GPUS[name] * 1e9), is_gpu=True))


def test_to_the_byte() -> None:
    need = 17 * GIB + GIB // 2 + CONTEXT_BYTES
    check_fits(NINE, NEEDS, Room("card", need, is_gpu=True))
    refused(NEEDS, Room("card", need - 1, is_gpu=True))
    check_fits(NINE, NEEDS, Room("machine", need - CONTEXT_BYTES, is_gpu=False))


def test_advice_is_of_use() -> None:
    whole = Needs("float32", "float32", 300 * GIB, 0, 0)
    text = refused(whole, Room("NVIDIA B200", 170 * GIB, is_gpu=True))
    assert "No single GPU of Modal has the memory. MODEL_DTYPE=bfloat16 halves the weights" in text
    assert "GPU=" not in refused(whole, Room("machine", 8 * GIB, is_gpu=False))
    check_fits(NINE, None, Room("machine", 0, is_gpu=False))


@pytest.mark.parametrize("exc", [torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory("full"), MemoryError()])
def test_an_allocation_that_fails(exc: Exception) -> None:
    with (
        pytest.raises(StartupError, match=r"needs 19\.0 GiB .* this L4 had 22\.0 GiB free"),
        allocating(NINE, NEEDS, Room("L4", 22 * GIB, is_gpu=True)),
    ):
        raise exc


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="^shapes$"), allocating(NINE, NEEDS, Room("L4", 0, is_gpu=True)):
        raise RuntimeError("shapes")


def test_needs_are_those_of_the_files(tmp_path: Path) -> None:
    models.save("llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    stored = sum(tensor.nbytes for tensor in load_file(file).values())
    for dtype, share in (("auto", 1), ("float32", 1), ("bfloat16", 2)):
        settings = Settings.read(model_id=str(tmp_path), sae_sets=(), model_dtype=dtype, max_tokens=500)
        needs = needs_at_start(settings)
        assert needs is not None
        assert needs.weights * share == stored
        assert needs.cache == sizes(settings).needs(needs.model_dtype, "float32").cache // settings.max_rows
    assert needs_at_start(Settings.read(model_id=str(tmp_path / "none"), sae_sets=())) is None


def test_a_host_without_room_says_so() -> None:
    """A real allocation that fails: the process may not have more address space than it has after its imports."""
    program = (
        "import resource, sys; from neuronpedia_inference import loading; "
        "from neuronpedia_inference.settings import Settings; import transformers.models.llama.modeling_llama; "
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {GIB // 4}, {resource.RLIM_INFINITY})); "
        "loading.load_on_host(Settings.read(), lambda line: None)"
    )
    model_folder()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "StartupError: 'smollm2-135m-instruct' does not fit: it needs 0.7 GiB" in last, done.stderr
    assert room_on(torch.device("cpu")).free_bytes > 0
