"""The lens route: what the model would say behind each of its blocks, at every token (contract 4.5)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict

from neuronpedia_inference.domain import Section
from neuronpedia_inference.schemas.common import (
    MAX_NUMBERS,
    AtMost,
    EchoedText,
    Many,
    ModelName,
    Name,
    Reply,
    Wire,
    examples,
)
from neuronpedia_inference.schemas.steer import AtMostMessages
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.schemas.watch import MAX_LAYERS

MAX_TYPES = 16
MAX_STEER_TOKENS = 64
"""Tokens whose directions are added up."""

LensType = Literal["LOGIT_LENS", "JACOBIAN_LENS"]
Ids = Annotated[Many[int], AtMost(MAX_NUMBERS)]
Layers = Annotated[Many[int], AtMost(MAX_LAYERS)]


class LensChatMessage(Wire):
    """One message of a chat."""

    role: Name = Field(description="Who speaks: a role that the model's chat template knows, such as `user`.")
    content: EchoedText = Field(description="What is said.")

    model_config = ConfigDict(strict=False)


class LensSteerToken(Wire):
    """A token along whose direction the residual stream is changed."""

    token: EchoedText = Field(
        description="The token as text: one that is exactly this, of several the one with the lowest id; else one that "
        "is this without white space around."
    )
    type: LensType = Field(
        description="LOGIT_LENS: its row of the unembedding; JACOBIAN_LENS: that through the block's Jacobian, where "
        "it has one."
    )

    model_config = ConfigDict(strict=False)


class LensPromptRequest(Wire):
    """What the model would say behind each of its blocks, at the tokens of a prompt and of what it generates."""

    model: ModelName
    type: Annotated[Many[LensType], AtMost(MAX_TYPES)] = Field(
        description="The lenses, at least one; what is named twice counts once. LOGIT_LENS: final norm and unembedding "
        "on a block's output. JACOBIAN_LENS: the same on that output times the mean Jacobian of the last block's."
    )
    prompt: str | None = Field(default=None, description="A text; or else `chat`.")
    chat: Annotated[Many[LensChatMessage], AtMostMessages] | None = Field(
        default=None, description="A chat, oldest message first. The last one goes on if it is the assistant's."
    )
    input_token_ids: Ids = Field(
        default=[], description="Exactly these tokens, in place of `prompt` and `chat`; nothing is generated then."
    )
    top_n: int = Field(default=10, description="Tokens per block, 1 to the server's MAX_TOP_K.")
    layers: Layers = Field(
        default=[],
        description="Blocks to read behind; empty for all. Those that a lens does not have are left out; the last "
        "block is always there.",
    )
    max_seq_len: int | None = Field(
        default=None, description="Tokens of the prompt that are read; those behind them are left out."
    )
    prepend_bos: bool = Field(default=True, description="Begin a text with BOS unless it does; not for chats.")
    enable_thinking: bool = Field(
        default=False, description="What the chat template is told of thinking, where it asks for that."
    )
    preserve_thinking: bool = Field(
        default=True, description="Whether it keeps the thinking of earlier answers, where it asks for that."
    )
    stream: Annotated[bool, Strict()] = Field(
        default=True, description="Answer line by line, a JSON object each, as it becomes known."
    )
    temperature: float = Field(default=1.0, description="0 takes the likeliest token; each request draws anew.")
    num_completion_tokens: int = Field(default=0, description="Tokens to generate; 0 reads the prompt alone.")
    cached_token_ids: Ids = Field(
        default=[],
        description="Tokens of a prompt whose frames the caller has: those that this one begins with are not told "
        "again, unless something is steered.",
    )
    steer_tokens: Annotated[Many[LensSteerToken], AtMost(MAX_STEER_TOKENS)] = Field(
        default=[], description="The direction that is steered along: the sum of theirs, each of unit length."
    )
    steer_layers: Layers = Field(default=[], description="Blocks whose output is changed; none if empty.")
    steer_strength: float = Field(
        default=0.0,
        description="Times the norm of the block's output is added along the direction, at most once that norm.",
    )
    steer_ablate: bool = Field(default=False, description="Take the direction out instead of adding to it.")
    swap_token: LensSteerToken | None = Field(
        default=None, description="Turn what lies along the direction to this token's, instead of either."
    )
    steer_generated_tokens: bool = Field(
        default=False, description="Change it at generated tokens too, and not at the prompt's alone."
    )
    steering: Steering | None = Field(
        default=None,
        description="What else steers, as in `steer`; its edits act before the direction of `steer_tokens`, and its "
        "`max_dose` bounds that too.",
    )
    filter_non_word_tokens: bool = Field(
        default=True,
        description="Tell only tokens of letters and numbers. Probabilities are those among all tokens, and the "
        "likeliest behind the last block is always told.",
    )
    fail_if_busy: bool = Field(default=False, description="Answer 429 where the request would have to wait.")

    model_config = ConfigDict(
        strict=False,
        json_schema_extra=examples(
            {
                "model": "smollm2-135m-instruct",
                "type": ["LOGIT_LENS", "JACOBIAN_LENS"],
                "prompt": "The capital of France is",
                "top_n": 5,
                "layers": [15, 20, 25],
                "temperature": 0,
                "num_completion_tokens": 4,
                "stream": False,
            }
        ),
    )


class LensMeta(Reply):
    """How the answer was asked for."""

    kind: Literal["meta"] = Field(default="meta", description="Always `meta`.")
    model: str = Field(description="The request's `model`.")
    types: list[LensType] = Field(description="The lenses, in the order of `results`.")
    layers_by_type: dict[str, list[int]] = Field(description="The blocks that each reads behind, ascending.")
    top_n: int = Field(description="Tokens per block.")
    prompt_len: int = Field(description="Tokens of the prompt.")
    num_completion_tokens: int = Field(description="Tokens to generate at most.")
    temperature: float = Field(description="As asked for.")
    prepend_bos: bool = Field(description="As asked for.")
    reuse_len: int = Field(description="Tokens at the beginning that are not told again.")


class LensToken(Reply):
    """A token."""

    position: int = Field(description="Its place in prompt and completion, from 0.")
    token: str = Field(description="As text. Tokens that are parts of one character have the whole of it.")
    id: int = Field(description="Its id.")
    is_generated: bool = Field(description="False for the prompt's.")
    is_char_continuation: bool = Field(description="Whether it goes on with the character of the token before it.")
    message_index: int | None = Field(description="The message of the chat that it belongs to, if any.")
    role: str | None = Field(description="Who speaks there; null for texts.")
    channel: str | None = Field(description="The message's channel; null where it has none.")
    section: Section | None = Field(description="The part of its message; null for texts.")


class LensPrompt(Reply):
    """The tokens of the prompt, told before anything is computed."""

    kind: Literal["prompt"] = Field(default="prompt", description="Always `prompt`.")
    tokens: list[LensToken] = Field(description="All of them.")


class LensResult(Reply):
    """What one lens reads at a token."""

    type: LensType = Field(description="The lens.")
    top_tokens: list[list[str]] = Field(description="Of each block of `layers_by_type`, the likeliest tokens.")
    top_probs: list[list[float]] = Field(description="Their probabilities, with 4 decimals.")


class LensFrame(LensToken):
    """A token and what is read there."""

    kind: Literal["token"] = Field(default="token", description="Always `token`.")
    results: list[LensResult] = Field(description="One entry per lens.")


class LensDone(Reply):
    """The end."""

    kind: Literal["done"] = Field(default="done", description="Always `done`.")
    seq_len: int = Field(description="Tokens of prompt and completion.")
    prompt_len: int = Field(description="Tokens of the prompt.")
    vocab_size: int = Field(description="Tokens that the model can say.")
    completion: str = Field(description="The text that was generated, without the token that ended it.")


class LensPromptResponse(Reply):
    """Everything at once, where nothing is streamed. Streamed are `meta`, `prompt`, a line per token, and `done`."""

    meta: LensMeta = Field(description="How it was asked for.")
    tokens: list[LensFrame] = Field(description="The tokens from `reuse_len` on, with what is read there.")
    done: LensDone = Field(description="The end.")
