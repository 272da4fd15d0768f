"""Part 6: signals while it loads, while it serves, and to a command."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import Thread

import httpx

from benchmarks.fire_tree import ANSWER_S, Running, Served, Tree, patience, short, tail, until

STAGES = ("Listening on", "Finding the weights", "Loading", "SAE 1")
"""What is said as each step of loading begins."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the time that the weights take to load, much of which is native code."""
INTO_IT_S, LEFT_S, SOON_S, DRAINED_S = 0.3, 2.0, 5.0, 45.0
LONG = {"prompt": "a", "features": [], "stream": True, "max_new_tokens": 3500}
"""Two texts of minutes."""
BY_SIGINT = 130


def loading_is_left_at_once(tree: Tree) -> str:
    """SIGTERM while loading stops it within 2 s with exit code 0 and nothing on standard error, at whatever moment."""
    with tree.loading() as served:
        served.wait_for("Loading")
        began = time.monotonic()
        served.wait_for("SAE 1")
        loading_s = time.monotonic() - began
    moments = [(stage, INTO_IT_S) for stage in STAGES] + [("Loading", share * loading_s) for share in SHARES]
    longest = 0.0
    for stage, into_it_s in moments:
        with tree.loading() as served:
            served.wait_for(stage)
            time.sleep(into_it_s)
            sent = served.interrupt(signal.SIGTERM)
            code = served.ended(60 * patience())
            longest = max(longest, time.monotonic() - sent)
            place = f"{into_it_s:.1f} s into {stage!r}"
            assert code == 0, f"{place}: exit code {code}: {tail(served.err)}"
            assert not served.err, f"{place}: {tail(served.err)}"
            assert longest <= LEFT_S * patience(), f"{place}: after {longest:.1f} s"
    return f"exit code 0 at each of {len(moments)} moments, after {longest:.1f} s at most"


@dataclass(frozen=True)
class Stopped:
    """A server that was told to stop while it streamed."""

    end: str
    """The last lines of the stream, or how it broke."""
    code: int
    err: str
    seconds: float


class _Stream:
    """A long answer, read by a thread of its own."""

    def __init__(self, served: Served) -> None:
        self.lines: list[str] = []
        self.broken = ""
        self._url = served.url
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/steer", json=LONG, timeout=ANSWER_S) as answer:
                self.lines.extend(line for line in answer.iter_lines() if line)
        except httpx.HTTPError as exc:
            self.broken = f"{type(exc).__name__}: {exc}"

    def end(self) -> str:
        self._thread.join(DRAINED_S * patience())
        assert not self._thread.is_alive(), "the stream goes on"
        return self.broken or " ".join(line[:300] for line in self.lines[-2:])


@cache
def _stopped(tree: Tree) -> Stopped:
    with tree.serving("--sae-sets", "[]", env={"DRAIN_TIMEOUT": "0"}) as served:
        stream = _Stream(served)
        until(lambda: stream.lines or stream.broken, ANSWER_S, "the stream begins")
        sent = served.interrupt(signal.SIGTERM)
        end = stream.end()
        code = served.ended(DRAINED_S * patience())
        return Stopped(end, code, served.err, time.monotonic() - sent)


def streams_end_in_an_error_event(tree: Tree) -> str:
    """Drain for a stated time (DRAIN_TIMEOUT), then every stream ends in its error event."""
    stopped = _stopped(tree)
    shown = f"{stopped.seconds:.0f} s after the signal: {short(stopped.end)}"
    assert "event: error" in stopped.end, shown
    told = json.loads(stopped.end.rpartition("data: ")[2])
    assert "server stopped" in told["error"], shown
    return f"{shown}; exit code {stopped.code}"


def a_stop_prints_no_traceback(tree: Tree) -> str:
    """Shutdown prints no tracebacks."""
    stopped = _stopped(tree)
    n_lines = len(stopped.err.splitlines())
    assert "Traceback" not in stopped.err, f"{n_lines} lines with a traceback: {tail(stopped.err)}"
    return f"exit code {stopped.code}, {n_lines} lines on standard error"


def _ends(running: Running, sent: float, seconds: float) -> str:
    code = running.ended(seconds * patience())
    assert code == BY_SIGINT, f"exit code {code}: {tail(running.err)}"
    assert "Traceback" not in running.err, tail(running.err)
    return f"exit code {code} after {time.monotonic() - sent:.1f} s"


def ctrl_c_ends_a_call_that_streams(tree: Tree) -> str:
    """Ctrl-C in `call ... "stream": true` ends it at once (it waited 65 s, unseen)."""
    words = ("call", "steer", json.dumps(LONG), "--sae-sets", "[]")
    with tree.running(*words) as running:
        running.wait_for('"steered"')
        return _ends(running, running.interrupt(signal.SIGINT), SOON_S)


def a_second_sigint_waits_for_nobody(tree: Tree) -> str:
    """SIGINT twice ends the server at once, whatever it does (it took 9 s)."""
    with tree.serving("--sae-sets", "[]") as served:
        stream = _Stream(served)
        until(lambda: stream.lines or stream.broken, ANSWER_S, "the stream begins")
        served.interrupt(signal.SIGINT)
        until(lambda: not _answers(served), SOON_S * patience(), "no new request is taken behind the first")
        return _ends(served, served.interrupt(signal.SIGINT), SOON_S)


def _answers(served: Served) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{served.url}/health").is_success
    return False


def exit_codes_are_documented(tree: Tree) -> str:
    """Exit codes are documented, those of signals too."""
    for page in sorted((tree.root / "docs").glob("*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            if str(BY_SIGINT) in line and "SIGINT" in line:
                return f"docs/{page.name}: {line}"
    raise AssertionError(f"no page of docs/ says what exit code {BY_SIGINT} is")


PROBES = {
    6: (
        loading_is_left_at_once,
        streams_end_in_an_error_event,
        a_stop_prints_no_traceback,
        ctrl_c_ends_a_call_that_streams,
        a_second_sigint_waits_for_nobody,
        exit_codes_are_documented,
    )
}
