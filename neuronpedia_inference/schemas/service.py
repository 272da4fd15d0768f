"""What the service says about itself. These bodies are snake_case always."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from neuronpedia_inference.schemas.common import Reply, Wire, examples


class Health(BaseModel):
    """The process lives. Says nothing about the model: see `/ready`."""

    status: Literal["healthy"] = Field(default="healthy", description="Always `healthy`.")


class Ready(BaseModel):
    """The model is loaded and answers; until then the answer is an error with status 503."""

    status: Literal["ready"] = Field(default="ready", description="Always `ready`.")
    model: str = Field(description="The model served.")


class Capabilities(RootModel[dict[str, Any]]):
    """Model, sources, limits and routes of this server: an open object that may gain keys."""


class SteerHealthRequest(Wire):
    """How the server is; there is nothing to choose."""

    model_config = ConfigDict(json_schema_extra=examples({}))


class GpuStats(Reply):
    """A GPU that the model is on."""

    id: int = Field(description="Its number among those that the process sees.")
    name: str = Field(description="What it is.")
    memory_used_mb: float = Field(description="Memory in use, by whomever, in MiB.")
    memory_total_mb: float = Field(description="Memory in all, in MiB.")
    memory_percent: float = Field(description="The share in use.")
    gpu_utilization: float | None = Field(description="Null: it is not measured.")


class SteerStats(Reply):
    """The server now. Sizes are in MiB."""

    timestamp: float = Field(description="Seconds since 1970.")
    num_running_requests: int = Field(description="Generations under way.")
    num_waiting_requests: int = Field(description="Jobs that wait for their turn.")
    num_swapped_requests: int = Field(description="Generations that have made way for others, and go on later.")
    gpu_cache_usage_percent: float = Field(
        description="Share of the memory for requests that is admitted now, where the model is on a GPU; else 0."
    )
    cpu_cache_usage_percent: float = Field(description="The same where it is on the host; else 0.")
    system_ram_used_mb: float = Field(description="Memory of the machine that is in use.")
    system_ram_total_mb: float = Field(description="Memory of the machine.")
    system_ram_percent: float = Field(description="The share in use.")
    process_ram_mb: float = Field(description="Resident memory of this process.")
    gpu_stats: list[GpuStats] | None = Field(description="The model's GPU; null where it is on the host.")
    active_threads: int = Field(description="Threads of this process that Python knows.")
    thread_names: list[str] = Field(description="Their names.")
    pending_tasks: int = Field(description="Tasks of the event loop that answers.")
    engine_initialized: bool = Field(description="True: before the model is loaded the answer is a 503.")
    model_name: str = Field(description="The model served.")


class SteerHealthResponse(Reply):
    """How the server is, in numbers and in a line."""

    stats: SteerStats = Field(description="The numbers.")
    summary: str = Field(description="The same for people, in a line.")


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": "Unknown source '99-res-4k'. Available: 10-res-4k, 15-res-4k, 20-res-4k.",
                    "code": "unknown_source",
                    "request_id": "6f1c2b7e9d3a4f55",
                }
            ]
        }
    )

    error: str = Field(description="What went wrong, for people.")
    code: str = Field(description="What went wrong, for programs.")
    request_id: str = Field(description="Names this request in the server's log.")
    detail: list[dict[str, Any]] | None = Field(
        default=None, description="Only with status 422: each bad field as `{type, loc, msg}`."
    )
