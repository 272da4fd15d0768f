"""A process that uses the library may end whenever it likes: within the move of weights, a text or a capture."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, threading, time
from neuronpedia_inference.errors import InferenceError
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

kept = Runtime.load(Settings.read(num_threads=1, reuse_memory_gib=0))

def ask(operation, **body):
    try:
        while True:
            asyncio.run(answer(by_name[operation], {"prompt": "The cat " * 100, **body}, kept))
    except InferenceError:
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
    ],
)
def test_a_process_may_end_at_any_moment(end: str) -> None:
    """An interpreter that ends beside a thread in native code is aborted (-6)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + end], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
