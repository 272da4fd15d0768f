"""Weights that move into large pages: the same numbers, in memory once, and with the server at work; blocks kept."""

from __future__ import annotations

import asyncio
import mmap
import platform
import re
import subprocess
import sys
import threading
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

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
pytestmark = pytest.mark.skipif(not LARGE_PAGES.exists(), reason="only a Linux with large pages is asked")

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


def resident(file: Path) -> int:
    """KiB of it that are in this process's memory."""
    found, is_its = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_its = line.endswith(str(file))
        elif is_its and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


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
    in_memory = resident(tmp_path / "model.safetensors")
    run(model)
    assert resident(tmp_path / "model.safetensors") < in_memory / 10
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


def test_reproducible_requests_wait_for_the_move_and_others_go_on_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of a product depend on how its weights are aligned."""
    steps, may_end = 0, threading.Event()

    def unending(_: Any) -> Steps:
        nonlocal steps
        while not may_end.is_set():
            steps += 1
            yield None
        return 0

    monkeypatch.setattr(host_memory, "moving", unending)
    runtime = Runtime.load(Settings.read(num_threads=1))
    asked = {
        "top_k": {"prompt": "The cat", "source": "15-res-4k", "top_k": 1},
        "steer": {"prompt": "The cat", "features": [], "max_new_tokens": 2, "compare": False},
    }

    async def ask(operation: str, **more: Any) -> Any:
        return await answer(by_name[operation], {**asked[operation], **more}, runtime)

    async def both() -> None:
        async with asyncio.timeout(300):
            waiting = [asyncio.create_task(ask(operation, reproducible=True)) for operation in asked]
            for operation in (*asked, *asked):
                before = steps
                await ask(operation)
                while steps == before:  # whoever comes, the move goes on
                    await asyncio.sleep(0.001)
            assert not any(one.done() for one in waiting)
            may_end.set()
            await asyncio.gather(*waiting)

    try:
        asyncio.run(both())
    finally:
        may_end.set()
        runtime.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is asked")
def test_blocks_that_are_freed_are_kept_for_the_next() -> None:
    """Where they are not, every layer of a long prompt asks for its pages anew."""
    program = """
import sys
import psutil
import torch
from neuronpedia_inference.host_memory import keep_blocks

if sys.argv[1:]:
    keep_blocks(2**20)

def resident():
    return psutil.Process().memory_info().rss

before = resident()
blocks = [torch.ones(3 * 2**18) for _ in range(13)]
taken = resident() - before
del blocks
print(taken, resident() - before)
"""
    left = []
    for arguments in ((), ("kept",)):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        taken, after = map(int, done.stdout.split())
        left.append(after / taken)
    given_back, kept = left
    assert given_back < 0.2
    assert kept > 0.8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is asked")
def test_gaps_between_blocks_in_use_are_given_back() -> None:
    program = """
import psutil
import torch
from neuronpedia_inference.host_memory import give_back, keep_blocks

def resident():
    return psutil.Process().memory_info().rss

keep_blocks(2**20)
before = resident()
blocks = [torch.ones(2**17) for _ in range(64)]
taken = resident() - before
kept = blocks[::2]
del blocks
with_gaps = resident() - before
give_back()
print(taken, with_gaps, resident() - before, all(block.sum() == 2**17 for block in kept))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    *sizes, is_whole = done.stdout.split()
    taken, with_gaps, without = map(int, sizes)
    assert with_gaps > 0.8 * taken
    assert without < 0.7 * taken
    assert is_whole == "True"
