"""Persona axes: where the messages of a chat lie on directions that were fitted beforehand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import AtMost, EchoedText, Many, ModelName, Name, Reply, Wire, examples

MAX_MESSAGES = 1024
AtMostMessages = AtMost(MAX_MESSAGES)

PcValues = Annotated[
    dict[str, float],
    Field(description="By title, where the message lies on each axis, in the model as it is."),
]
Snippet = Annotated[str, Field(description="The first 120 characters of the message.")]


class PersonaMessage(Wire):
    """One message of a chat."""

    role: Name = Field(description="Who speaks: a role that the model's chat template knows.")
    content: EchoedText = Field(description="What is said.")


class PersonaMonitorRequest(Wire):
    """Where the assistant's messages lie on the persona axes of this model."""

    model: ModelName
    layer: int | None = Field(
        default=None, description="The layer that the axes were fitted at; another is refused. Null means that one."
    )
    conversation: Annotated[Many[PersonaMessage], AtMostMessages] = Field(description="The chat, oldest message first.")

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "model": "smollm2-135m-instruct",
                "conversation": [
                    {"role": "user", "content": "Who are you?"},
                    {"role": "assistant", "content": "Arr, I be the captain of this ship!"},
                ],
            }
        )
    )


class PersonaTurn(Reply):
    """One message of the assistant's."""

    pc_values: PcValues
    snippet: Snippet


class PersonaMonitorResponse(Reply):
    """One turn per message of the assistant's, in order."""

    pc_titles: list[str] = Field(description="Titles of the axes; what stands right of the arrow is positive.")
    turns: list[PersonaTurn] = Field(description="The messages.")


class AssistantAxisTurn(Reply):
    """One message of the assistant's, the answer included."""

    pc_values: PcValues
    pc_values_post_cap: dict[str, float] | None = Field(
        default=None, description="The same under the steering; only of STEERED."
    )
    snippet: Snippet


class AssistantAxis(Reply):
    """Where the assistant's messages lie in one of the outputs."""

    type: Literal["STEERED", "DEFAULT"] = Field(description="Which output.")
    pc_titles: list[str] = Field(description="Titles of the axes.")
    turns: list[AssistantAxisTurn] = Field(description="One per message of the assistant's, in order.")
