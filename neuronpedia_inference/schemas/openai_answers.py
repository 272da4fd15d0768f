"""Answers of OpenAI's routes, with what was watched beside its fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from neuronpedia_inference.schemas.common import IF_ANY, Reply
from neuronpedia_inference.schemas.judge import SteerJudge
from neuronpedia_inference.schemas.receipt import Receipt
from neuronpedia_inference.schemas.watch import SteerEvent, SteerStop, SteerWatched


class Usage(Reply):
    """Tokens."""

    prompt_tokens: int = Field(description="Of the prompts, each counted once.")
    completion_tokens: int = Field(description="Of all answers, those that ended them included.")
    total_tokens: int = Field(description="Both together.")


class Candidate(Reply):
    """A token that could have been chosen."""

    token: str = Field(description="The token as text.")
    logprob: float = Field(description="Natural logarithm of its probability; -100 stands for none.")
    bytes: list[int] | None = Field(description="The text in UTF-8; null for a piece of a character.")


class TokenLogprobs(Candidate):
    """A generated token. Probabilities are the steered model's own: no temperature, no penalty, no bias."""

    top_logprobs: list[Candidate] = Field(description="The likeliest tokens, most likely first.")


class ChatLogprobs(Reply):
    """Log-probabilities of an answer."""

    content: list[TokenLogprobs] = Field(description="One entry per token that is told.")
    refusal: None = Field(default=None, description="Always null.")


class TextLogprobs(Reply):
    """Log-probabilities of a text, in lists that go together."""

    tokens: list[str] = Field(description="The tokens as text.")
    token_logprobs: list[float | None] = Field(
        description="Of each; null for a prompt's first, which nothing precedes."
    )
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="The likeliest tokens there, and the token itself; null with `logprobs` 0."
    )
    text_offset: list[int] = Field(description="Where each begins, in characters.")


class Interpretability(Reply):
    """What is told beside OpenAI's fields."""

    watch: Annotated[SteerWatched | None, IF_ANY] = Field(
        default=None, description="What `watch` has read; in an event what it has read since the one before."
    )
    stopped_by: Annotated[SteerStop | None, IF_ANY] = Field(default=None, description="The rule that ended the answer.")
    judge: Annotated[SteerJudge | None, IF_ANY] = Field(
        default=None, description="How well it holds; of a stream in an event of its own, once all have ended."
    )
    events: Annotated[list[SteerEvent] | None, IF_ANY] = Field(
        default=None, description="What rules took back so far, in order; absent where no rule retries."
    )


class Accounted(Reply):
    """What is told of all that was written."""

    receipt: Receipt = Field(description="What the text depended on, with proof that every edit acted.")


Account = Annotated[Accounted | None, IF_ANY]
ACCOUNT = Field(default=None, description="The receipt, if asked for; of a stream in an event without choices.")
FinishReason = Literal["stop", "length"]
WHY = "`stop` at the end of a turn, at a stop string or by a rule, `length` at the most tokens; null while it goes on."
Interpreted = Annotated[Interpretability | None, IF_ANY]


class AnswerMessage(Reply):
    """The answer of the assistant. No special tokens are in it."""

    role: Literal["assistant"] = Field(description="Always `assistant`.")
    content: str = Field(description="What is said.")
    reasoning_content: Annotated[str | None, IF_ANY] = Field(
        default=None, description="What was thought before, of models that mark it."
    )
    refusal: None = Field(default=None, description="Always null.")


class ChatChoice(Reply):
    """One answer."""

    index: int = Field(description="Its place.")
    message: AnswerMessage = Field(description="The answer.")
    logprobs: ChatLogprobs | None = Field(description="Null unless asked for.")
    finish_reason: FinishReason | None = Field(description=WHY)
    interpretability: Interpreted = Field(default=None, description="What was asked for beside it.")


class ChatCompletionResponse(Reply):
    """The answers to a chat."""

    id: str = Field(description="Names the answer.")
    object: Literal["chat.completion"] = Field(description="Always `chat.completion`.")
    created: int = Field(description="When, in seconds since 1970.")
    model: str = Field(description="The model, with its variant.")
    choices: list[ChatChoice] = Field(description="The answers.")
    usage: Usage = Field(description="Tokens.")
    interpretability: Account = ACCOUNT


class Delta(Reply):
    """What is new in an answer."""

    role: Annotated[Literal["assistant"] | None, IF_ANY] = Field(default=None, description="In the first event.")
    content: Annotated[str | None, IF_ANY] = Field(default=None, description="More of what is said.")
    reasoning_content: Annotated[str | None, IF_ANY] = Field(default=None, description="More of what is thought.")


class ChatChunkChoice(Reply):
    """What is new in one answer."""

    index: int = Field(description="Its place.")
    delta: Delta = Field(description="What is new.")
    logprobs: ChatLogprobs | None = Field(description="Of the tokens that are new; null unless asked for.")
    finish_reason: FinishReason | None = Field(description=WHY)
    interpretability: Interpreted = Field(default=None, description="What was asked for beside it.")


class ChatCompletionChunk(Reply):
    """One event of a stream."""

    id: str = Field(description="Names the answer; the same in all events.")
    object: Literal["chat.completion.chunk"] = Field(description="Always `chat.completion.chunk`.")
    created: int = Field(description="When, in seconds since 1970.")
    model: str = Field(description="The model, with its variant.")
    choices: list[ChatChunkChoice] = Field(description="One; none in the event that counts the tokens.")
    usage: Annotated[Usage | None, IF_ANY] = Field(default=None, description="Tokens, in the last event if asked for.")
    interpretability: Account = ACCOUNT


class TextChoice(Reply):
    """One text, or in an event what is new in it."""

    index: int = Field(description="Its place: prompt by prompt.")
    text: str = Field(description="What was written, behind the prompt if `echo`. No special tokens are in it.")
    logprobs: TextLogprobs | None = Field(description="Null unless asked for.")
    finish_reason: FinishReason | None = Field(description=WHY)
    interpretability: Interpreted = Field(default=None, description="What was asked for beside it.")


class CompletionResponse(Reply):
    """The texts, or one event of their stream."""

    id: str = Field(description="Names the answer; the same in all events.")
    object: Literal["text_completion"] = Field(description="Always `text_completion`.")
    created: int = Field(description="When, in seconds since 1970.")
    model: str = Field(description="The model, with its variant.")
    choices: list[TextChoice] = Field(description="The texts; none in the event that counts the tokens.")
    usage: Annotated[Usage | None, IF_ANY] = Field(
        default=None, description="Tokens; of a stream in its last event, if asked for."
    )
    interpretability: Account = ACCOUNT


class ModelReply(Reply):
    """A model that can be asked for by its id."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field(description="Always `model`.")
    created: int = Field(description="When it was loaded, in seconds since 1970.")
    owned_by: str = Field(description="Where the weights came from.")
    steering: Annotated[dict[str, Any] | None, IF_ANY] = Field(
        default=None, description="Of a variant: what it steers with, as its file says."
    )


class ModelsReply(Reply):
    """The served model, then its variants."""

    object: Literal["list"] = Field(description="Always `list`.")
    data: list[ModelReply] = Field(description="The models.")


class OpenAIErrorInside(Reply):
    """What went wrong."""

    message: str = Field(description="For people.")
    type: str = Field(description="Of which kind, in OpenAI's words.")
    param: str | None = Field(description="The field, where it is one.")
    code: str = Field(description="For programs; docs/errors.md explains them.")


class OpenAIError(Reply):
    """The body of every answer of OpenAI's routes that is not a success."""

    error: OpenAIErrorInside = Field(description="What went wrong.")
