"""What is measured. A case is one piece of work, said in words that every contender understands.

Plain data without torch: the same lines go to processes with different libraries.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

HTTP, IN_PROCESS, FLOOR, PEER = EVERYBODY = ("http", "in_process", "plain", "peer")

D_MODEL = 576
LAYERS = (10, 15, 20)
N_TOKENS = 32
N_RESULTS = 25
N_OTHERS = 4
STREAM_TOKENS = 256

SHORT = "The river bank was closed on Sunday, so we all went to the other one instead."
SENTENCE = "The river bank was closed on Sunday, so we went to the other one."
LONG = " ".join([SENTENCE] * 11)
WORDS = [
    "the",
    "river",
    "bank",
    "was",
    "closed",
    "on",
    "Sunday",
    "so",
    "we",
    "went",
    "to",
    "the",
    "other",
    "one",
    "near",
    "the",
    "old",
    "market",
    "square",
]
# Each with its vector's seed. None ends within 32 tokens, and every token leads its rival by 0.05 in the logits:
# rounding cannot turn the texts.
OPENINGS = (
    ("In the year 1900 the city", 0),
    ("The weather in the mountains", 100),
    ("My favourite recipe begins with", 202),
    ("Once upon a time there was", 300),
    ("The train left the station before", 402),
    ("I think that", 501),
    ("She opened the old box and", 603),
    ("The most important thing about learning is", 701),
)
STRENGTHS = {10: 30.0, 15: 50.0, 20: 80.0}

Kind = Literal["STEERED", "DEFAULT"]


@dataclass(frozen=True)
class Steer:
    """`strength` times `vector` added to the residual stream after `layer`, at every position."""

    layer: int
    vector: tuple[float, ...]
    strength: float


@dataclass(frozen=True)
class Prompt:
    """A text to continue, once for each type."""

    text: str
    steer: Steer
    types: tuple[Kind, ...] = ("STEERED",)


@dataclass(frozen=True)
class OneFeature:
    """Answer: for each text the feature's value at each token but BOS."""

    texts: tuple[str, ...]
    layer: int
    index: int


@dataclass(frozen=True)
class AllFeatures:
    """Answer: `[layer, index, values at each token with 0 at BOS]` of the strongest features, best first."""

    text: str
    layers: tuple[int, ...] = LAYERS
    n_results: int = N_RESULTS


@dataclass(frozen=True)
class FullForward:
    """Answer: the likeliest next token as text. Every layer and the unembedding run."""

    text: str


@dataclass(frozen=True)
class Generate:
    """Answer: for each prompt the continuations of its types. Greedy."""

    prompts: tuple[Prompt, ...]
    n_tokens: int = N_TOKENS


@dataclass(frozen=True)
class FirstToken:
    """Answer: the first token's text, as soon as it is there, while `others` decode."""

    prompt: Prompt
    others: tuple[Prompt, ...] = ()
    n_tokens: int = STREAM_TOKENS


Work = OneFeature | AllFeatures | FullForward | Generate | FirstToken


@dataclass(frozen=True)
class Case:
    """`at_a_time` requests are in flight together; a turn does the work `repeats` times."""

    name: str
    title: str
    floor: str
    """How plain Hugging Face does it."""
    work: Work
    at_a_time: int = 1
    repeats: int = 1
    who: tuple[str, ...] = EVERYBODY

    def line(self) -> dict[str, Any]:
        """The work as JSON for a child process."""
        return {"kind": type(self.work).__name__, "at_a_time": self.at_a_time, **asdict(self.work)}


def direction(seed: int) -> tuple[float, ...]:
    """A random unit vector as wide as the model; the same numbers everywhere."""
    draws = random.Random(seed)
    drawn = [draws.gauss(0, 1) for _ in range(D_MODEL)]
    length = math.sqrt(sum(x * x for x in drawn))
    return tuple(round(x / length, 6) for x in drawn)


def steered_prompts() -> tuple[Prompt, ...]:
    """8 prompts with 8 different vectors at 3 layers."""
    layers = [LAYERS[n % len(LAYERS)] for n in range(len(OPENINGS))]
    return tuple(
        Prompt(text, Steer(layer, direction(seed), STRENGTHS[layer]))
        for (text, seed), layer in zip(OPENINGS, layers, strict=True)
    )


def short_texts() -> tuple[str, ...]:
    """16 different texts of 16 to 19 tokens."""
    return tuple(" ".join([*WORDS[n % 4 :][: 13 + n % 4], str(n % 10)]) for n in range(16))


def long_texts() -> tuple[str, ...]:
    """4 different texts of about 500 tokens."""
    return tuple(" ".join([f"Story {n}:", *[SENTENCE] * 31]) for n in range(1, 5))


FULL = "forward with the unembedding"
CUT = "forward cut at the layer, one encoder column"
ENCODE = "forward cut at the last layer, full encode, top 25"
GENERATE = "`generate` with a hook"
BATCH = "one left-padded batch, hooks add a row per prompt"
RIGHT = "one right-padded batch, forward cut at the layer"


def cases() -> Iterator[Case]:
    yield from _captures()
    yield from _generations()
    yield from _crowds()
    yield from _streams()


def _captures() -> Iterator[Case]:
    yield Case("full_forward", "Full forward, 19 tokens", FULL, FullForward(SHORT), repeats=5, who=(FLOOR,))
    yield Case("feature_10", "One feature at layer 10, 19 tokens", CUT, OneFeature((SHORT,), 10, 3432), repeats=5)
    yield Case("feature_15", "One feature at layer 15, 19 tokens", CUT, OneFeature((SHORT,), 15, 1346), repeats=5)
    yield Case("feature_long", "One feature at layer 15, 177 tokens", CUT, OneFeature((LONG,), 15, 1959), repeats=2)
    yield Case("all_features", "All features of 3 SAEs, 177 tokens", ENCODE, AllFeatures(LONG), repeats=2)


def _generations() -> Iterator[Case]:
    steered = steered_prompts()[0]
    both = replace(steered, types=("STEERED", "DEFAULT"))
    yield Case("steered", "32 tokens, STEERED", GENERATE, Generate((steered,)))
    yield Case("steered_default", "32 tokens, STEERED and DEFAULT", f"{GENERATE}, batch of 2", Generate((both,)))


def _crowds() -> Iterator[Case]:
    """The same work one after another and together."""
    eight, sixteen, four = Generate(steered_prompts()), OneFeature(short_texts(), 15, 616), long_texts()
    long = OneFeature(four, 15, 1959)
    yield Case("steers_serial", "8 steers of 32 tokens, one by one", GENERATE, eight)
    yield Case("steers_together", "8 steers of 32 tokens, at once", BATCH, eight, at_a_time=8)
    yield Case("features_serial", "16 × one feature, 16–19 tokens, one by one", CUT, sixteen)
    yield Case("features_together", "16 × one feature, 16–19 tokens, 8 at a time", RIGHT, sixteen, at_a_time=8)
    yield Case("long_serial", "4 × one feature, 500 tokens, one by one", CUT, long)
    yield Case("long_together", "4 × one feature, 500 tokens, at once", RIGHT, long, at_a_time=4)


def _streams() -> Iterator[Case]:
    first, *others = steered_prompts()
    idle, busy = FirstToken(first), FirstToken(first, tuple(others[:N_OTHERS]))
    who = (HTTP, FLOOR, PEER)
    yield Case("first_idle", "First event of a stream, idle", "prefill with a hook", idle, repeats=3, who=who)
    yield Case("first_busy", "First event of a stream, 4 others decoding", "–", busy, repeats=3, who=who)
