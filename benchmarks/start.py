"""How long the embedded model's server takes to be ready, against what cannot be left out, and the memory of it.

    python -m benchmarks.start [--rounds 7]

Plain: a process that imports torch and transformers and reads tokenizer and weights. Ours: `serve` until it says that
it is ready. Both are counted from the start of the process, with one thread; all caches are warm, and the two take
turns, so that a busy moment meets both. Memory: the most that the server has taken by the time it is ready, against
what it has after its first request (Linux only). Ends with 1 beyond the bounds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import Load, description
from benchmarks.process import Process
from neuronpedia_inference.embedded.weights import model_folder

BOUND, MEMORY_BOUND = 1.3, 1.1
READY_S = 600.0
QUESTION = {"prompt": "The cat sat on the mat.", "top_k": 5, "source": "15-res-4k"}


def plain(folder: Path) -> float:
    """Seconds until the weights are read."""
    started = time.perf_counter()
    process = Process("benchmarks.plain_start", str(folder))
    try:
        process.line(READY_S)
        return time.perf_counter() - started
    finally:
        process.close()


def served() -> tuple[float, float, float]:
    """Seconds until the server is ready; MiB that it has taken at most by then, and has after its first request."""
    started = time.perf_counter()
    process = Process("neuronpedia_inference", "serve", "--port", "0")
    try:
        url = process.wait_for(re.compile(r"Listening on (http://\S+)"), READY_S).group(1)
        process.wait_for(re.compile(r"^Ready in "), READY_S)
        seconds = time.perf_counter() - started
        peak = _mib(process.pid, "VmHWM")
        httpx.post(f"{url}/v1/top-k", json=QUESTION, timeout=READY_S).raise_for_status()
        return seconds, peak, _mib(process.pid, "VmRSS")
    finally:
        process.close()


def measure(rounds: int) -> dict[str, Any]:
    """Medians, and the least of each, with how busy the machine was."""
    folder = model_folder()
    plain(folder)
    served()  # caches and files are warm from here on
    load = Load()
    plains, ours = [], []
    for _ in range(rounds):
        plains.append(plain(folder))
        ours.append(served())
    seconds, peaks, after = zip(*ours, strict=True)
    return {
        **description(),
        **load.since(),
        "rounds": rounds,
        "plain_s": round(statistics.median(plains), 3),
        "served_s": round(statistics.median(seconds), 3),
        "ratio": round(statistics.median(one / other for one, other in zip(seconds, plains, strict=True)), 3),
        "ratio_of_least": round(min(seconds) / min(plains), 3),
        "peak_mib_at_ready": round(statistics.median(peaks)),
        "mib_after_first_request": round(statistics.median(after)),
        "memory_ratio": round(statistics.median(a / b for a, b in zip(peaks, after, strict=True)), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    found = measure(parser.parse_args().rounds)
    print(json.dumps(found, indent=2))
    return int(found["ratio"] > BOUND or found["memory_ratio"] > MEMORY_BOUND)


def _mib(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) / 1024


if __name__ == "__main__":
    sys.exit(main())
