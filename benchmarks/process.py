"""Child processes of the comparison: one thread each, no setting of the machine, no network."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "NEURONPEDIA_INFERENCE_CACHE", "TMPDIR")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
ANSWER_S, STOP_S, LAST_LINES = 900.0, 60.0, 15


class ChildFailed(Exception):
    """A contender's process ended or fell silent; the message has its last lines."""


class Process:
    """A Python module in a process of its own, in an empty folder. Its diagnostics are kept for the error message."""

    def __init__(self, module: str, *args: str, python: str = sys.executable, env: Mapping[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [python, "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=self._folder.name,
            env=_environment(env or {}),
        )
        self._last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._draining = threading.Thread(target=self._drain, daemon=True)
        self._draining.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: re.Pattern[str], timeout_s: float) -> re.Match[str]:
        """The first line of output with `pattern`. Raises ChildFailed."""
        while True:
            if found := pattern.search(self.line(timeout_s)):
                return found

    def line(self, timeout_s: float = ANSWER_S) -> str:
        """The next line of output. A process that says nothing for so long is ended. Raises ChildFailed."""
        assert self._process.stdout is not None
        watch = threading.Timer(timeout_s, self._process.kill)
        watch.start()
        try:
            text = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not text:
            self._process.wait()
            self._draining.join()
            raise ChildFailed(f"{self._process.args} ended:\n{''.join(self._last)}")
        self._last.append(text)
        return text

    def send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Ask it to stop, and end it if it does not."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._draining.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._folder.cleanup()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        self._last.extend(self._process.stderr)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, **ONE_THREAD, "PYTHONPATH": str(ROOT), **extra}


class Child:
    """A contender that speaks JSON lines; see `benchmarks.child`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.versions: dict[str, str] = json.loads(process.line())["versions"]

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        self._process.send(json.dumps(line))
        return json.loads(self._process.line())

    def close(self) -> None:
        self._process.close()


def run_to_end(command: Sequence[str]) -> None:
    """Raises ChildFailed with the command's last lines."""
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-LAST_LINES:]
        raise ChildFailed(f"{' '.join(command)} failed:\n" + "\n".join(lines))
