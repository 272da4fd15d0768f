"""What a container is at the moment of its memory snapshot, and what is left to do after the restore."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from neuronpedia_inference.embedded.weights import default_cache_dir
from tests import models
from tests.modal.local_modal import Plane
from tests.modal.local_modal.containers import Container
from tests.modal.local_modal.hub import a_hub
from tests.modal.service_under_test import EMBEDDED, START_S, Deployed, fill_volume

REMOTE = "tests/remote"
DUMP = "import faulthandler, signal; faulthandler.register(signal.SIGUSR2, file=open({path!r}, 'w'))"
"""Run first in a container: it writes where its threads are whenever it is asked."""
WEIGHTS = re.compile(r"\.(safetensors|gguf|bin)\b|/blobs/|/cache/|/volumes/")
"""Files of weights by their names, those of the hub's cache, and all others on the volume."""
OF_MODAL = ("modal/", "synchronicity/", "grpclib/", "asyncio/")


@dataclass
class Process:
    """What `/proc` tells of a container."""

    inet_sockets: list[str]
    weights_mapped: list[str]
    python_threads: list[str]
    """The files of each thread's frames, innermost first."""
    n_threads: int
    commits: int


def look_at(container: Container, plane: Plane, dump: Path) -> Process:
    folder = Path("/proc") / str(container.process.pid)
    links = [os.readlink(one) for one in (folder / "fd").iterdir() if one.is_symlink()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = [(folder / "net" / name).read_text().splitlines()[1:] for name in ("tcp", "tcp6", "udp", "udp6")]
    mapped = {line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines() if "/" in line}
    os.kill(container.process.pid, signal.SIGUSR2)
    said, before, deadline = "", None, time.monotonic() + START_S
    while (not said or said != before) and time.monotonic() < deadline:  # until all of it is written
        time.sleep(0.2)
        said, before = dump.read_text(), said
    threads = re.split(r"^(?:Current t|T)hread .*$", said, flags=re.MULTILINE)[1:]
    return Process(
        inet_sockets=[row for table in tables for row in table if row.split()[9] in inodes],
        weights_mapped=sorted(path for path in mapped if WEIGHTS.search(path)),
        python_threads=[" ".join(re.findall(r'File "([^"]+)"', thread)) for thread in threads],
        n_threads=len(list((folder / "task").iterdir())),
        commits=plane.objects.volume("hf-cache-neuronpedia").commits,
    )


@dataclass
class Watched:
    """A deployment whose containers are looked at when their memory is kept."""

    service: Deployed
    seen: list[Process]
    asked: list[str]
    """Of the hub."""

    def ready(self, app: str) -> Container:
        url = self.service.function(app=app).urls["serve"]
        response = httpx.get(f"{url}/ready", timeout=START_S)
        function = self.service.function(app=app)
        container = [one for one in self.service.plane.containers if one.pool.function is function][-1]
        assert response.status_code == 200, container.text
        return container


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("snapshot")
    models.save("llama", folder / "remote")
    with Plane(folder / "plane", snapshots=True) as plane, a_hub({REMOTE: folder / "remote"}) as (url, asked):
        fill_volume(plane)
        service, seen = Deployed(plane, folder), []
        plane.fault = DUMP.format(path=str(folder / "dump"))
        plane.at_snapshot = lambda one: seen.append(look_at(one, plane, folder / "dump"))
        made = service.modal("secret", "create", "hub", f"HF_ENDPOINT={url}", "SECRET=one")
        assert made.code == 0, made.text
        yield Watched(service, seen, asked)


@pytest.mark.parametrize("gpu", ["L4", "none"], ids=["before a GPU comes", "everything"])
def test_nothing_is_open_or_mapped(watched: Watched, gpu: str) -> None:
    """A model that was just downloaded: the hub's client had a connection, and its file was read."""
    app = f"remote-{gpu.lower()}"
    hub = watched.service.plane.objects.volume("hf-cache-neuronpedia").folder / "huggingface" / "hub"
    subprocess.run(["rm", "-rf", str(hub / "models--tests--remote")], check=True)
    watched.asked.clear()
    before = watched.service.plane.objects.volume("hf-cache-neuronpedia").commits
    watched.service.deploy(APP_NAME=app, SECRET_NAME="hub", MODEL_ID=REMOTE, SAE_SETS="[]", GPU=gpu, NUM_THREADS="1")
    container = watched.ready(app)

    process = watched.seen[-1]
    assert any(path.endswith("model.safetensors") for path in watched.asked)
    assert process.inet_sockets == []
    assert process.weights_mapped == []
    assert process.commits == before + 1
    of_ours = [thread for thread in process.python_threads if not any(one in thread for one in OF_MODAL)]
    assert of_ours == []
    assert len(process.python_threads) <= process.n_threads
    watched.service.stop(container)


def test_what_is_there_is_neither_asked_for_nor_committed(watched: Watched) -> None:
    watched.service.deploy(APP_NAME="again", SECRET_NAME="hub", MODEL_ID=REMOTE, SAE_SETS="[]", GPU="none")
    watched.ready("again")
    watched.asked.clear()
    (container,) = [one for one in watched.service.plane.containers if one.exit_code is None]
    watched.service.stop(container)
    before = watched.service.plane.objects.volume("hf-cache-neuronpedia").commits
    container = watched.ready("again")
    assert [path for path in watched.asked if "tests/remote" in path] == []
    assert watched.seen[-1].commits == before
    watched.service.stop(container)


def test_what_a_first_start_measures_is_committed_and_a_second_only_reads_it(watched: Watched) -> None:
    """With the device that comes after the snapshot, which is the first to be probed."""
    volume = watched.service.plane.objects.volume("hf-cache-neuronpedia")
    watched.service.deploy(
        APP_NAME="measured", SECRET_NAME="hub", MODEL_ID=REMOTE, SAE_SETS="[]", GPU="L4", NUM_THREADS="1"
    )
    for kept in default_cache_dir().glob("verdict-*.json"):
        kept.unlink()
    container = watched.ready("measured")
    assert volume.commits == watched.seen[-1].commits + 1
    watched.service.stop(container)
    (verdict,) = default_cache_dir().glob("verdict-*.json")
    written = verdict.stat().st_mtime_ns
    container = watched.ready("measured")
    assert volume.commits == watched.seen[-1].commits
    assert verdict.stat().st_mtime_ns == written
    watched.service.stop(container)


def test_the_secret_is_read_again_after_the_snapshot(watched: Watched) -> None:
    """The restored process has another environment, as Modal gives it: its secret counts, and its limits too."""
    plane = watched.service.plane
    watched.service.deploy(APP_NAME="renewed", SECRET_NAME="hub", MODEL_ID=REMOTE, SAE_SETS="[]", GPU="none")
    looked = plane.at_snapshot
    plane.fault += RENEWED
    try:
        watched.ready("renewed")
        url = watched.service.function(app="renewed").urls["serve"]
        body = {"prompt": "a", "source": "1"}
        answers = [
            httpx.post(f"{url}/v1/top-k", json=body, headers={"X-SECRET-KEY": key}, timeout=600)
            for key in ("one", "two")
        ]
        assert [answer.status_code for answer in answers] == [401, 200]
        about = httpx.get(f"{url}/v1/capabilities", headers={"X-SECRET-KEY": "two"}, timeout=600).json()
        assert about["token_limit"] == 44
    finally:
        plane.fault = plane.fault.removesuffix(RENEWED)
        plane.at_snapshot = looked


RENEWED = """
from modal._runtime import task_lifecycle_manager as _manager
_manager._read_spec_environ = lambda calls=[]: calls.append(1) or ({} if len(calls) == 1 else NEW)
NEW = {"SECRET": "two", "TOKEN_LIMIT": "44"}
"""
"""Modal's runtime reads the environment of a restored container from a file of its sandbox, which is not here."""


def test_after_the_snapshot_only_the_worker_is_left_to_start(watched: Watched) -> None:
    """What that takes in seconds is measured by `benchmarks/restore.py`."""
    watched.service.deploy(APP_NAME="quick", GPU="none", **EMBEDDED)
    container = watched.ready("quick")
    assert watched.seen[-1].weights_mapped == []
    before = container.log[: container.n_log_lines_at_snapshot]
    after = container.log[container.n_log_lines_at_snapshot :]
    assert [line for line in before if line.startswith("SAE 3 of 3")]
    told = [line for line in after if not re.match(r"\d{4}-\d\d-\d\d", line)]
    assert len(told) == 1
    assert re.fullmatch(r"Ready: smollm2-135m-instruct on cpu, 3 SAEs, [0-9.]+ s after the snapshot\n", told[0])
    watched.service.stop(container)
