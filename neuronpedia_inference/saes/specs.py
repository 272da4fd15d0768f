"""Where one SAE is found, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from neuronpedia_inference.saes.listed import ListedSae

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
NEURONS = "neurons"


@dataclass(frozen=True)
class SourceSpec:
    """One SAE: a release and id of SAELens's directory, a folder, or a path in a repository of the hub."""

    name: str
    source_set: str
    release: str | None = None
    sae_id: str | None = None
    folder: Path | None = None
    neuronpedia_id: str | None = None
    repo: str | None = None
    """On the hub, with `path`; in SAELens's format where there is no release."""
    path: str | None = None
    base: str | None = None
    """The model whose SAE it is, where the served one was finetuned from that."""

    listed: ListedSae | None = field(default=None, compare=False, repr=False)
    """What the directory says of it."""

    @property
    def address(self) -> str:
        """Where it is, in the form that SAE_SETS takes."""
        if self.release is not None:
            return f"{self.release}/{self.sae_id}"
        return f"hf://{self.repo}/{self.path}" if self.repo is not None else str(self.folder)


SetTable = Mapping[str, tuple[SourceSpec, ...]]


def from_directory(sae: ListedSae, name: str | None = None, base: str | None = None) -> SourceSpec:
    """name: instead of its own."""
    name = name or sae.name
    return SourceSpec(
        name, set_of(name), sae.release, sae.sae_id, None, sae.neuronpedia_id, sae.repo, sae.path, base, listed=sae
    )


def from_folder(folder: Path, name: str | None = None) -> SourceSpec:
    """name: instead of the folder's."""
    name = name or folder.name
    return SourceSpec(name, set_of(name), folder=folder)


def set_of(source: str) -> str:
    return source.split("-", 1)[1]


def is_source_name(name: str) -> bool:
    """Whether it has a layer and a set, as in `7-res-jb`, and can stand before the index of a feature."""
    return re.fullmatch(r"[^-/=\s]+-[^/=\s]+", name) is not None and set_of(name) != NEURONS


def holds_sae(folder: Path) -> bool:
    """Of SAELens, or of another trainer (`originals.FOREIGN`)."""
    return any((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, "ae.pt"))


def layer_order(name: str) -> tuple[int, int]:
    """Sorts by layer; embeddings and what else is no number come last."""
    layer = name.split("-", 1)[0]
    return (0, int(layer)) if layer.isdecimal() else (1, 0)


def by_set(specs: Iterable[SourceSpec]) -> dict[str, tuple[SourceSpec, ...]]:
    """Sets in the order in which they come up, the sources of each by layer."""
    table: dict[str, list[SourceSpec]] = {}
    for spec in specs:
        table.setdefault(spec.source_set, []).append(spec)
    return {name: tuple(sorted(group, key=lambda spec: layer_order(spec.name))) for name, group in table.items()}
