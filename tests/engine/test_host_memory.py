"""Weights that move into large pages: the same numbers, in memory once, and with the server at work; blocks kept."""

from __future__ import annotations

import asyncio
import mmap
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neuronpedia_inference import host_memory
from neuronpedia_inference.host_memory import moving, n_bytes_to_come
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def saved(folder: Path) -> Any:
    """A model whose weights are mapped from a file."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 40_000}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def flags_of(address: int) -> str:
    """What the kernel says of the region there."""
    region, lines = "", Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            region = "here" if int(head[1], 16) <= address < int(head[2], 16) else ""
        elif region and line.startswith("VmFlags:"):
            return line
    raise AssertionError(address)


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text(encoding="utf-8")


def run(model: Any) -> int:
    """To the end, as the worker does it."""
    with torch.inference_mode():
        steps = moving(model)
        while True:
            try:
                assert next(steps) is None
            except StopIteration as end:
                return end.value


def test_every_weight_is_the_same_and_the_file_is_let_go(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert is_mapped(tmp_path / "model.safetensors")
    large = [one for one in model.parameters() if one.nbytes > 2 * mmap.PAGESIZE]
    assert n_bytes_to_come(model) == sum(one.nbytes for one in large)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        logits = model(IDS).logits
    assert run(model) == sum(one.nbytes for one in model.parameters())
    assert not is_mapped(tmp_path / "model.safetensors")
    assert n_bytes_to_come(model) == 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(" hg" in flags_of(one.data_ptr()) and one.data_ptr() % 64 == 0 for one in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-6)


def test_between_two_steps_the_model_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a large weight are copied before anybody sees them."""
    monkeypatch.setattr(host_memory, "STEP_BYTES", 2**20)
    model = saved(tmp_path)
    with torch.inference_mode():
        logits = model(IDS).logits
        n_steps = 0
        for _ in moving(model):
            torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-6)
            n_steps += 1
    assert n_steps > len(list(model.parameters()))


def test_a_file_that_is_let_go_within_the_move_can_be_read_again(tmp_path: Path) -> None:
    """Whoever still holds the weight as it was finds the same numbers there."""
    model = saved(tmp_path)
    held = [one.data for one in model.parameters()]
    before = [one.clone() for one in held]
    run(model)
    assert all(torch.equal(one, was) for one, was in zip(held, before, strict=True))


def test_what_was_written_to_is_not_let_go(tmp_path: Path) -> None:
    """A page of a mapped file that has been written to is nowhere else."""
    model = saved(tmp_path)
    held = model.model.embed_tokens.weight.data
    held[20_000:20_100] = 7.0
    run(model)
    assert bool((held[20_000:20_100] == 7).all())
    assert bool((model.lm_head.weight[20_000:20_100] == 7).all())


def test_gradients_still_flow(tmp_path: Path) -> None:
    model = saved(tmp_path).requires_grad_(True)
    run(model)
    model(IDS).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("lack", ["of large pages", "of memory"])
def test_where_it_cannot_be_everything_stays(lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    model = saved(tmp_path)
    places = [one.data_ptr() for one in model.parameters()]
    if lack == "of memory":
        monkeypatch.setattr(mmap, "mmap", refused)
    else:
        monkeypatch.setattr(host_memory, "_ADVICE", None)
    assert run(model) == 0
    assert [one.data_ptr() for one in model.parameters()] == places


def test_reproducible_requests_wait_for_the_move_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of a product depend on how its weights are aligned."""
    gate: Future[None] = Future()

    def held(_: Any) -> Steps:
        yield gate
        return 0

    monkeypatch.setattr("neuronpedia_inference.runtime.moving", held)
    runtime = Runtime.load(Settings.read(num_threads=1))
    read = {"prompt": "The cat", "source": "15-res-4k", "top_k": 1}
    written = {"prompt": "The cat", "features": [], "max_new_tokens": 1, "compare": False}

    async def ask() -> None:
        for operation, body in (("top_k", read), ("steer", written)):
            await answer(by_name[operation], body, runtime)
        waiting = [
            asyncio.create_task(answer(by_name[operation], {**body, "reproducible": True}, runtime))
            for operation, body in (("top_k", read), ("steer", written))
        ]
        await answer(by_name["steer"], written, runtime)
        await asyncio.sleep(0.2)
        assert not any(one.done() for one in waiting)
        gate.set_result(None)
        await asyncio.gather(*waiting)

    try:
        asyncio.run(ask())
    finally:
        gate.cancel()
        runtime.close()


def test_a_process_may_end_within_the_move() -> None:
    """A thread that copies while the interpreter ends would have the process aborted."""
    program = (
        "from neuronpedia_inference.runtime import Runtime; from neuronpedia_inference.settings import Settings; "
        "kept = Runtime.load(Settings.read(num_threads=1))"
    )
    for end in ("", "; kept.close()", "; del kept"):
        command = [sys.executable, "-c", program + end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr


def test_blocks_that_are_freed_are_had_again_without_the_system() -> None:
    """Where they are not, every layer of a long prompt asks for its pages anew."""
    program = """
import resource, sys
import torch
from neuronpedia_inference.host_memory import keep_blocks

if sys.argv[1:]:
    keep_blocks()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def layer():
    return sum(len(one) for one in [torch.zeros(3 * 2**18) for _ in range(13)])

layer()
before = faults()
for _ in range(20):
    layer()
print(faults() - before)
"""
    taken = []
    for arguments in ((), ("kept",)):
        command = [sys.executable, "-c", program, *arguments]
        taken.append(int(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout))
    given_back, kept = taken
    n_pages = 13 * 3 * 2**20 // mmap.PAGESIZE
    assert kept < n_pages < given_back  # in twenty rounds
