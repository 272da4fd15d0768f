"""What the service says about itself. These bodies are snake_case always."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Health(BaseModel):
    """The process lives. Says nothing about the model: see `/ready`."""

    status: Literal["healthy"] = Field(default="healthy", description="Always `healthy`.")


class Ready(BaseModel):
    """The model is loaded and answers; until then the answer is an error with status 503."""

    status: Literal["ready"] = Field(default="ready", description="Always `ready`.")
    model: str = Field(description="The model served.")


class Capabilities(RootModel[dict[str, Any]]):
    """Model, sources, limits and routes of this server: an open object that may gain keys."""


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
