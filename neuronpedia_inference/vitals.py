"""How a server is, in the names of the wire's `/v1/steer/health` (contract 4.8)."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.engine.memory import Usage

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Load:
    """Generations now, and the share from 0 to 1 of the memory for requests that is admitted."""

    running: int
    waiting: int
    parked: int
    """They have made way for others."""
    admitted: float


def vitals(model: str, load: Load, usage: Usage) -> dict[str, Any]:
    """The stats, for a coroutine to ask: tasks are those of its event loop. Sizes in MiB, shares in percent."""
    gpus = None if usage.device_name is None else [_gpu(usage.device_name, usage)]
    percent = 100 * load.admitted
    return {
        "timestamp": time.time(),
        "num_running_requests": load.running,
        "num_waiting_requests": load.waiting,
        "num_swapped_requests": load.parked,
        "gpu_cache_usage_percent": 0.0 if gpus is None else percent,
        "cpu_cache_usage_percent": percent if gpus is None else 0.0,
        "system_ram_used_mb": usage.host_used / MIB,
        "system_ram_total_mb": usage.host_total / MIB,
        "system_ram_percent": 100 * usage.host_used / usage.host_total,
        "process_ram_mb": usage.process / MIB,
        "gpu_stats": gpus,
        "active_threads": threading.active_count(),
        "thread_names": [thread.name for thread in threading.enumerate()],
        "pending_tasks": len(asyncio.all_tasks()),
        "engine_initialized": True,
        "model_name": model,
    }


def _gpu(name: str, usage: Usage) -> dict[str, Any]:
    return {
        "id": 0,
        "name": name,
        "memory_used_mb": usage.device_used / MIB,
        "memory_total_mb": usage.device_total / MIB,
        "memory_percent": 100 * usage.device_used / usage.device_total,
        "gpu_utilization": None,
    }
