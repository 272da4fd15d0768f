"""A tree of the project under fire: its commands and servers as processes of their own, and how they are spoken to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from benchmarks.fire_models import small
from benchmarks.process import KEPT, ONE_THREAD

INJECTED = Path(__file__).with_name("fire_injected.py")
MODEL = "smollm2-135m-instruct"
SOURCE = "15-res-4k"
SECRET = "fire-of-the-benchmark"
LOAD_S, ANSWER_S, END_S, WATCH_S = 300.0, 120.0, 300.0, 0.02
Environment = Mapping[str, str | None]
"""What a command finds there beside SETTINGS; null unsets a variable."""
UNCHANGED: Environment = {}
SETTINGS = {**ONE_THREAD, "NUM_THREADS": "1", "LOG_LEVEL": "error"}


@dataclass(frozen=True)
class Ended:
    """A command that came to its end."""

    code: int
    out: str
    err: str
    seconds: float

    def one_line(self, *says: str) -> str:
        """Its only line on standard error. Fails unless it ended with 1 and that line says all of it."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err, f"a traceback of {len(lines)} lines: {tail(self.err)}"
        assert self.code == 1, f"exit code {self.code}: {tail(self.err or self.out)}"
        assert len(lines) == 1, f"{len(lines)} lines: {tail(self.err)}"
        for word in says:
            assert word in lines[0], f"{word!r} is not in: {short(lines[0])}"
        return short(lines[0].removeprefix("neuronpedia-inference: "))


class Running:
    """A process that goes on, whose output goes to files."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self._folder = folder

    @property
    def out(self) -> str:
        return (self._folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, seconds: float = LOAD_S) -> re.Match[str]:
        """The first match in its output. Fails where the process ends before."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.out, re.MULTILINE)
            assert match or self.process.poll() is None, f"ended before {pattern!r}: {tail(self.err)}"
            return match

        match = until(found, seconds, f"says {pattern!r}")
        assert match
        return match

    def ended(self, seconds: float) -> int:
        """Its exit code. Fails where it is not over by then."""
        until(lambda: self.process.poll() is not None, seconds, "ends")
        return self.process.returncode

    def interrupt(self, number: signal.Signals) -> float:
        """When the signal was sent, by the monotonic clock."""
        self.process.send_signal(number)
        return time.monotonic()


class Served(Running):
    """A server that has said its address."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, secret: str | None) -> None:
        super().__init__(process, folder)
        self.url = self.wait_for(r"Listening on (http://\S+)").group(1)
        headers = {"X-SECRET-KEY": secret} if secret else {}
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_S, headers=headers)
        self.about = psutil.Process(process.pid)

    def ready(self) -> Self:
        self.wait_for("^Ready in ")
        return self

    def connected(self) -> socket.socket:
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port or 80), timeout=ANSWER_S)

    def asked(self, path: str, body: Mapping[str, Any], **headers: str) -> dict[str, Any]:
        """The answer. Fails on an error."""
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.status_code == 200, told(answer)
        return answer.json()

    def refused(self, path: str, body: Mapping[str, Any], *says: str, statuses: Sequence[int] = (400, 422)) -> str:
        """The error. Fails unless it is a refusal that says all of it."""
        answer = self.http.post(path, json=body)
        assert answer.status_code in statuses, told(answer)
        for word in says:
            assert word in answer.json()["error"], f"{word!r} is not in: {told(answer)}"
        return told(answer)

    def events(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Those of a streamed `/v1/steer`."""
        with self.http.stream("POST", "/v1/steer", json={**body, "stream": True}) as answer:
            lines = list(answer.iter_lines())
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    def processor_s(self) -> float:
        """What it has taken of the processor."""
        times = self.about.cpu_times()
        return times.user + times.system


class Tree:
    """A worktree of the project, run by this interpreter. Close it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._open = ExitStack()
        self.folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        self._n_folders = 0

    def close(self) -> None:
        self._open.close()

    @property
    def commit(self) -> str:
        command = ["git", "-C", str(self.root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def new_folder(self) -> Path:
        """An empty one, of this run."""
        self._n_folders += 1
        made = self.folder / str(self._n_folders)
        made.mkdir()
        return made

    def environment(self, env: Environment) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        wanted: dict[str, str | None] = {**kept, **SETTINGS, "PYTHONPATH": str(self.root), **env}
        return {name: value for name, value in wanted.items() if value is not None}

    def command(self, words: Sequence[str], fault: str | None, before: Sequence[str]) -> list[str]:
        """fault: of `fire_injected.py`; before: another program that runs the command."""
        run = ["-m", "neuronpedia_inference"] if fault is None else ["-P", str(INJECTED), fault]
        return [*before, sys.executable, *run, *words]

    def run(
        self,
        *words: str,
        fault: str | None = None,
        before: Sequence[str] = (),
        folder: Path | None = None,
        seconds: float = END_S,
        env: Environment = UNCHANGED,
    ) -> Ended:
        """A command to its end, for which it has so many seconds."""
        started = time.monotonic()
        process = subprocess.Popen(
            self.command(words, fault, before),
            env=self.environment(env),
            cwd=folder or self.new_folder(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s") from None
        finally:
            process.kill()
            process.wait()
        text, errors = (one.decode(errors="replace") for one in (out, err))
        return Ended(process.returncode, text, errors, time.monotonic() - started)

    @contextmanager
    def running(
        self, *words: str, fault: str | None = None, before: Sequence[str] = (), env: Environment = UNCHANGED
    ) -> Iterator[Running]:
        """A command that is killed at the end, if it has not come to its own."""
        with self._started(words, fault, before, env) as (process, folder):
            yield Running(process, folder)

    @contextmanager
    def loading(
        self, *words: str, fault: str | None = None, before: Sequence[str] = (), env: Environment = UNCHANGED
    ) -> Iterator[Served]:
        """A server on a port of its own."""
        words = ("serve", "--port", "0", *words)
        with self._started(words, fault, before, env) as (process, folder):
            served = Served(process, folder, env.get("SECRET"))
            with served.http:
                yield served

    @contextmanager
    def serving(
        self, *words: str, fault: str | None = None, before: Sequence[str] = (), env: Environment = UNCHANGED
    ) -> Iterator[Served]:
        """A server that is ready."""
        with self.loading(*words, fault=fault, before=before, env=env) as served:
            yield served.ready()

    @contextmanager
    def _started(
        self, words: Sequence[str], fault: str | None, before: Sequence[str], env: Environment
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        folder = self.new_folder()
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                self.command(words, fault, before),
                env=self.environment(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        try:
            yield process, folder
        finally:
            process.kill()
            process.wait()

    @cached_property
    def open(self) -> Served:
        """The embedded model without a secret, for all that leave it as it was."""
        return self._open.enter_context(self.serving())

    @cached_property
    def locked(self) -> Served:
        """A small model behind SECRET, likewise; its client has the secret."""
        return self._open.enter_context(self.serving(*self.small_words, env={"SECRET": SECRET}))

    @cached_property
    def small(self) -> Path:
        """Folder of a model that starts in a moment."""
        return small(self.new_folder())

    @property
    def small_words(self) -> tuple[str, ...]:
        """Options of a command that loads it."""
        return "--model-id", str(self.small), "--sae-sets", "[]"


# Waiting, and what is shown


def patience() -> float:
    """How many times as long things take as where nothing else runs: one's share of the cores."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def until(condition: Callable[[], Any], seconds: float, says: str) -> Any:
    """What comes true. Fails where it does not in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {says}"
        time.sleep(WATCH_S)
    return found


def rest_of(connection: socket.socket, seconds: float) -> bytes | None:
    """What still comes until the other end closes; None where it does not in time."""
    received, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            chunk = connection.recv(2**16)
        except ConnectionError:
            return received
        except TimeoutError:
            return None
        if not chunk:
            return received
        received += chunk
    return None


def send(connection: socket.socket, data: bytes) -> bool:
    """False where the other end is gone before all was sent."""
    with suppress(ConnectionError, TimeoutError):
        connection.sendall(data)
        return True
    return False


def without_right_to_write() -> list[str]:
    """What runs a command for which the mode of a folder counts; root may write everywhere."""
    if os.geteuid():
        return []
    assert shutil.which("setpriv"), "as root this is tried with setpriv (util-linux), which is not here"
    return ["setpriv", "--bounding-set", "-dac_override"]


def limited(option: str, value: int) -> list[str]:
    """What runs a command under a limit of the shell's `ulimit`. Python would write cut bytecode for others to find."""
    return ["sh", "-c", f'ulimit {option} {value}; export PYTHONDONTWRITEBYTECODE=1; exec "$@"', "sh"]


def told(answer: httpx.Response) -> str:
    """Status and what is in it."""
    kind = answer.headers.get("content-type", "")
    body = answer.json() if kind.startswith("application/json") else answer.text
    if isinstance(body, dict) and "error" in body:
        body = f"{body.get('code', '')}: {body['error']}"
    return short(f"{answer.status_code} {body}")


def short(text: str, most: int = 200) -> str:
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    return text if len(text) <= most else text[:most] + " …"


def tail(text: str) -> str:
    """The end of an output."""
    return short(" ".join(text.splitlines()[-2:]))
