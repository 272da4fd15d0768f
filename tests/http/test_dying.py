"""A server whose engine dies says so, and ends with a code of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from served import SOON_S, until

from neuronpedia_inference import cli
from neuronpedia_inference.web.serve import Watch
from tests import models

ROOT = Path(__file__).resolve().parents[2]
DYING = Path(__file__).with_name("dying.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def dying(request: pytest.FixtureRequest, tiny: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of a server that dies as `request.param` says."""
    options = ["serve", "--model-id", str(tiny), "--sae-sets", "[]", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, str(DYING), request.param, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("dying", ["device", "worker"], indirect=True)
def test_it_says_so_for_a_while_and_ends(dying: subprocess.Popen[str]) -> None:
    assert dying.stdout is not None
    url = next(line for line in dying.stdout if "Listening on" in line).split()[-1]
    assert next(line for line in dying.stdout if "Ready in" in line)
    with httpx.Client(base_url=url, timeout=SOON_S) as http:
        assert http.get("/ready").json()["status"] == "ready"
        wanted = {"model": "tiny", "prompt": "a", "source": "1", "index": "3"}
        assert http.post("/v1/activation/single", json=wanted).json()["code"] in ("engine_failed", "not_ready")
        until(lambda: http.get("/ready").status_code == 503)
        assert "worker has died" in http.get("/ready").json()["error"]
        assert http.get("/health").json() == {"status": "healthy"}
        assert http.post("/v1/activation/single", json=wanted).json()["code"] == "not_ready"
    _, log = dying.communicate(timeout=SOON_S)
    assert dying.returncode == cli.ENGINE_DIED == 3
    *_, said = log.splitlines()
    assert said.startswith("neuronpedia-inference: The device has failed or the worker has died")


def test_the_end_of_a_server_that_stops_is_no_death() -> None:
    stops: list[str] = []
    watch, closed_runtime = Watch(lambda: stops.append("stopped")), SimpleNamespace(healthy=False)
    watch.close()
    watch._watch(closed_runtime)  # pyright: ignore[reportArgumentType]
    assert (watch.engine_died, stops) == (False, [])
