"""Runs a tree's own program with one fault put into it: `python -P fire_injected.py FAULT WORDS...`.

The tree is the one on PYTHONPATH, of whatever age: what has been called by several names is looked for by all of them.
It imports nothing of this folder.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn


class PanicException(BaseException):
    """As pyo3 makes it of a panic in Rust: a name, and no Exception."""


class Killed(BaseException):
    """What no handler may swallow."""


def panic() -> None:
    """Every text to be tokenized makes pydantic's core panic."""
    from neuronpedia_inference.operations import by_name

    async def panicking(*_: Any) -> NoReturn:
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    object.__setattr__(by_name["tokenize"], "run", panicking)
    _command_line()


def worker() -> None:
    """The worker's thread is killed at its first capture."""
    from neuronpedia_inference.runtime import Runtime

    load: Callable[..., Any] = Runtime.load

    def capture(*_: Any) -> NoReturn:
        raise Killed("the worker is killed")

    def doomed(*args: Any, **options: Any) -> Any:
        runtime = load(*args, **options)
        engine = runtime._worker._engine
        for name in ("capture", "begin_capture"):
            if hasattr(engine, name):
                setattr(engine, name, capture)
        return runtime

    Runtime.load = doomed  # pyright: ignore[reportAttributeAccessIssue]
    _command_line()


def cards() -> None:
    """A machine with one card, so far as torch says."""
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    _command_line()


def nobody() -> None:
    """A user of whom the system knows nothing."""
    os.getuid = lambda: 2**31 - 7
    _command_line()


def door() -> None:
    """The web door of Modal's class over a model of this process, on a free port."""
    import uvicorn

    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings
    from service.inference_cls import Inference

    settings = Settings.read()
    runtime = Runtime.load(settings)
    of_class: Any = Inference
    made = vars(of_class._get_user_cls())["serve"]._get_raw_f()
    app = made(SimpleNamespace(_settings=settings, _serving=lambda: runtime))
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"Listening on http://127.0.0.1:{listener.getsockname()[1]}\nReady in no time", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run(sockets=[listener])


def batch() -> None:
    """`batch INPUT OUTPUT [GO]`: a job of Modal's command line, whose every prompt is answered with itself.

    GO: a file that is waited for before each answer.
    """
    from service.inference_cls import _run_batch

    source, output, *go = sys.argv[1:]
    echo = _Echo([Path(one) for one in go])
    _run_batch(echo, source, output, "activations", "")


class _Echo:
    """What a job asks, by either name."""

    def __init__(self, awaited: list[Path]) -> None:
        self._awaited = awaited
        self.activations = SimpleNamespace(map=self._map)
        self.answer_many = SimpleNamespace(remote=SimpleNamespace(aio=self._answer_many))

    def _map(self, bodies: Any, return_exceptions: bool) -> Any:
        for body in bodies:
            while not self._may_go():
                time.sleep(0.02)
            yield {"echo": body}

    async def _answer_many(self, _: str, bodies: list[Any]) -> list[Any]:
        while not self._may_go():
            await asyncio.sleep(0.02)
        return [{"answer": {"echo": body}} for body in bodies]

    def _may_go(self) -> bool:
        return all(path.exists() for path in self._awaited)


def _command_line() -> None:
    from neuronpedia_inference.cli import main

    main()


FAULTS = {one.__name__: one for one in (panic, worker, cards, nobody, door, batch)}


if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
