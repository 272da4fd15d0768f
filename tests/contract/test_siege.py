"""The siege judges what it saw by its own bounds, and its attacks are what it says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from benchmarks.siege import MOST_HEALTH_P99_MS, siege_bounds
from benchmarks.siege_hostile import BODIES, OTHERS, Door, draw
from benchmarks.soak import QUIET, Run, Scrape
from benchmarks.soak_clients import Tally

HEALTH_MS = [1.0] * 995


def scrape(**counts: int) -> Scrape:
    requests = Counter({("steer", outcome): n for outcome, n in counts.items()})
    return Scrape(requests, Counter(), Counter(), dict.fromkeys(QUIET, 0))


def run(counted: dict[str, int], *, slow: int = 0, end_mib: float = 1000.0) -> Run:
    """One answered and one overloaded, as the clients saw it."""
    tally = Tally(counts=Counter({("steer", "answered"): 1, ("steer", "overloaded"): 1}))
    return Run(tally, scrape(), scrape(**counted), HEALTH_MS + [1000.0] * slow, 1000.0, end_mib)


@pytest.mark.parametrize(
    ("seen", "missed"),
    [
        (run({"answered": 1, "overloaded": 1}), set()),
        (run({"answered": 1, "overloaded": 1}, slow=5), set()),
        (run({"answered": 1, "overloaded": 1}, slow=50), {"/health, 99th percentile, ms"}),
        (run({"answered": 1, "overloaded": 1}, end_mib=1031), {"growth of memory"}),
        (run({"answered": 1, "failed": 1, "overloaded": 1}), {"operations with requests not counted once"}),
        (run({"answered": 1}), {"operations with requests not counted once"}),
    ],
)
def test_bounds(seen: Run, missed: set[str]) -> None:
    found = {bound.name for bound in siege_bounds(seen) if not bound.holds}
    assert missed <= found
    assert bool(missed) == bool(found)
    assert MOST_HEALTH_P99_MS in {bound.at_most for bound in siege_bounds(seen)}


def test_every_attack_is_drawn() -> None:
    rng = random.Random(0)
    assert {draw(rng) for _ in range(2000)} == {*BODIES, *OTHERS}


def test_a_head_holds_what_ordinary_clients_send() -> None:
    head = Door("http://127.0.0.1:5002", {"X-SECRET-KEY": "one"}).head("/v1/steer", "Content-Length: 2")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/steer HTTP/1.1"
    assert {"Host: 127.0.0.1:5002", "X-SECRET-KEY: one", "Content-Length: 2"} <= set(lines)
    assert head.endswith(b"\r\n\r\n")
