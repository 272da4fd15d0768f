"""Where the files of an SAE are on this machine. The hub is not asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuronpedia_inference.saes.catalogue import hub_location
from neuronpedia_inference.saes.originals import needed_files
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


def snapshot_of(spec: SourceSpec, snapshots: Callable[[str], Path | None] = cached) -> Path | None:
    """The hub's cache of the repository in which an SAE is; None unless all its files are there.

    snapshots: instead of `cached`, to look for each repository once.
    """
    repo, path = hub_location(spec)
    there = snapshots(repo)
    return there if there and all((there / name).exists() for name in needed_files(spec, path)) else None


def is_here(spec: SourceSpec) -> bool:
    """Whether all files of an SAE are on this machine."""
    return spec.folder is not None or snapshot_of(spec) is not None
