"""What the clients of the soak ask: every kind of work, long and short, and now and then something that is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import D_MODEL, OPENINGS, SENTENCE, STRENGTHS, direction
from benchmarks.wire import MODEL, SOURCE_SET

SOURCES = tuple(f"{layer}-{SOURCE_SET}" for layer in STRENGTHS)
N_FEATURES = 4096
WORDS = SENTENCE.split()
PLACES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
METHODS = ("SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP")
TYPES = (("STEERED",), ("DEFAULT",), ("STEERED", "DEFAULT"), ("DEFAULT", "STEERED"))
DIRECTIONS = [direction(seed) for seed in range(8)]
MOST_WORDS, MOST_BATCH_WORDS, MOST_NEW_TOKENS = 60, 24, 24
"""Within the server's default limits; a batch may have a quarter of the tokens for each prompt."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request, and whether it can be answered."""

    operation: str
    body: Body
    is_good: bool = True


def draw(rng: random.Random) -> Ask:
    """The next request of a client."""
    make = rng.choices([make for make, _ in MIX], [weight for _, weight in MIX])[0]
    return make(rng)


# Texts


def _text(rng: random.Random, most_words: int = MOST_WORDS) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most_words)))


def _prompt(rng: random.Random, operation: str) -> Body:
    """One prompt, or for a batch several."""
    if operation.endswith("_batch"):
        return {"prompts": [_text(rng, MOST_BATCH_WORDS) for _ in range(rng.randint(1, 4))]}
    return {"prompt": _text(rng)}


def _index(rng: random.Random) -> int:
    return rng.randrange(N_FEATURES)


# Activations


def _one_feature(rng: random.Random) -> Ask:
    operation = rng.choice(("activation_single", "activation_single_batch"))
    feature = {"source": rng.choice(SOURCES), "index": str(_index(rng))}
    vector = {"hook": _hook(rng), "vector": rng.choice(DIRECTIONS)}
    return Ask(operation, {"model": MODEL, **_prompt(rng, operation), **rng.choice((feature, vector))})


def _all_features(rng: random.Random) -> Ask:
    operation = rng.choice(("activation_all", "activation_all_batch"))
    chosen = {
        "source_set": SOURCE_SET,
        "selected_sources": rng.sample(SOURCES, rng.randint(0, len(SOURCES))),
        "sort_by_token_indexes": rng.choice(([], [0])),
        "ignore_bos": rng.random() < 0.5,
        "num_results": rng.randint(1, 25),
    }
    return Ask(operation, {"model": MODEL, **_prompt(rng, operation), **chosen})


def _top_k(rng: random.Random) -> Ask:
    operation = rng.choice(("activation_topk_by_token", "activation_topk_by_token_batch"))
    chosen = {"source": rng.choice(SOURCES), "top_k": rng.randint(1, 10), "ignore_bos": rng.random() < 0.5}
    return Ask(operation, {"model": MODEL, **_prompt(rng, operation), **chosen})


# Steering


def _steer(rng: random.Random) -> Ask:
    prompt = f"{rng.choice(OPENINGS)[0]} {_text(rng)}"
    return Ask("steer_completion", {"prompt": prompt, **_steering(rng)})


def _chat(rng: random.Random) -> Ask:
    messages = [{"role": "user", "content": _text(rng)}]
    if rng.random() < 0.3:
        messages += [{"role": "assistant", "content": _text(rng, 10)}, {"role": "user", "content": _text(rng, 10)}]
    special = {"steer_special_tokens": rng.random() < 0.5}
    return Ask("steer_completion_chat", {"prompt": messages, **special, **_steering(rng)})


def _steering(rng: random.Random) -> Body:
    return {
        "model": MODEL,
        "types": rng.choice(TYPES),
        **rng.choice((_by_feature, _by_vector))(rng),
        "steer_method": rng.choice(METHODS),
        "normalize_steering": rng.random() < 0.5,
        "n_completion_tokens": rng.randint(1, MOST_NEW_TOKENS),
        "temperature": rng.choice((0, 0.7, 1.3)),
        "strength_multiplier": 1,
        "freq_penalty": rng.choice((0, 0.5)),
        "seed": rng.randrange(1000),
        "n_logprobs": rng.choice((0, 0, 3)),
        "stream": rng.random() < 0.5,
    }


def _by_feature(rng: random.Random) -> Body:
    chosen = rng.choices(SOURCES, k=rng.randint(1, 2))
    return {
        "features": [
            {"model": MODEL, "source": source, "index": _index(rng), "strength": rng.uniform(-60, 60)}
            for source in chosen
        ]
    }


def _by_vector(rng: random.Random) -> Body:
    return {
        "vectors": [
            {"hook": _hook(rng), "steering_vector": rng.choice(DIRECTIONS), "strength": rng.uniform(-60, 60)}
            for _ in range(rng.randint(1, 3))
        ]
    }


def _hook(rng: random.Random) -> str:
    return f"blocks.{rng.randrange(30)}.{rng.choice(PLACES)}"


# The rest


def _tokenize(rng: random.Random) -> Ask:
    return Ask("tokenize", {"model": MODEL, "text": _text(rng), "prepend_bos": rng.random() < 0.5})


def _wrong(rng: random.Random) -> Ask:
    """Refused with a 400 or a 422."""
    source = {"model": MODEL, "source": SOURCES[0], "index": "7"}
    steered = {**_steer(rng).body, "types": ["STEERED"]}
    too_wide = {"hook": "blocks.3.hook_resid_post", "steering_vector": [1.0] * (D_MODEL + 1), "strength": 1}
    return rng.choice(
        (
            Ask("activation_single", {**source, "prompt": _text(rng), "source": "99-nothing"}, is_good=False),
            Ask("activation_single", {**source, "prompt": SENTENCE * 40}, is_good=False),
            Ask("activation_single_batch", {**source, "prompts": []}, is_good=False),
            Ask("activation_topk_by_token", {"prompt": _text(rng)}, is_good=False),
            Ask("steer_completion", {**steered, "types": []}, is_good=False),
            Ask("steer_completion", {**steered, "features": None, "vectors": [too_wide]}, is_good=False),
        )
    )


MIX: tuple[tuple[Callable[[random.Random], Ask], int], ...] = (
    (_one_feature, 25),
    (_all_features, 15),
    (_top_k, 10),
    (_steer, 25),
    (_chat, 10),
    (_tokenize, 5),
    (_wrong, 10),
)
