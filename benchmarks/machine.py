"""The machine of a run, and how busy it was."""

from __future__ import annotations

import os
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def description() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads_each": 1,
        "dtype": "float32",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    """Name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Load:
    """From its making to `since`, which is called when the contenders have ended."""

    def __init__(self) -> None:
        self._before = os.getloadavg()[0]
        self._started, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def since(self) -> dict[str, Any]:
        """`others_busy_cores`: how many cores other programs kept busy on average; null where it cannot be told."""
        busy, seconds = _busy_s(), time.monotonic() - self._started
        others = None
        if busy is not None and self._busy is not None:
            others = round(max(0.0, busy - self._busy - (_own_s() - self._own)) / seconds, 2)
        loads = {"load_before": round(self._before, 2), "load_after": round(os.getloadavg()[0], 2)}
        return {**loads, "minutes": round(seconds / 60, 1), "others_busy_cores": others}


def _busy_s() -> float | None:
    """Seconds that all cores together have worked since the machine's start; Linux only."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in spent)
