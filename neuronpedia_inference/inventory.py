"""What SAEs there are for models, as people and programs ask: where each reads, how large it is, what is not served."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neuronpedia_inference.errors import StartupError, unknown_name
from neuronpedia_inference.memory import item_bytes, sae_numbers
from neuronpedia_inference.saes import files
from neuronpedia_inference.saes.catalogue import OfferedSet, SourceSpec, known_models, offered, resolve
from neuronpedia_inference.saes.explicit import is_explicit, located
from neuronpedia_inference.saes.specs import CONFIG_NAME
from neuronpedia_inference.settings import Settings

Snapshots = Callable[[str], Path | None]
"""From a repository to the hub's cache of it."""


@dataclass(frozen=True)
class Sae:
    """One SAE."""

    spec: SourceSpec
    kind: str
    """SAELens's architecture, or "sae" where only files that are not here say it."""
    hook: str | None
    width: int | None
    """Features; None where only files that are not here say it."""
    disk_bytes: int | None
    """Of its files; None where they are not on this machine."""
    resident_bytes: int | None
    """Of its tensors in SAE_DTYPE, where the files are here."""

    @property
    def refused(self) -> str | None:
        return self.spec.listed.refused if self.spec.listed else None

    @property
    def limited(self) -> str | None:
        return self.spec.listed.limited if self.spec.listed else None

    def to_json(self) -> dict[str, Any]:
        """What is not known is null; `refused` and `limited` are there only where there is a reason."""
        about: dict[str, Any] = {
            "name": self.spec.name,
            "release": self.spec.release,
            "sae_id": self.spec.sae_id,
            "hook": self.hook,
            "width": self.width,
            "kind": self.kind,
            "bytes": self.disk_bytes,
            "resident_bytes": self.resident_bytes,
        }
        reasons = {"refused": self.refused, "limited": self.limited, "base": self.spec.base}
        return about | {name: reason for name, reason in reasons.items() if reason}


@dataclass(frozen=True)
class SaeSet:
    """SAEs of one name, layer by layer."""

    offered: OfferedSet
    saes: tuple[Sae, ...]

    @property
    def name(self) -> str:
        return self.offered.source_set

    @property
    def kinds(self) -> str:
        return ", ".join(dict.fromkeys(sae.kind for sae in self.saes))

    @property
    def widths(self) -> str:
        """`16384`, or the least and the most; empty where none is known."""
        known = sorted({sae.width for sae in self.saes if sae.width})
        return "-".join(dict.fromkeys(str(width) for width in (known[0], known[-1]))) if known else ""

    @property
    def places(self) -> str:
        """Hooks without their layer."""
        return ", ".join(dict.fromkeys(_place(sae.hook) for sae in self.saes if sae.hook))

    @property
    def disk_bytes(self) -> int:
        """Of those that are on this machine."""
        return sum(sae.disk_bytes or 0 for sae in self.saes)

    @property
    def resident_bytes(self) -> int | None:
        """None unless all are on this machine."""
        sizes = [sae.resident_bytes for sae in self.saes]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    def to_json(self, *, with_saes: bool) -> dict[str, Any]:
        """with_saes: each of them, not their number alone."""
        about = {"set": self.name, "canonical": self.offered.is_canonical, "default": self.offered.is_default}
        return about | ({"saes": [sae.to_json() for sae in self.saes]} if with_saes else {"n_saes": len(self.saes)})


def sets_of(model: str, sae_dtype: str, *, own: bool = False) -> tuple[SaeSet, ...]:
    """What could be served for a model. own: not what its base has. Raises StartupError if it is unknown."""
    snapshots = cache(files.cached)
    return tuple(
        SaeSet(one, tuple(described(spec, sae_dtype, snapshots) for spec in one.specs))
        for one in offered(model)
        if not (own and one.base)
    )


def directory(sae_dtype: str) -> dict[str, tuple[SaeSet, ...]]:
    """Every SAE of SAELens's directory once, by model and set."""
    return {model: sets_of(model, sae_dtype, own=True) for model in known_models()[1:]}


def to_json(models: Mapping[str, Iterable[SaeSet]], *, with_saes: bool) -> dict[str, Any]:
    """The form of `models --json`."""
    return {
        "models": [
            {"model": model, "sets": [one.to_json(with_saes=with_saes) for one in sets]}
            for model, sets in models.items()
        ]
    }


def find(source: str, settings: Settings) -> Sae:
    """An SAE by its name for the model of the settings, as `model/source`, or at an address as in SAE_SETS.

    Raises StartupError with the nearest names.
    """
    model, slash, name = source.partition("/")
    if slash and (model in known_models() or not is_explicit(source)):
        specs: Sequence[SourceSpec] = [spec for one in offered(model) for spec in one.specs]
    elif slash or source.startswith("~"):
        first, *others = located(source)
        if others:
            raise StartupError(f"{source!r} is a folder of {1 + len(others)} SAEs: name one of its folders.")
        return described(first, settings.sae_dtype, files.cached)
    else:
        name = source
        local = resolve(settings).specs if settings.local_sae_dir else ()
        specs = [*local, *(spec for one in offered(settings.sae_model_id) for spec in one.specs)]
    by_name = {spec.name: spec for spec in reversed(specs)}
    if name not in by_name:
        raise StartupError(unknown_name("source", name, list(by_name)[::-1], most=6))
    return described(by_name[name], settings.sae_dtype, files.cached)


def described(spec: SourceSpec, sae_dtype: str, snapshots: Snapshots) -> Sae:
    """Nothing is asked of the hub. Raises StartupError for files that cannot be read."""
    found = files.files_of(spec, snapshots)
    there = found.all if found is not None else []
    on_disk = sum(file.stat().st_size for file in there) if there else None
    resident = item_bytes(sae_dtype) * sae_numbers([spec])[0] if there else None
    if spec.listed is not None:
        return Sae(spec, spec.listed.kind, spec.listed.hook, spec.listed.n_features, on_disk, resident)
    kind, hook, width = _written(spec, found)
    return Sae(spec, kind, hook, width, on_disk, resident)


def _written(spec: SourceSpec, found: files.Files | None) -> tuple[str, str | None, int | None]:
    """Kind, hook and width by the configuration in an SAE's folder."""
    if found is None:
        return "sae", None, None
    try:
        config = _json(found.folder / CONFIG_NAME) if found.loader is None else _foreign(found)
        metadata = config.get("metadata") or {}
        hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
        return str(config.get("architecture", "standard")), hook, config.get("d_sae")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as exc:
        raise StartupError(f"SAE {spec.name!r}: its configuration cannot be read: {exc}") from None


def _foreign(found: files.Files) -> dict[str, Any]:
    from neuronpedia_inference.saes import foreign  # takes torch along

    return foreign.written(found)


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _place(hook: str) -> str:
    return hook.split(".", 2)[2] if hook.startswith("blocks.") else hook
