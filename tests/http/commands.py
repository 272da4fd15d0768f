"""`neuronpedia-inference` in a process of its own, as a person or a supervisor runs it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from served import SOON_S

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "neuronpedia_inference"]
Process = subprocess.Popen[str]


def surroundings(**environment: str) -> dict[str, str]:
    """The package is found whether or not it is installed, and a terminal is as wide as it is."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**inherited, "PYTHONPATH": str(ROOT), "NUM_THREADS": "1", **environment}


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


def on_a_terminal(*words: str, width: int, **environment: str) -> str:
    """What a command writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen(
        [*COMMAND, *words], env=surroundings(**environment), stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # what a terminal raises at its end
            while part := os.read(ours, 2**16):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")


def without_colours(shown: str) -> str:
    """Nor what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
