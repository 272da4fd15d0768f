"""How much memory is free on the device, or on the machine that stands in for one, and how much is used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What can still be allocated there now; on a host, no more than its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, _left_in_group(_CGROUP)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory in bytes; of the device None where that is the host."""

    process: int
    """Resident, of this process."""
    host_used: int
    host_total: int
    device_name: str | None = None
    device_used: int = 0
    device_total: int = 0


def usage(device: torch.device) -> Usage:
    """What is used now, by whomever."""
    host, process = psutil.virtual_memory(), psutil.Process().memory_info().rss
    of_host = Usage(process, host.total - host.available, host.total)
    if device.type != "cuda":
        return of_host
    free, total = torch.cuda.mem_get_info(device)
    return replace(
        of_host, device_name=torch.cuda.get_device_name(device), device_used=total - free, device_total=total
    )


def _left_in_group(group: Path) -> float:
    """Bytes left to a container; infinite where nothing limits it."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return float("inf")
    return max(0, limit - used)
