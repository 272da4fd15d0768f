"""`neuronpedia-inference` in a process of its own, as a person or a supervisor runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from served import SOON_S

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "neuronpedia_inference"]
Process = subprocess.Popen[str]


def surroundings(**environment: str) -> dict[str, str]:
    """The package is found whether or not it is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "NUM_THREADS": "1", **environment}


@contextmanager
def command(words: Sequence[str], *, start: Sequence[str] = COMMAND, **environment: str) -> Iterator[Process]:
    """`start` may be another program that then runs the command."""
    pipe: Any = subprocess.PIPE
    process = subprocess.Popen(
        [*start, *words], env=surroundings(**environment), stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_with(process: Process, text: str) -> str:
    """The next line of standard output that holds `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line.strip()
    raise AssertionError(f"no line with {text!r}; {process.communicate()[1]}")


def ended(process: Process) -> tuple[int, str]:
    """Exit code and standard error of a process that ends by itself."""
    _, errors = process.communicate(timeout=SOON_S)
    return process.returncode, errors
