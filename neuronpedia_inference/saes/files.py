"""Where the files of an SAE are on this machine. The hub is not asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuronpedia_inference.saes.catalogue import hub_location
from neuronpedia_inference.saes.originals import all_files, loader_among, weight_files
from neuronpedia_inference.saes.specs import SourceSpec


def cached(name: str, how: Mapping[str, Any] = MappingProxyType({})) -> Path | None:
    """The hub's cache of a repository, whatever of it is there; None for nothing. how: as `revision`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # No pattern, for the client remembers what else the hub has, and would call a part of it nothing.
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=[], **how))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@dataclass(frozen=True, slots=True)
class Files:
    """All that is needed of an SAE, on this machine."""

    root: Path
    """The hub's cache of its repository, or the folder above its own."""
    path: str
    """In there."""
    loader: str | None
    """SAELens's name for the format; None for its own."""

    @property
    def folder(self) -> Path:
        """Or file, as the format is."""
        return self.root / self.path

    @property
    def all(self) -> list[Path]:
        """Those that are there, of all that may be read."""
        return [self.root / name for name in all_files(self.loader, self.path) if (self.root / name).is_file()]

    @property
    def weights(self) -> list[Path]:
        return [self.root / name for name in weight_files(self.loader, self.path)]


def files_of(spec: SourceSpec, snapshots: Callable[[str], Path | None] = cached) -> Files | None:
    """None where some are missing, of an SAE on the hub; a folder is what it is named as.

    snapshots: instead of `cached`, to look for each repository once.
    """
    if spec.folder is not None:
        root: Path | None = spec.folder.parent
        path = spec.folder.name
    else:
        repo, path = hub_location(spec)
        root = snapshots(repo)
    if root is None:
        return None
    try:
        return Files(root, path, loader_among(spec, path, lambda name: (root / name).exists()))
    except LookupError:
        return None if spec.folder is None else Files(root, path, None)


def is_here(spec: SourceSpec) -> bool:
    """Whether all files of an SAE are on this machine."""
    return files_of(spec) is not None
