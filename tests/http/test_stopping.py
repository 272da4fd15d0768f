"""Signals: what is inside gets its time and then an error, loading is left at once, and nothing aborts."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import Process, command, ended, line_with
from served import SOON_S, until

from neuronpedia_inference.embedded import weights
from tests import models

ASKED = {"prompt": "a", "features": [], "stream": True, "deltas": True}
LONG = {**ASKED, "max_new_tokens": 1900}
N_STREAMS = 4
BY_SIGINT = 130


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("llama", tmp_path_factory.mktemp("tiny"))


@contextmanager
def ready(tiny: Path, *words: str) -> Iterator[tuple[Process, str]]:
    """A server of the small model, and its address."""
    options = ["serve", "--port", "0", "--model-id", str(tiny), "--sae-sets", "[]", "--set", "LOG_FORMAT=json"]
    with command([*options, *words]) as process:
        url = line_with(process, "Listening on").rpartition(" ")[2]
        line_with(process, "Ready in")
        yield process, url


class Stream:
    """An answer in events, read by a thread of its own."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.broken: httpx.HTTPError | None = None
        self._ask = (f"{url}/v1/steer", body)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        url, body = self._ask
        try:
            with httpx.stream("POST", url, json=body, timeout=SOON_S) as answer:
                for line in answer.iter_lines():
                    self.lines.append(line)
        except httpx.HTTPError as exc:
            self.broken = exc

    def ended(self) -> list[str]:
        """Its lines that are not empty, once it is over."""
        self._thread.join(SOON_S)
        assert self.broken is None
        return [line for line in self.lines if line]


def logged(errors: str) -> list[dict[str, Any]]:
    """Fails on a line that is not one of the log's, such as those of a traceback."""
    return [json.loads(line) for line in errors.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_end_in_an_error_event_once_their_time_is_over(tiny: Path, number: signal.Signals) -> None:
    with ready(tiny, "--set", "DRAIN_TIMEOUT=0") as (process, url):
        streams = [Stream(url, LONG) for _ in range(N_STREAMS)]
        until(lambda: all(stream.lines for stream in streams))
        process.send_signal(number)
        for stream in streams:
            *_, kind, data = stream.ended()
            assert kind == "event: error"
            told = json.loads(data.removeprefix("data: "))
            assert told["code"] == "not_ready"
            assert "server stopped" in told["error"]
        code, errors = ended(process)
    assert code == 0
    requests = [line for line in logged(errors) if line["message"] == "request"]
    assert [line["code"] for line in requests] == ["not_ready"] * N_STREAMS
    assert not any("traceback" in line for line in logged(errors))


def test_streams_that_end_in_time_are_whole(tiny: Path) -> None:
    with ready(tiny, "--set", f"DRAIN_TIMEOUT={SOON_S}") as (process, url):
        stream = Stream(url, {**ASKED, "max_new_tokens": 200})
        until(lambda: bool(stream.lines))
        process.send_signal(signal.SIGTERM)
        *_, data = stream.ended()
        assert json.loads(data.removeprefix("data: "))["steered"]["finish_reason"] in ("length", "stop")
        code, errors = ended(process)
    assert code == 0
    assert not any("traceback" in line for line in logged(errors))


def test_a_second_sigint_ends_at_once(tiny: Path) -> None:
    with ready(tiny, "--set", f"DRAIN_TIMEOUT={SOON_S}") as (process, url), ExitStack() as left:
        streams = [left.enter_context(httpx.stream("POST", f"{url}/v1/steer", json=LONG)) for _ in range(N_STREAMS)]
        assert [stream.status_code for stream in streams] == [200] * N_STREAMS
        process.send_signal(signal.SIGINT)
        until(lambda: not answers(url))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        code, errors = ended(process)
    assert code == BY_SIGINT
    logged(errors)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


# Loading


STAGES = ["Listening on", "Finding the weights", "Loading", "SAE 1"]


@pytest.mark.parametrize(
    ("stage", "number"), [*((stage, signal.SIGTERM) for stage in STAGES), ("Loading", signal.SIGINT)]
)
def test_loading_is_left_at_once(stage: str, number: signal.Signals) -> None:
    """A moment after each step has begun, which is mostly inside native code."""
    with command(["serve", "--port", "0", "--set", "LOG_LEVEL=warning"]) as process:
        line_with(process, stage)
        time.sleep(0.3)
        process.send_signal(number)
        code, errors = ended(process)
    assert (code, errors) == (0, "")


def unfinished(cache: Path) -> list[Path]:
    return list(cache.glob(".smollm2-*"))


def test_loading_that_is_left_leaves_no_files(tmp_path: Path) -> None:
    with command(["serve", "--port", "0"], NEURONPEDIA_INFERENCE_CACHE=str(tmp_path)) as process:
        until(lambda: bool(unfinished(tmp_path)))
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_gguf: Path, target: Path) -> None:
        assert target in tmp_path.iterdir()
        weights.remove_orphans(tmp_path, ".smollm2-*")
        (target / "model.safetensors").write_bytes(b"small")  # its folder is still there

    with command(["serve", "--port", "0"], NEURONPEDIA_INFERENCE_CACHE=str(tmp_path)) as process:
        until(lambda: bool(unfinished(tmp_path)))
        weights.remove_orphans(tmp_path, ".smollm2-*")
        assert unfinished(tmp_path), "it is alive"
        process.kill()
        process.wait()
    assert unfinished(tmp_path)
    monkeypatch.setattr(weights, "_dequantise", build)
    folder = weights.model_folder(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


# call


def test_ctrl_c_ends_a_call_that_streams() -> None:
    """Long before the text is complete: its last event is never printed."""
    body = json.dumps({**LONG, "max_new_tokens": 6000})
    words = ["call", "steer", body, "--sae-sets", "[]", "--set", "MAX_TOKENS=8000"]
    with command(words) as process:
        line_with(process, "default")
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=SOON_S)
    assert process.returncode == BY_SIGINT
    assert '"finish_reason": "' not in said
    assert errors.splitlines()[-1].startswith("Ready in")


def test_ctrl_c_ends_a_call_that_loads() -> None:
    with command(["call", "tokenize", '{"model": "smollm2-135m-instruct", "text": "a"}']) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "Loading" in line)
        process.send_signal(signal.SIGINT)
        assert ended(process) == (BY_SIGINT, "")


def test_ctrl_c_ends_a_call_of_a_server(tiny: Path) -> None:
    """And the server learns of it."""
    with ready(tiny) as (_, url), command(["call", "steer", json.dumps(LONG), "--url", url]) as process:
        line_with(process, "default")
        process.send_signal(signal.SIGINT)
        assert ended(process) == (BY_SIGINT, "")
        until(lambda: inside(url) == 0)


def inside(url: str) -> int:
    return httpx.get(f"{url}/v1/capabilities", timeout=SOON_S).json()["requests"]["inside"]
