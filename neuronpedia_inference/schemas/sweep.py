"""The same prompts at many strengths: texts, how well they hold, and the strength that is best of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from neuronpedia_inference.schemas.common import (
    AtMost,
    Many,
    MaybeModelName,
    Ours,
    Reply,
    Reproducible,
    Seed,
    SourceName,
    examples,
)
from neuronpedia_inference.schemas.edits import MAX_EDITS, SteerEdit
from neuronpedia_inference.schemas.judge import SteerJudge
from neuronpedia_inference.schemas.receipt import SweepReceipt
from neuronpedia_inference.schemas.steer import (
    AtMostMessages,
    NewTokens,
    NPSteerChatMessage,
    SteerSpecialTokens,
    Stream,
    Temperature,
)
from neuronpedia_inference.schemas.steering import Steering, Strength
from neuronpedia_inference.schemas.watch import AskedWatch, SteerWatched
from neuronpedia_inference.watches.plan import MAX_WATCHES

MAX_PROMPTS, MAX_STRENGTHS, MAX_SEEDS = 16, 64, 64


class SweptFeature(Ours):
    """A feature that is added at every strength."""

    source: SourceName | None = Field(
        default=None, description="Source of the feature; may be left out when only one is loaded."
    )
    index: int = Field(description="Index of the feature in its source.")


class SweepRequest(Ours):
    """Steer the same prompts at many strengths, every feature (or edit, or steering) by itself, and judge the texts.

    Give exactly one of `features`, `edits` and `steerings`. Every combination of prompt, one of these, strength and
    seed is a cell; each prompt is also continued unsteered for every seed. With `stream` the first event says what it
    takes, then comes one with every cell, and the last has what is suggested; each has only what is new.
    """

    prompt: str | Annotated[Many[str], AtMostMessages] | Annotated[Many[NPSteerChatMessage], AtMostMessages] = Field(
        description="A text, 1 to 16 texts, or the messages of a chat."
    )
    features: Annotated[Many[SweptFeature], AtMost(MAX_EDITS)] | None = Field(
        default=None, description="Features, each added by itself, as often as each strength says."
    )
    edits: Annotated[Many[SteerEdit], AtMost(MAX_EDITS)] | None = Field(
        default=None, description="Edits, each by itself; its amount is multiplied by every strength."
    )
    steerings: Annotated[Many[Steering], AtMost(MAX_EDITS)] | None = Field(
        default=None,
        description="Steerings, each as a whole; all its strengths and amounts are multiplied by every strength.",
    )
    strengths: Annotated[Many[Strength], AtMost(MAX_STRENGTHS)] = Field(description="1 to 64 of them.")
    seeds: Annotated[Many[Seed], AtMost(MAX_SEEDS)] = Field(
        default=[16], description="1 to 64; without a temperature all give the same."
    )
    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.0
    watch: Annotated[Many[AskedWatch], AtMost(MAX_WATCHES)] | None = Field(
        default=None,
        description='What to read at every token of prompt and text, in every cell; "edits" for what every edit finds '
        "and does.",
    )
    judge: bool = Field(default=True, description="Judge every text, as `steer` does; without, nothing is suggested.")
    receipt: bool = Field(
        default=False,
        description="Also answer what the texts depended on, with proof that every edit acted: `receipt`, with the "
        "last event of a stream. It costs what `watch` does.",
    )
    steer_special_tokens: SteerSpecialTokens = False
    dry_run: bool = Field(default=False, description="Only say what it would take, and check everything.")
    stream: Stream = False
    reproducible: Reproducible = False
    model: MaybeModelName = None

    model_config = ConfigDict(
        json_schema_extra=examples(
            {
                "prompt": "The most important thing is",
                "features": [{"source": "15-res-4k", "index": 1113}],
                "strengths": [30, 50, 70],
                "max_new_tokens": 16,
            },
            {
                "prompt": ["I think that", "Yesterday I"],
                "edits": [{"do": "clamp", "feature": "15-res-4k/1113", "amount": 1, "on": {"phase": "generated"}}],
                "strengths": [40, 80],
                "max_new_tokens": 8,
            },
        )
    )


class SweepTakes(Reply):
    """What a sweep takes."""

    n_cells: int = Field(description="Steered texts.")
    n_plain: int = Field(description="Unsteered texts beside them.")
    n_rows_at_once: int = Field(description="Texts that are written together.")
    n_generations: int = Field(description="How often so many of them are.")
    n_prompt_tokens: int = Field(
        description="Tokens of prompts that are run at the most: of texts that are written together, those whose edits "
        "leave the prompt alone, or do the same to it, have it run once."
    )
    n_new_tokens: int = Field(description="Tokens that are written at the most, over all texts.")
    n_watched: int = Field(description="Numbers that are watched at the most, over all texts.")


class SweepCell(Reply):
    """One text."""

    prompt: int = Field(description="Place of its prompt in the list.")
    steering: int | None = Field(
        description="Place of what steers it in `features`, `edits` or `steerings`; null for an unsteered text."
    )
    strength: float | None = Field(description="Its strength; null for an unsteered text.")
    seed: int = Field(description="Its seed.")
    text: str = Field(description="The generated text, without the prompt and without the token that ended it.")
    tokens: list[str] = Field(description="Its tokens, the one that ended it included.")
    finish_reason: Literal["stop", "length"] = Field(description="Why it ended, as in `steer`.")
    judge: SteerJudge | None = Field(default=None, description="How well it holds; null unless asked for.")
    effects: list[float] | None = Field(
        default=None,
        description="Of the features that steer it, the mean activation over its tokens but the last, as the unsteered "
        "model has them: how much of them is in the text itself. Of an unsteered text, of all features of the sweep.",
    )
    watch: SteerWatched | None = Field(default=None, description="What `watch` has read; null unless asked for.")


class SweepMean(Reply):
    """All texts of one steering at one strength."""

    steering: int = Field(description="Place of the steering.")
    strength: float = Field(description="The strength.")
    lost: float | None = Field(
        description="By how many nats per token its texts are less likely than the unsteered ones of the same prompts "
        "and seeds; null where there is no text."
    )
    repeated: float = Field(
        description="By how much more of their runs of three tokens repeat, in the mean; one that repeats less than "
        "its unsteered text makes up for no other."
    )
    effect: float = Field(
        description="Mean over its features of how far their activation in the texts is from that in the unsteered "
        "texts of the same prompts and seeds; of a steering without features the size of the strength."
    )
    holds: bool = Field(description="Whether its texts are within both limits.")


class SweepSuggestion(Reply):
    """Of every steering the strength with the largest effect among those whose texts hold, of equal ones the weakest.

    They hold where `lost` is at most `most_lost` and `repeated` at most `most_repeated`.
    """

    strengths: list[float | None] = Field(description="By steering; null where none holds, or none has an effect.")
    means: list[SweepMean] = Field(description="Every steering at every strength.")
    most_lost: float = Field(description="In nats per token.")
    most_repeated: float = Field(description="As a share.")


class SweepResponse(Reply):
    """Cells in the order of prompts, steerings, strengths and seeds."""

    takes: SweepTakes | None = Field(default=None, description="What it takes.")
    cells: list[SweepCell] = Field(default=[], description="The steered texts.")
    default: list[SweepCell] = Field(default=[], description="The unsteered texts, for every prompt and seed.")
    suggested: SweepSuggestion | None = Field(default=None, description="Null without `judge`.")
    receipt: SweepReceipt | None = Field(
        default=None, description="What the texts depended on; null unless asked for, and before all have ended."
    )
