"""A process that uses the library may end whenever it likes: within a text, a capture, a move of weights."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, threading, time
from neuronpedia_inference.errors import NotReady
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

kept = Runtime.load(Settings.read(num_threads=1, reuse_memory_gib=0, max_loaded_saes=1))

def ask(operation, **body):
    try:
        while True:
            asyncio.run(answer(by_name[operation], {"prompt": "The cat " * 80, **body}, kept))
    except NotReady:
        pass  # it was told that the process ends

class Slow:
    # It takes its time to be let go, as many objects do on a busy machine.
    def __init__(self):
        self.sleep = time.sleep

    def __del__(self):
        self.sleep(3)

def beside(*asked, **body):
    threading.Thread(target=ask, args=asked, kwargs=body, daemon=True).start()
    time.sleep(1)

def arrive():
    # An SAE that is as long in native code as a large one.
    import torch

    arriving = threading.Event()

    def multiply():
        arriving.set()
        a, until = torch.ones(1000, 1000), time.monotonic() + 3
        while time.monotonic() < until:
            a @ a

    store = kept.shelf._store
    load, store._load = store._load, lambda *spec, **how: (multiply(), load(*spec, **how))[1]
    for source in ("15-res-4k", "20-res-4k"):  # one of them is not here
        beside("top_k", source=source, top_k=5)
    arriving.wait()

"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "kept.close()",
        "del kept",
        "slow = Slow()",
        "beside('steer', features=[], max_new_tokens=1000)",
        "beside('top_k', source='20-res-4k', top_k=5)",
        "arrive()",
    ],
)
def test_a_process_may_end_at_any_moment(end: str) -> None:
    """An interpreter that ends beside a thread in native code is aborted (-6)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + end], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
