"""Which models a caller may choose: names on a list, never paths, judged before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from neuronpedia_inference.errors import InvalidRequest, unknown_name
from neuronpedia_inference.saes.catalogue import aliases, known_models
from neuronpedia_inference.saes.names import lookup_order
from neuronpedia_inference.settings import Settings

CHOICES = ("model_id", "override_model_id", "custom_hf_model_id")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*(/[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*)?")


def is_name(text: str) -> bool:
    """Whether it is a short or Hugging Face name: `gpt2-small`, `google/gemma-2-2b`. Paths are not."""
    return _NAME.fullmatch(text) is not None


def check_models(chosen: Mapping[str, Any], listed: Iterable[str], own: Settings) -> None:
    """Raises InvalidRequest unless callers may have every model that is chosen, and name their SAEs.

    listed: MODELS, empty for every model of SAELens's directory. own: the deployment's, always allowed.
    """
    for field in CHOICES:
        if name := chosen.get(field):
            _check(field, str(name), tuple(listed), own)
    sets = str(chosen.get("sae_sets") or "")
    if "/" in sets or "~" in sets:
        raise InvalidRequest(
            f"sae_sets {sets[:80]!r} says where SAEs are. Callers name sets and sources, such as 'res-jb'; paths, "
            "repositories and releases are for the deployment's own SAE_SETS."
        )


def _check(field: str, name: str, listed: tuple[str, ...], own: Settings) -> None:
    if not is_name(name):
        raise InvalidRequest(
            f"{field} {name[:80]!r} is not the name of a model, such as 'gpt2-small' or 'google/gemma-2-2b'. "
            "Paths are not accepted."
        )
    same = aliases(name)
    ours = {own.model_id, own.override_model_id, own.custom_hf_model_id}
    if not ours.isdisjoint(same):
        return
    if listed:
        if any(other in same for other in listed):
            return
        raise InvalidRequest(f"{field}: {unknown_name('model', name[:80], listed)} The deployment's MODELS lists them.")
    if set(known_models()).isdisjoint(lookup_order(name)):
        unknown = unknown_name("model", name[:80], known_models())
        raise InvalidRequest(f"{field}: {unknown} Others must be listed in the deployment's MODELS.")
