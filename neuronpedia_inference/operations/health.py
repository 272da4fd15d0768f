"""steer_health: how busy the server is, and what memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuronpedia_inference.operations.operation import Operation
from neuronpedia_inference.schemas.service import SteerHealthRequest, SteerHealthResponse, SteerStats

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime


async def steer_health(_: SteerHealthRequest, rt: Runtime) -> SteerHealthResponse:
    """Never refuses."""
    stats = SteerStats(**rt.vitals())
    summary = (
        f"{stats.model_name}: {stats.num_running_requests} running, {stats.num_waiting_requests} waiting, "
        f"{stats.num_swapped_requests} parked; the process has {stats.process_ram_mb:.0f} MiB, "
        f"{stats.system_ram_percent:.0f} % of the machine's memory is in use"
    )
    gpus = [f"{gpu.memory_percent:.0f} % of {gpu.name}'s" for gpu in stats.gpu_stats or ()]
    return SteerHealthResponse(stats=stats, summary=", ".join([summary, *gpus]))


STEER_HEALTH = Operation(
    name="steer_health",
    method="GET",
    path="/v1/steer/health",
    request=SteerHealthRequest,
    response=SteerHealthResponse,
    summary="How busy the server is, and what memory it takes",
    run=steer_health,
)
