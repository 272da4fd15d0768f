"""How much memory is free on the device, or on the machine that stands in for one."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What can still be allocated there now; on a host, no more than its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, _left_in_group(_CGROUP)))


def _left_in_group(group: Path) -> float:
    """Bytes left to a container; infinite where nothing limits it."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return float("inf")
    return max(0, limit - used)
