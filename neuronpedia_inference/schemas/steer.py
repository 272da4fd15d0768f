"""Steering routes: text and chat completions, with and without the steering."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    ALSO_SNAKE,
    AtMost,
    EchoedText,
    Many,
    MaybeModelName,
    ModelName,
    Name,
    OnePrompt,
    Ours,
    Reply,
    Reproducible,
    Seed,
    SourceName,
    Wire,
    examples,
)
from neuronpedia_inference.schemas.judge import Judge, SteerJudge
from neuronpedia_inference.schemas.persona import AssistantAxis
from neuronpedia_inference.schemas.receipt import Receipt
from neuronpedia_inference.schemas.steering import AtMostSteers, Method, Steering, Strength, StrengthMultiplier
from neuronpedia_inference.schemas.vectors import Vector
from neuronpedia_inference.schemas.watch import (
    AskedWatch,
    NPLogprobTop,
    SteerEvent,
    SteerOverDose,
    SteerRule,
    SteerStop,
    SteerWatched,
)
from neuronpedia_inference.watches.plan import MAX_WATCHES
from neuronpedia_inference.watches.rules import MAX_RULES

MAX_MESSAGES = 1024
"""Messages of a chat."""
AtMostMessages = AtMost(MAX_MESSAGES)

NPSteerType = Literal["STEERED", "DEFAULT"]

Temperature = Annotated[
    float, Field(ge=0, le=100, description="0 takes the likeliest token; higher values draw more freely.")
]
NewTokens = Annotated[int, Field(ge=1, description="Tokens to generate at most.")]
FreqPenalty = Annotated[
    float,
    Field(
        ge=-100,
        le=100,
        description="Subtracted from a token's logit for each earlier occurrence, after the temperature; "
        "no effect at temperature 0.",
    ),
]
NLogprobs = Annotated[
    Annotated[int, Field(ge=0, le=10)] | None,
    Field(description="Candidates reported per generated token; 0 or null reports no log-probabilities."),
]
Stream = Annotated[
    bool | None,
    Field(description="Answer with server-sent events, each the whole response so far."),
]
SteerSpecialTokens = Annotated[
    bool,
    Field(description="Steer the special tokens of the rendered chat too; generated tokens always are."),
]

_COMPLETION = {
    "model": "smollm2-135m-instruct",
    "steer_method": "SIMPLE_ADDITIVE",
    "normalize_steering": False,
    "types": ["STEERED", "DEFAULT"],
    "features": [{"model": "smollm2-135m-instruct", "source": "15-res-4k", "index": 42, "strength": 60}],
    "n_completion_tokens": 16,
    "temperature": 0,
    "strength_multiplier": 1,
    "freq_penalty": 0,
    "seed": 16,
}


class NPSteerFeature(Wire):
    """Steer along the unit-length decoder row of a feature, where its SAE reads."""

    model: ModelName
    source: SourceName
    index: int = Field(description="Index of the feature in its source.")
    strength: Strength
    steering_vector: Vector | None = Field(default=None, description="Ignored: the server takes the decoder row.")


class NPSteerVector(Wire):
    """Steer along a vector of your own."""

    steering_vector: Vector = Field(description="The direction, as wide as the hook.")
    strength: Strength
    hook: Name = Field(description='Where to steer, such as "blocks.15.hook_resid_post".')


class NPSteerChatMessage(Wire):
    """One message of a chat."""

    role: Name = Field(description="Who speaks: a role that the model's chat template knows, such as `user`.")
    content: EchoedText = Field(description="What is said.")


class SteerFields(Wire):
    """What both completions share. Give `features` or `vectors`; an empty list steers nothing."""

    model: ModelName
    steer_method: Method
    normalize_steering: bool = Field(description="Scale every direction to unit length first.")
    types: Annotated[Many[NPSteerType], AtMost(len(get_args(NPSteerType)))] = Field(
        min_length=1,
        description="Outputs wanted, each at most once: STEERED, or DEFAULT for the same without steering.",
    )
    features: Annotated[Many[NPSteerFeature], AtMostSteers] | None = Field(
        default=None, description="Features to steer with, in order."
    )
    vectors: Annotated[Many[NPSteerVector], AtMostSteers] | None = Field(
        default=None, description="Vectors to steer with, in order."
    )
    n_completion_tokens: NewTokens
    temperature: Temperature
    strength_multiplier: StrengthMultiplier
    freq_penalty: FreqPenalty
    seed: Seed = Field(description="Starts the random draws of each output; fractions are cut off.")
    stream: Stream = False
    n_logprobs: NLogprobs = 0


class SteerCompletionRequest(SteerFields, OnePrompt):
    """Continue a text, steered."""

    model_config = ConfigDict(json_schema_extra=examples({"prompt": "I think that", **_COMPLETION}))


class SteerCompletionChatRequest(SteerFields):
    """Answer a chat, steered."""

    prompt: Annotated[Many[NPSteerChatMessage], AtMostMessages] = Field(
        description="The chat so far, oldest message first."
    )
    steer_special_tokens: SteerSpecialTokens
    is_assistant_axis: bool | None = Field(
        default=False,
        description="Also tell where the assistant's messages lie on the persona axes, in `assistant_axis` of the last "
        "event; nothing is told where none are served. Axes that were fitted so have the content of a leading system "
        "message left out of the chat, and `chat_template` shows it without.",
    )

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "prompt": [{"role": "user", "content": "What is the capital of France?"}],
                **_COMPLETION,
                "steer_special_tokens": False,
            }
        )
    )


class NPLogprob(Reply):
    """A generated token and its rivals. Probabilities are the model's own: no temperature, no penalty."""

    token: str = Field(description="The token as text.")
    logprob: float = Field(description="Natural logarithm of its probability; -100 stands for none.")
    # The web application reads this one key in snake_case.
    top_logprobs: Annotated[list[NPLogprobTop], ALSO_SNAKE] = Field(
        description="The likeliest tokens, most likely first."
    )


Logprobs = Annotated[
    list[NPLogprob] | None,
    Field(description="One entry per generated token; absent unless `n_logprobs` asks for candidates."),
]


class NPSteerCompletionOutput(Reply):
    """One continuation."""

    type: NPSteerType = Field(description="Steered or not.")
    output: str = Field(description="The generated text, without the prompt.")
    logprobs: Logprobs = None


class SteerCompletionResponse(Reply):
    """One output per requested type, in request order."""

    outputs: list[NPSteerCompletionOutput] = Field(description="The continuations.")


class NPSteerChatResult(Reply):
    """A chat, as the model's text and as messages."""

    raw: str = Field(description="The rendered chat with special tokens; in an output, with the answer.")
    chat_template: list[NPSteerChatMessage] = Field(
        description="The messages; in an output, the answer included once it has content."
    )
    type: NPSteerType | None = Field(default=None, description="Steered or not; absent in `input`.")
    logprobs: Logprobs = None


class SteerCompletionChatResponse(Reply):
    """One output per requested type, in request order."""

    outputs: list[NPSteerChatResult] = Field(description="The chats with their answers.")
    input: NPSteerChatResult = Field(description="The chat before the answer.")
    assistant_axis: list[AssistantAxis] | None = Field(
        default=None, description="One entry per output, where `is_assistant_axis` asks for it and axes are served."
    )


class TextOrChat(Ours):
    """What is gone on from."""

    prompt: str | Annotated[Many[NPSteerChatMessage], AtMostMessages] = Field(
        description="A text, which may not be empty, or the messages of a chat."
    )


class SteerRequest(Steering, TextOrChat):
    """Continue a text or answer a chat, steered, and by default unsteered next to it.

    `features`, `vectors` and `edits` act in this order; without any of them the model is as it is.
    """

    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.0
    freq_penalty: FreqPenalty = 0.0
    seed: Seed = Field(default=16, description="Starts the random draws; fractions are cut off.")
    n_logprobs: NLogprobs = 0
    watch: Annotated[Many[AskedWatch], AtMost(MAX_WATCHES)] | None = Field(
        default=None,
        description='What to read at every token of prompt and text, in both texts; "edits" for what every edit finds '
        "and does.",
    )
    rules: Annotated[Many[SteerRule], AtMost(MAX_RULES)] | None = Field(
        default=None,
        description="When to end early or to write the newest tokens anew, in both texts. A token is sent once the "
        "rules have seen it, and none takes it back any more.",
    )
    compare: bool = Field(default=True, description="Also generate the same without steering.")
    steer_special_tokens: Annotated[
        bool, Field(description="Of a chat: steer its special tokens too; generated tokens always are.")
    ] = False
    stream: Stream = False
    deltas: bool = Field(
        default=False,
        description="With `stream`: each event holds only what is new since the one before; a chat's `messages` come "
        "with the last.",
    )
    judge: Judge = False
    receipt: bool = Field(
        default=False,
        description="Also answer what the texts depended on, with proof that every edit acted: `receipt`, with the "
        "last event of a stream. It costs what `watch` does.",
    )
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "prompt": "I think that",
                "features": [{"source": "15-res-4k", "index": 42, "strength": 60}],
                "max_new_tokens": 16,
                "watch": [{"source": "15-res-4k", "index": 42}, {"source": "15-res-4k", "top_k": 3}],
            },
            {
                "prompt": [{"role": "user", "content": "What is the capital of France?"}],
                "vectors": [{"hook": "blocks.15.hook_resid_post", "vector": [0.1] * 576, "strength": 10}],
                "max_new_tokens": 16,
            },
            {
                "prompt": "The most important thing is",
                "edits": [
                    {"do": "clamp", "feature": "15-res-4k/1113", "amount": 60, "on": {"phase": "generated"}},
                    {"do": "ablate", "feature": {"source": "20-res-4k", "index": 686}},
                ],
                "max_new_tokens": 16,
                "receipt": True,
                "reproducible": True,
            },
        )
    )


class SteerText(Reply):
    """One generated text."""

    text: str = Field(description="The generated text, without the prompt and without the token that ended it.")
    messages: list[NPSteerChatMessage] | None = Field(
        default=None, description="For a chat: its messages with the answer; null for a text."
    )
    tokens: list[str] = Field(default=[], description="Its tokens, the one that ended it included.")
    logprobs: Annotated[list[NPLogprob] | None, Field(description="Null unless asked for.")] = None
    watch: SteerWatched | None = Field(default=None, description="What `watch` has read; null unless asked for.")
    judge: SteerJudge | None = Field(default=None, description="How well it holds; null unless asked for.")
    stopped_by: SteerStop | None = Field(default=None, description="With `finish_reason` `stop_rule`: by which rule.")
    events: list[SteerEvent] | None = Field(
        default=None, description="What rules took back, in order; null where no rule retries."
    )
    over_dose: list[SteerOverDose] | None = Field(
        default=None,
        description="With `max_dose` that warns: edits that wrote more so far, with their largest dose; else null.",
    )
    finish_reason: Literal["stop", "length", "stop_rule", "retry_exhausted"] | None = Field(
        default=None,
        description="Why it ended: `stop` at the model's end-of-sequence token, `length` at `max_new_tokens`, "
        "`stop_rule` at a rule, `retry_exhausted` before tokens that a rule refused once more than its `times`. "
        "Null while it goes on.",
    )


class SteerResponse(Reply):
    """The steered text and the unsteered one."""

    steered: SteerText = Field(description="With the steering.")
    default: SteerText | None = Field(description="Without; null when `compare` is false.")
    receipt: Receipt | None = Field(
        default=None, description="What they depended on; null unless asked for, and before the texts have ended."
    )
