"""Many clients at once, a quarter of whose requests hang up at a random moment: does the server keep its books?

`python -m benchmarks.soak` starts a server, warms it up, lets the clients loose, waits until it is quiet, prints a
table and writes `benchmarks/results/soak.json`. It exits with 1 if one of these does not hold:

- Every request that was sent is counted by the server exactly once, operation by operation. With A, R, O answers,
  refusals and 503s as the clients saw them, H hang-ups, and a, r, o, c what the server counted as answered, refused,
  overloaded and cancelled: a ≥ A, r ≥ R, o ≥ O, and (a - A) + (r - R) + (o - O) + c = H. A hang-up is in a, r or o
  where it came too late: the server had ended the request, and the client had not read it to its end.
- No request failed, on either side.
- Nothing is left: no row decodes, nothing waits, no request is inside, no SAE is leased.
- The server's memory grew by at most 5 % since after the warm-up, quiet against quiet.
- `/health`, asked ten times a second throughout, answered within 50 ms in the median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import Load, description
from benchmarks.process import Process
from benchmarks.soak_clients import ANSWER_S, SEEN, Counts, Tally, crowd

RESULTS = Path(__file__).parent / "results" / "soak.json"
SETTINGS = {"NUM_THREADS": "1", "LOG_LEVEL": "warning"}
LOAD_S, QUIET_S = 300.0, 60.0
PROBE_S = 0.1
MOST_GROWTH, MOST_HEALTH_MS = 0.05, 50.0
QUIET = ("waiting_jobs", "running_generations", "decoding_rows", "admitted_requests", "sae_leased")

# Server


@dataclass(frozen=True)
class Scrape:
    """`/metrics` at one moment."""

    requests: Counts
    jobs: Counter[str]
    not_admitted: Counter[str]
    """By bound."""
    gauges: dict[str, int]
    """Those of QUIET."""


async def scrape(http: httpx.AsyncClient) -> Scrape:
    families = text_string_to_metric_families((await http.get("/metrics")).raise_for_status().text)
    samples = [sample for family in families for sample in family.samples]
    found = [(sample.name.removeprefix("neuronpedia_"), sample.labels, int(sample.value)) for sample in samples]
    return Scrape(
        Counter({(labels["operation"], labels["outcome"]): n for name, labels, n in found if name == "requests_total"}),
        Counter({labels["outcome"]: n for name, labels, n in found if name == "jobs_total"}),
        Counter({labels["bound"]: n for name, labels, n in found if name == "admission_refusals_total"}),
        {name: n for name, _, n in found if name in QUIET},
    )


async def scrape_when_quiet(http: httpx.AsyncClient) -> Scrape:
    """Waits until nothing is going on, but not for ever."""
    until_s = time.monotonic() + QUIET_S
    while any((now := await scrape(http)).gauges.values()) and time.monotonic() < until_s:
        await asyncio.sleep(0.1)
    return now


async def probe(http: httpx.AsyncClient, milliseconds: list[float]) -> None:
    """`/health` until cancelled."""
    while True:
        started_s = time.perf_counter()
        (await http.get("/health")).raise_for_status()
        milliseconds.append(1000 * (time.perf_counter() - started_s))
        await asyncio.sleep(PROBE_S)


async def resident_mib(server: psutil.Process) -> float:
    """Median of a few looks at a quiet server."""
    looks = []
    for _ in range(9):
        await asyncio.sleep(0.3)
        looks.append(server.memory_info().rss / 2**20)
    return statistics.median(looks)


# The run


@dataclass(frozen=True)
class Run:
    """What was seen between the warm-up and the end."""

    tally: Tally
    before: Scrape
    after: Scrape
    health_ms: list[float]
    warm_mib: float
    end_mib: float

    @property
    def counted(self) -> Counts:
        """By the server."""
        return self.after.requests - self.before.requests

    @property
    def growth(self) -> float:
        return self.end_mib / self.warm_mib - 1


async def soak(url: str, server: psutil.Process, wanted: argparse.Namespace) -> Run:
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S) as http:
        await crowd(url, wanted.clients, wanted.warm_up, wanted.seed + 1)
        before = await scrape_when_quiet(http)
        warm_mib = await resident_mib(server)
        health_ms: list[float] = []
        probing = asyncio.create_task(probe(http, health_ms))
        tally = await crowd(url, wanted.clients, wanted.seconds, wanted.seed)
        after = await scrape_when_quiet(http)
        probing.cancel()
        await asyncio.wait((probing,))
        if not probing.cancelled():
            tally.faults.append(f"/health: {probing.exception()!r}")
        return Run(tally, before, after, health_ms, warm_mib, await resident_mib(server))


def run(wanted: argparse.Namespace) -> Run:
    server = Process("neuronpedia_inference", "serve", "--port", "0", env=SETTINGS)
    try:
        url = server.wait_for(re.compile(r"Listening on (http://\S+)"), LOAD_S).group(1)
        server.wait_for(re.compile(r"^Ready in "), LOAD_S)
        (process,) = psutil.Process().children()
        return asyncio.run(soak(url, process, wanted))
    finally:
        server.close()


# The verdict


@dataclass(frozen=True)
class Bound:
    """What was measured, and the most that it may be."""

    name: str
    measured: float
    at_most: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.at_most


def bounds(run: Run) -> list[Bound]:
    return [
        Bound("operations with requests not counted once", len(miscounted(run)), 0),
        Bound("operations with outcomes seen but not counted", len(unaccounted(run)), 0),
        Bound("unexpected answers", len(run.tally.faults), 0),
        Bound("requests that failed in the server", _by_outcome(run.counted).get("failed", 0), 0),
        *(Bound(f"left at the end: {name}", run.after.gauges[name], 0) for name in QUIET),
        Bound("growth of memory", round(run.growth, 4), MOST_GROWTH),
        Bound("/health, median ms", round(statistics.median(run.health_ms), 1), MOST_HEALTH_MS),
    ]


def miscounted(run: Run) -> dict[str, tuple[int, int]]:
    """Operations of which the server counted another number of requests than were sent: (sent, counted)."""
    sent, counted = _by_operation(run.tally.counts), _by_operation(run.counted)
    return {name: (sent[name], counted[name]) for name in sent | counted if sent[name] != counted[name]}


def unaccounted(run: Run) -> list[str]:
    """Operations of which the clients saw more of an outcome than the server counted."""
    seen = {key: n for key, n in run.tally.counts.items() if key[1] in SEEN}
    return sorted({operation for (operation, outcome), n in seen.items() if n > run.counted[operation, outcome]})


def _by_operation(counts: Counts) -> Counter[str]:
    total: Counter[str] = Counter()
    for (operation, _), n in counts.items():
        total[operation] += n
    return total


def _by_outcome(counts: Counts) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (_, outcome), n in counts.items():
        total[outcome] += n
    return dict(sorted(total.items()))


def report(run: Run, wanted: argparse.Namespace) -> dict[str, Any]:
    health = sorted(run.health_ms)
    return {
        "asked": vars(wanted),
        "sent": run.tally.counts.total(),
        "seen_by_clients": _by_outcome(run.tally.counts),
        "counted_by_server": _by_outcome(run.counted),
        "jobs": dict(run.after.jobs - run.before.jobs),
        "not_admitted_by_bound": dict(run.after.not_admitted - run.before.not_admitted),
        "operations": dict(sorted(_by_operation(run.tally.counts).items())),
        "health_ms": {
            "probes": len(health),
            "median": round(statistics.median(health), 1),
            "p99": round(health[int(0.99 * len(health))], 1),
            "most": round(health[-1], 1),
        },
        "memory_mib": {"after_warm_up": round(run.warm_mib, 1), "end": round(run.end_mib, 1)},
        "faults": run.tally.faults[:20],
        "miscounted": miscounted(run),
        "bounds": [{**asdict(bound), "holds": bound.holds} for bound in bounds(run)],
    }


def show(body: dict[str, Any]) -> None:
    print(f"{body['sent']} requests in {body['asked']['seconds']:g} s from {body['asked']['clients']} clients")
    print(f"  clients saw     {_words(body['seen_by_clients'])}")
    print(f"  server counted  {_words(body['counted_by_server'])}")
    print(f"  jobs            {_words(body['jobs'])}")
    print(f"  not admitted    {_words(body['not_admitted_by_bound']) or 'none'}")
    print(f"  memory, MiB     {_words(body['memory_mib'])}")
    print(f"  /health, ms     {_words(body['health_ms'])}")
    for bound in body["bounds"]:
        verdict = "ok" if bound["holds"] else "MISSED"
        print(f"{bound['name']:48} {bound['measured']:8g} of at most {bound['at_most']:<6g} {verdict}")
    for fault in body["faults"]:
        print(f"fault: {fault}")


def _words(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {n:g}" for name, n in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the clients go on asking")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds of the same before anything is measured")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    wanted, load = parser.parse_args(), Load()
    measured = run(wanted)
    body = {"machine": description(), "load": load.since(), **report(measured, wanted)}
    show(body)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return 0 if all(bound.holds for bound in bounds(measured)) else 1


if __name__ == "__main__":
    sys.exit(main())
