"""A case as requests to this project, and its answers as the numbers and texts that are compared."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

MODEL = "smollm2-135m-instruct"
SOURCE_SET = "res-4k"
ROUTES = {
    "activation_single": "/v1/activation/single",
    "activation_all": "/v1/activation/all",
    "steer_completion": "/v1/steer/completion",
}

Body = dict[str, Any]
Ask = Callable[[str, Body], Awaitable[Any]]
"""Operation and body to answer."""


def requests_of(line: dict[str, Any]) -> tuple[str, list[Body]]:
    """Operation and bodies of a case's line."""
    match line["kind"]:
        case "OneFeature":
            return "activation_single", [_one_feature(text, line["layer"], line["index"]) for text in line["texts"]]
        case "AllFeatures":
            return "activation_all", [_all_features(line)]
        case "Generate":
            return "steer_completion", [steer_body(prompt, line["n_tokens"]) for prompt in line["prompts"]]
    raise AssertionError(line["kind"])


def _one_feature(text: str, layer: int, index: int) -> Body:
    return {"model": MODEL, "prompt": text, "source": f"{layer}-{SOURCE_SET}", "index": str(index)}


def _all_features(line: dict[str, Any]) -> Body:
    return {
        "model": MODEL,
        "prompt": line["text"],
        "source_set": SOURCE_SET,
        "selected_sources": [f"{layer}-{SOURCE_SET}" for layer in line["layers"]],
        "sort_by_token_indexes": [],
        "ignore_bos": True,
        "num_results": line["n_results"],
    }


def steer_body(prompt: dict[str, Any], n_tokens: int) -> Body:
    steer = prompt["steer"]
    vector = {
        "hook": f"blocks.{steer['layer']}.hook_resid_post",
        "steering_vector": list(steer["vector"]),
        "strength": steer["strength"],
    }
    return {
        "model": MODEL,
        "prompt": prompt["text"],
        "vectors": [vector],
        "types": list(prompt["types"]),
        "steer_method": "SIMPLE_ADDITIVE",
        "normalize_steering": False,
        "n_completion_tokens": n_tokens,
        "temperature": 0,
        "strength_multiplier": 1,
        "freq_penalty": 0,
        "seed": 1,
    }


def read(operation: str, answers: Sequence[Any]) -> list[Any]:
    """What the other contenders answer for the same work."""
    match operation:
        case "activation_single":
            return [one["activation"]["values"] for one in answers]
        case "activation_all":
            (only,) = answers
            return [[_layer(one["source"]), one["index"], one["values"]] for one in only["activations"]]
        case "steer_completion":
            return [texts_of(one) for one in answers]
    raise AssertionError(operation)


def texts_of(answer: Any) -> list[str]:
    return [output["output"] for output in answer["outputs"]]


def _layer(source: str) -> int:
    return int(source.partition("-")[0])


async def ask_all(ask: Ask, operation: str, bodies: Sequence[Body], at_a_time: int) -> list[Any]:
    """Every answer, with at most `at_a_time` requests in flight."""
    places = asyncio.Semaphore(at_a_time)

    async def one(body: Body) -> Any:
        async with places:
            return await ask(operation, body)

    return await asyncio.gather(*map(one, bodies))
