"""What the class and the jobs in `inference_cls.py` share: parameters to settings, bodies, downloads. No modal here."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.tensor_files import answer_in, read_tensors

Say = Callable[[str], None]

PARAMETERS = (
    "model_id",
    "sae_sets",
    "override_model_id",
    "custom_hf_model_id",
    "include_sae",
    "exclude_sae",
    "model_dtype",
    "sae_dtype",
    "token_limit",
    "max_loaded_saes",
)
OF_ONE_MODEL = (
    "sae_sets",
    "override_model_id",
    "custom_hf_model_id",
    "local_sae_dir",
    "labels_dir",
    "include_sae",
    "exclude_sae",
)
"""Settings that make no sense for another model than the one they were made for."""

RAISED = (ValueError, LookupError, RuntimeError, TimeoutError, MemoryError, OSError)
"""What `errors.builtin_errors` lets through."""
PATIENCE_S = 60.0


TENSORS = ("safetensors", "numpy")
"""What `format` may be of a method whose answer may be tensors: the bytes of a file, or arrays."""


def in_form(form: str, raw: bytes) -> bytes | dict[str, Any]:
    """raw: a file of tensors. With `numpy` a dictionary of `tensors`, by name, and `answer`, everything else."""
    if form == "safetensors":
        return raw
    return {"tensors": read_tensors(raw, most=len(raw)), "answer": dict(answer_in(raw))}


# Parameters


def parameters_of(instance: object) -> dict[str, Any]:
    """The class parameters of an instance that were given."""
    return {name: value for name in PARAMETERS if (value := getattr(instance, name))}


def as_parameters(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values as class parameters, which are texts and numbers: lists become JSON, empty ones are left out."""
    return {
        name: json.dumps(list(value)) if isinstance(value, list | tuple) else value
        for name, value in chosen.items()
        if value or isinstance(value, list)
    }


def settings_of(parameters: Mapping[str, Any]) -> Settings:
    """The container's environment with the parameters over it. Raises StartupError.

    Another MODEL_ID than the environment's does not inherit what was set for that one, such as its SAE_SETS.
    """
    given = {name: value for name, value in parameters.items() if value}
    model_id = given.get("model_id")
    if model_id and model_id != Settings.read().model_id:
        defaults = {name: Settings.model_fields[name].default for name in OF_ONE_MODEL}
        given = {**defaults, **given}
    return Settings.read(**given)


# Bodies


def prompted(prompt: object) -> dict[str, Any]:
    """The body of a friendly operation: its prompt, unless it is a body already, as lines of a batch are."""
    return dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}


def merged(body: object, fields: Mapping[str, Any]) -> Any:
    """One body out of a dictionary and keywords; keywords win."""
    if body is None:
        return dict(fields)
    if not fields:
        return body
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body must be a dictionary, or its fields keywords")
    return {**body, **fields}


def asked_for(request: object) -> tuple[str, dict[str, Any]]:
    """Operation and body of one entry of `requests`: a pair, or a dictionary with these two keys."""
    name, body = (request.get("operation"), request.get("body")) if isinstance(request, Mapping) else (None, None)
    if isinstance(request, list | tuple) and len(request) == 2:
        name, body = request
    if not isinstance(name, str) or not isinstance(body, Mapping):
        raise ValueError(f"invalid_request: requests: needs pairs of operation and body, not {str(request)[:80]!r}")
    check_operation(name)
    return name, dict(body)


def check_operation(name: str) -> None:
    """Raises LookupError unless there is one of that name."""
    from neuronpedia_inference.operations import by_name

    if name not in by_name:
        raise LookupError(f"unknown_operation: {name[:80]!r}. Available: {', '.join(by_name)}")


async def answer_or_error(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """An error that the service raised, as data."""
    try:
        return await answer
    except RAISED as exc:
        return {"error": str(exc)}


async def outcome_of(answer: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """`{"answer": ...}`, or `{"error", "kind"}` of what the service raised. An overloaded service is asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return {"answer": await answer()}
        except RAISED as exc:
            if not isinstance(exc, TimeoutError) or time.monotonic() > deadline:
                return {"error": str(exc), "kind": next(kind.__name__ for kind in RAISED if isinstance(exc, kind))}
            await asyncio.sleep(random.uniform(0.1, 0.5))


def as_exceptions(outcomes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `outcome_of` gave: each answer, or an exception in its place."""
    kinds = {kind.__name__: kind for kind in RAISED}
    return [
        outcome["answer"] if "answer" in outcome else kinds[outcome["kind"]](outcome["error"]) for outcome in outcomes
    ]


def first_activation(answer: Mapping[str, Any]) -> str:
    """The strongest feature of an `activations` answer as one line."""
    result = answer["results"][0]
    if not result["features"]:
        return "No feature fires on this prompt."
    best = result["features"][0]
    label = f" ({best['label']})" if best.get("label") else ""
    token = result["tokens"][best["max_value_index"]]
    return f"Strongest feature: {best['source']} / {best['index']}{label}: {best['max_value']:.2f} at {token!r}"


# Downloads


def fetch(settings: Settings, say: Say) -> list[str]:
    """Have the weights and every SAE in the caches of this machine; returns where the weights are and the sources."""
    from neuronpedia_inference import downloads
    from neuronpedia_inference.saes.catalogue import resolve
    from neuronpedia_inference.saes.describe import describe

    specs = resolve(settings).specs
    say(f"Weights of {settings.weights_id}")
    weights = downloads.fetch(settings)
    say(f"Weights of {settings.weights_id} are in {weights}")
    downloads.fetch_saes(specs, say)
    for number, spec in enumerate(specs, 1):
        say(f"SAE {number} of {len(specs)}: {spec.name}")
        describe(spec, settings.sae_dtype)
    return [str(weights), *(spec.name for spec in specs)]
