"""A server whose engine dies says so, and ends with a code of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from served import SOON_S, until

from neuronpedia_inference import cli
from neuronpedia_inference.web.serve import watch
from tests import models

ROOT = Path(__file__).resolve().parents[2]
DYING = Path(__file__).with_name("dying.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("llama", tmp_path_factory.mktemp("tiny"))


Start = Callable[[str, float], tuple[subprocess.Popen[str], str]]
WANTED = {"model": "tiny", "prompt": "a", "source": "1", "index": "3"}


@pytest.fixture
def start(tiny: Path) -> Iterator[Start]:
    """A process and its address, given how its engine dies and for how many seconds it says so."""
    options = ["serve", "--model-id", str(tiny), "--sae-sets", "[]", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUM_THREADS": "1"}
    with ExitStack() as stack:

        def started(death: str, farewell_s: float) -> tuple[subprocess.Popen[str], str]:
            command = [sys.executable, str(DYING), death, str(farewell_s), *options]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            url = next(line for line in process.stdout if "Listening on" in line).split()[-1]
            assert next(line for line in process.stdout if "Ready in" in line)
            return process, url

        yield started


@pytest.mark.parametrize(("death", "code"), [("device", "engine_failed"), ("worker", "not_ready")])
def test_it_says_so_and_a_signal_does_not_make_it_a_success(start: Start, death: str, code: str) -> None:
    process, url = start(death, SOON_S)
    with httpx.Client(base_url=url, timeout=SOON_S) as http:
        assert http.get("/ready").json()["status"] == "ready"
        assert http.post("/v1/activation/single", json=WANTED).json()["code"] == code
        until(lambda: http.get("/ready").status_code == 503)
        assert "worker has died" in http.get("/ready").json()["error"]
        assert http.get("/health").json() == {"status": "healthy"}
        assert http.post("/v1/activation/single", json=WANTED).json()["code"] == "not_ready"
    process.send_signal(signal.SIGTERM)
    _ended(process)


def test_it_ends_by_itself(start: Start) -> None:
    process, url = start("device", 0.1)
    assert httpx.post(f"{url}/v1/activation/single", json=WANTED, timeout=SOON_S).status_code == 500
    _ended(process)


def _ended(process: subprocess.Popen[str]) -> None:
    _, log = process.communicate(timeout=SOON_S)
    assert process.returncode == cli.ENGINE_DIED == 3
    *_, said = log.splitlines()
    assert said.startswith("neuronpedia-inference: The device has failed or the worker has died")


def test_the_end_of_a_server_that_stops_is_no_death() -> None:
    stops: list[str] = []
    stopping, closed_runtime = threading.Event(), SimpleNamespace(healthy=False)
    stopping.set()
    watch(closed_runtime, lambda: stops.append("stopped"), stopping)  # pyright: ignore[reportArgumentType]
    assert stops == []
