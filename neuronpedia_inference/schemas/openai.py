"""Requests of OpenAI's routes, with features beside its fields.

Fields are null wherever OpenAI allows it. Those of `IGNORED` change nothing here and are taken without a look; every
other field that is not served is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from neuronpedia_inference.errors import did_you_mean
from neuronpedia_inference.schemas.common import (
    MOST_NAME,
    AtMost,
    EchoedText,
    Many,
    Name,
    Ours,
    Reproducible,
    Seed,
    examples,
    spellings,
)
from neuronpedia_inference.schemas.judge import Judge
from neuronpedia_inference.schemas.steer import AtMostMessages, Temperature
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.schemas.watch import AskedWatch, SteerRule
from neuronpedia_inference.schemas.words import problem
from neuronpedia_inference.watches.plan import MAX_WATCHES
from neuronpedia_inference.watches.rules import MAX_RULES

MAX_CHOICES = 16
"""Answers to one prompt."""
MAX_PROMPTS = 64
"""Of one request."""
MAX_CHOICES_IN_ALL = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 300
MAX_CANDIDATES = 20
"""Log-probabilities reported per token."""
MAX_TOKEN_IDS = 2**20
MAX_PARTS = 64
"""Parts of one message."""
MAX_TOOLS = 128
MAX_NAMED = 8
"""Unknown fields in a message."""
DEFAULT_CHAT_TOKENS = 512
DEFAULT_TEXT_TOKENS = 16
"""Tokens to generate where nothing is said; the second is OpenAI's."""

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields for OpenAI's own bookkeeping."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "text" if not isinstance(value, list) else "texts"
    if isinstance(value[0], list):
        return "lists_of_token_ids"
    return "token_ids" if isinstance(value[0], int) else "texts"


def _kind_of_content(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Penalty = Annotated[float, Field(ge=-2, le=2)]
StopStrings = Annotated[
    Many[Annotated[EchoedText, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
    AtMost(MAX_STOPS),
    BeforeValidator(_as_list),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1)]
TokenIds = Annotated[Many[Annotated[int, Field(ge=0)]], AtMost(MAX_TOKEN_IDS)]
Prompts = Annotated[
    Annotated[EchoedText, Tag("text")]
    | Annotated[Many[EchoedText], AtMost(MAX_PROMPTS), Field(min_length=1), Tag("texts")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[Many[TokenIds], AtMost(MAX_PROMPTS), Tag("lists_of_token_ids")],
    Discriminator(_kind_of_prompt),
]


class Lenient(Ours):
    """A JSON object of an OpenAI client: what is null, or `IGNORED`, is as if it were not there."""

    @model_validator(mode="before")
    @classmethod
    def _know_all(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        given = {key: value for key, value in body.items() if value is not None and key not in IGNORED}
        known = spellings(cls)
        unknown = list(islice((key for key in given if key not in known), MAX_NAMED))
        if unknown:
            raise PydanticCustomError("unknown_field", "{problem}", {"problem": cls._problem(unknown)})
        return given

    @classmethod
    def _problem(cls, unknown: Sequence[str]) -> str:
        names = [str(name)[:MOST_NAME] for name in unknown]
        near = did_you_mean(names[0], cls.model_fields)
        one_or_more = (
            "is no field that is served: leave it out." if len(names) == 1 else "are no fields that are served."
        )
        return f"{', '.join(map(repr, names))} {one_or_more}{near}"


class TextPart(Lenient):
    """A part of a message; only texts are read."""

    type: Literal["text"] = Field(description="`text`: images and sounds are not read.")
    text: EchoedText = Field(description="What is said.")


Content = Annotated[
    Annotated[EchoedText, Tag("text")] | Annotated[Many[TextPart], AtMost(MAX_PARTS), Tag("parts")],
    Discriminator(_kind_of_content),
]


class ChatTurn(Lenient):
    """One message of a chat."""

    role: Name = Field(description="Who speaks: a role that the model's chat template knows, such as `user`.")
    content: Content | None = Field(
        default=None, description="What is said, as a text or in parts, which are joined by line breaks."
    )
    reasoning_content: EchoedText | None = Field(
        default=None, description="What an earlier answer thought, for templates that read it."
    )
    tool_calls: Annotated[Many[dict[str, Any]], AtMost(MAX_TOOLS)] | None = Field(
        default=None, description="Calls of an earlier answer, for templates that read them."
    )
    tool_call_id: Name | None = Field(
        default=None, description="Of a tool's answer: the call's, for templates that read it."
    )
    name: Name | None = Field(default=None, description="Who speaks, by name, for templates that read it.")


class StreamOptions(Lenient):
    """What a stream tells beside its text."""

    include_usage: bool = Field(default=False, description="A last event, without choices, counts the tokens.")


class ResponseFormat(Lenient):
    """What an answer must look like."""

    type: Literal["text"] = Field(description="`text`: nothing else is served.")


class Completing(Steering, Lenient):
    """What chats and completions share: how to draw, and what to steer with, watch and end at."""

    model: Name | None = Field(
        default=None,
        description="The served model, or `NAME+variant` for one of VARIANTS; `/v1/models` lists them, and other names "
        "are refused. Left out: the served model.",
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = Field(
        default=1, description="Answers, each with a seed of its own."
    )
    stream: bool = Field(default=False, description="Answer with server-sent events, `data: [DONE]` at the end.")
    stream_options: StreamOptions | None = Field(default=None, description="With `stream`: what else it tells.")
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Only the likeliest tokens are drawn, as many as reach this probability."
    )
    frequency_penalty: Penalty = Field(
        default=0.0,
        description="Subtracted from a token's logit per occurrence in the answer, before the temperature, at 0 too.",
    )
    presence_penalty: Penalty = Field(default=0.0, description="Likewise, once for a token that has occurred.")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        default=None, description="Added to the logits of tokens, by token id."
    )
    seed: Seed | None = Field(
        default=None, description="Starts the random draws; the k-th answer has seed + k. Left out: another each time."
    )
    stop: StopStrings | None = Field(
        default=None, description="Texts that end an answer, and are no part of it; one may stand without a list."
    )
    response_format: ResponseFormat | None = Field(default=None, description="`text` is what is served.")
    watch: Annotated[Many[AskedWatch], AtMost(MAX_WATCHES)] | None = Field(
        default=None, description="What to read at every token of prompt and answer; comes under `interpretability`."
    )
    rules: Annotated[Many[SteerRule], AtMost(MAX_RULES)] | None = Field(
        default=None, description="When to end early. A token is sent once the rules have seen it."
    )
    judge: Judge = False
    receipt: bool = Field(
        default=False,
        description="Also tell what the text depended on, with proof that every edit acted, as "
        "`interpretability.receipt`. Of one text, so without `n` or several prompts.",
    )
    reproducible: Reproducible = False

    @model_validator(mode="after")
    def _stream_what_is_streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise problem("stream_options: goes with stream")
        if self.receipt and self.n > 1:
            raise problem(f"receipt: is of one text, and n is {self.n}: ask for them one by one")
        if self.reproducible and self.seed is None and self.temperature > 0:
            raise problem("reproducible: needs a seed, or temperature 0")
        if any(not key.isascii() or not key.isdecimal() for key in self.logit_bias or ()):
            raise problem("logit_bias: keys are token ids")
        return self


class ChatCompletionRequest(Completing):
    """Answer a chat."""

    messages: Annotated[Many[ChatTurn], AtMostMessages] = Field(
        min_length=1, description="The chat so far, oldest message first."
    )
    max_tokens: Count | None = Field(default=None, description="Tokens to generate at most.")
    max_completion_tokens: Count | None = Field(
        default=None,
        description=f"The same by its later name. Without both: {DEFAULT_CHAT_TOKENS}, or what MAX_TOKENS leaves.",
    )
    logprobs: bool = Field(default=False, description="Report the log-probability of every token.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] | None = Field(
        default=None, description="With `logprobs`: the likeliest tokens beside it, so many."
    )
    tools: Annotated[Many[dict[str, Any]], AtMost(MAX_TOOLS)] | None = Field(
        default=None,
        description="Tools, written into the prompt by templates that know them. A call is text like any other.",
    )
    tool_choice: Literal["auto", "none"] | None = Field(
        default=None, description="`none` leaves `tools` out; a call cannot be forced."
    )
    reasoning_effort: Name | None = Field(
        default=None, description="Given to the chat template, where it reads this word."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description='What the template is given beside the messages, such as `{"enable_thinking": false}`.',
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Whether the assistant's turn is opened; the opposite of `continue_final_message`."
    )
    continue_final_message: bool = Field(
        default=False, description="The answer goes on with the last message, which is not closed."
    )
    steer_special_tokens: bool = Field(
        default=False, description="Steer the special tokens of the rendered chat too; generated tokens always are."
    )

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "model": "smollm2-135m-instruct",
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 8,
                "temperature": 0,
                "features": [{"source": "15-res-4k", "index": 1113, "strength": 70}],
                "watch": [{"source": "15-res-4k", "index": 1113}],
            }
        )
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise problem("top_logprobs: goes with logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise problem("max_tokens and max_completion_tokens differ: give one of them")
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continue_final_message:
            raise problem("exactly one of add_generation_prompt and continue_final_message has to be true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise problem("continue_final_message: the last message is not the assistant's")
        return self


class CompletionRequest(Completing):
    """Continue a text or several."""

    prompt: Prompts = Field(
        description="A text or its token ids, or a list of either. Texts are read as the model's tokenizer reads them "
        "by itself; ids are taken as they are."
    )
    max_tokens: Annotated[int, Field(ge=0)] = Field(
        default=DEFAULT_TEXT_TOKENS, description="Tokens to generate at most; 0 goes with `echo`."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] | None = Field(
        default=None,
        description="Report log-probabilities, with so many of the likeliest tokens; with `echo` of the prompt too.",
    )
    echo: bool = Field(default=False, description="Begin with the prompt.")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(default=None, description="1: nothing else is served.")

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "model": "smollm2-135m-instruct",
                "prompt": "The most important thing is",
                "max_tokens": 8,
                "temperature": 0,
                "features": [{"source": "15-res-4k", "index": 1113, "strength": 70}],
            }
        )
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not self.max_tokens and not self.echo:
            raise problem("max_tokens: 0 goes with echo")
        if self.echo and self.stream:
            raise problem("echo: does not go with stream")
        return self


class ModelsRequest(Ours):
    """Nothing is asked for."""

    model_config = ConfigDict(json_schema_extra=examples({}))


class ModelRequest(Ours):
    """One of the models that are listed."""

    model: Name = Field(description="Its id, as `/v1/models` lists it.")

    model_config = ConfigDict(json_schema_extra=examples({"model": "smollm2-135m-instruct"}))
