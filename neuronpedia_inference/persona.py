"""Persona axes: directions along which the messages of a chat are measured, fitted beforehand and kept in a folder.

`persona.json`     layer, titles (one per axis, as answers name them), names (short ones, for steering), is_scaled,
                   floors: per axis the value of h·v̂ below which the published use caps, or null; and, where chats are
                   to be read so, blanks_system_message (false): what a leading system message says is left out.
`persona.safetensors`   `mean` [d_model] and `axes` [n, d_model].

A message's value on axis k is axes[k] · x, where x is the mean of the residual stream behind `layer` over the tokens
that the message adds to the chat, less `mean`, and with `is_scaled` of unit length (contract of the wire, 3.10).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.embedded import PERSONA_FOLDER
from neuronpedia_inference.engine.protocol import ModelInfo
from neuronpedia_inference.errors import InvalidRequest, StartupError, unknown_name
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.tensor_files import read_tensors

FACTS, TENSORS = "persona.json", "persona.safetensors"
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, eq=False)
class Persona:
    """The axes of one model."""

    layer: int
    titles: tuple[str, ...]
    names: tuple[str, ...]
    floors: tuple[float | None, ...]
    is_scaled: bool
    mean: Numbers
    """[d_model]"""
    axes: Numbers
    """[axis, d_model]"""
    blanks_system_message: bool = False
    """Whether a leading system message is rendered with empty content."""

    @classmethod
    def load(cls, folder: Path, n_layers: int, d_model: int) -> Self:
        """Raises StartupError for one that cannot be read, or is of another model."""
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            tensors = read_tensors((folder / TENSORS).read_bytes())
            found = cls(
                layer=int(facts["layer"]),
                titles=tuple(map(str, facts["titles"])),
                names=tuple(map(str, facts["names"])),
                floors=tuple(None if one is None else float(one) for one in facts["floors"]),
                is_scaled=_flag(facts, "is_scaled"),
                mean=tensors["mean"].astype(np.float32),
                axes=tensors["axes"].astype(np.float32),
                blanks_system_message="blanks_system_message" in facts and _flag(facts, "blanks_system_message"),
            )
        except UNREADABLE as exc:
            raise StartupError(f"PERSONA_DIR: {str(folder)!r} cannot be read: {exc!r}") from None
        n = len(found.titles)
        shapes = (found.mean.shape, found.axes.shape, len(found.names), len(found.floors))
        if shapes != ((d_model,), (n, d_model), n, n) or not 0 <= found.layer < n_layers:
            raise StartupError(
                f"PERSONA_DIR: {str(folder)!r} has layer {found.layer} and the shapes {shapes}, which are not of a "
                f"model of {n_layers} layers, {d_model} wide, with {n} titles"
            )
        return found

    @property
    def hook(self) -> str:
        """Where messages are measured."""
        return f"blocks.{self.layer}.hook_resid_post"

    def values(self, mean_state: Numbers) -> dict[str, float]:
        """By title, of a message whose residual stream is this on the mean: [d_model]."""
        centred = mean_state.astype(np.float64) - self.mean
        length = np.linalg.norm(centred) if self.is_scaled else 1.0
        return dict(zip(self.titles, (self.axes @ (centred / (length or 1.0))).tolist(), strict=True))

    def axis(self, name: str) -> Numbers:
        """[d_model]. Raises InvalidRequest for a name that it does not have."""
        if name not in self.names:
            raise InvalidRequest(unknown_name("axis", name, self.names))
        return self.axes[self.names.index(name)]

    def describe(self) -> dict[str, Any]:
        """For `/v1/capabilities`."""
        axes = [
            {"name": name, "title": title, "floor": floor}
            for name, title, floor in zip(self.names, self.titles, self.floors, strict=True)
        ]
        return {
            "layer": self.layer,
            "hook": self.hook,
            "axes": axes,
            "blanks_system_message": self.blanks_system_message,
        }


def _flag(facts: dict[str, Any], name: str) -> bool:
    if not isinstance(facts[name], bool):
        raise TypeError(f"{name} is {facts[name]!r}, and not true or false")
    return facts[name]


def persona_of(settings: Settings, model: ModelInfo) -> Persona | None:
    """In PERSONA_DIR, or in a folder of the model's name in there; else the embedded model's own, if that is served.

    Raises StartupError.
    """
    folder = settings.persona_dir
    if folder is None:
        has_own = settings.is_embedded and PERSONA_FOLDER.is_dir()
        return Persona.load(PERSONA_FOLDER, model.n_layers, model.d_model) if has_own else None
    named = folder / model.id.rpartition("/")[2]
    if not (folder / FACTS).is_file() and not named.is_dir():
        raise StartupError(f"PERSONA_DIR: {str(folder)!r} holds neither {FACTS} nor a folder {named.name!r}")
    return Persona.load(named if named.is_dir() else folder, model.n_layers, model.d_model)
