"""What SAEs exist for a model: the embedded ones, a local folder's, or those of SAELens's directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from neuronpedia_inference.errors import StartupError, unknown_name
from neuronpedia_inference.saes.directory import releases
from neuronpedia_inference.saes.names import aliases, all_names, lookup_order
from neuronpedia_inference.settings import EMBEDDED_MODEL_ID, Settings

__all__ = ["OfferedSet", "SaeCatalogue", "SourceSpec", "aliases", "hub_location", "known_models", "offered", "resolve"]

DEFAULT_SET = "res-jb"
CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
_NEURONS = "neurons"


@dataclass(frozen=True)
class SourceSpec:
    """Where one SAE is found: a release and id of SAELens's directory, or a folder."""

    name: str
    source_set: str
    release: str | None = None
    sae_id: str | None = None
    folder: Path | None = None
    neuronpedia_id: str | None = None


@dataclass(frozen=True)
class OfferedSet:
    """One line of what could be served for a model."""

    source_set: str
    release: str
    n_sources: int
    first_source: str
    last_source: str


@dataclass(frozen=True)
class SaeCatalogue:
    """The SAEs to serve, set by set in the order asked for, sources in directory order."""

    specs: tuple[SourceSpec, ...] = ()
    model_key: str | None = None
    """The name under which SAELens's directory lists the model; None for local folders."""

    @property
    def source_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(spec.source_set for spec in self.specs))


SetTable = Mapping[str, tuple[SourceSpec, ...]]


def resolve(settings: Settings) -> SaeCatalogue:
    """The SAEs that the settings ask for.

    Raises StartupError, one line with the nearest names, for an unknown model or set, a set that the filters
    empty, or a LOCAL_SAE_DIR that does not hold SAE folders.
    """
    if settings.sae_sets == ():
        return SaeCatalogue()
    local = _local_sets(settings.local_sae_dir) if settings.local_sae_dir else {}
    wanted = tuple(local) if settings.sae_sets is None else settings.sae_sets
    model_key, known = None, local
    if not wanted or any(name not in local for name in wanted):
        if not wanted and _is_folder(settings.sae_model_id):
            return SaeCatalogue()
        model_key, known = _beside(local, settings)
    wanted = wanted or _default_sets(model_key)
    specs = _pick(wanted, known, settings.sae_model_id)
    return SaeCatalogue(_filtered(specs, settings), model_key)


def offered(model_id: str) -> tuple[OfferedSet, ...]:
    """The sets that exist for a model. Raises StartupError with the nearest names if it is unknown."""
    table = _embedded_sets() if _is_embedded(model_id) else _directory()[_directory_key(model_id)]
    return tuple(_offer(name, specs) for name, specs in table.items())


def known_models() -> tuple[str, ...]:
    """Models that have at least one named SAE: the embedded one, then those of SAELens's directory."""
    return (EMBEDDED_MODEL_ID, *(model for model, sets in _directory().items() if sets))


def _offer(name: str, specs: tuple[SourceSpec, ...]) -> OfferedSet:
    releases = dict.fromkeys(spec.release or "embedded" for spec in specs)
    return OfferedSet(name, ", ".join(releases), len(specs), specs[0].name, specs[-1].name)


def _beside(local: SetTable, settings: Settings) -> tuple[str | None, SetTable]:
    """The local sets, which win, and those listed for the model; with local ones it may be listed nowhere."""
    try:
        key, listed = _sets_of_model(settings)
    except StartupError:
        if local:
            return None, local
        raise
    return key, {**listed, **local}


def _sets_of_model(settings: Settings) -> tuple[str, SetTable]:
    model_id = settings.sae_model_id
    if _is_embedded(model_id):
        return EMBEDDED_MODEL_ID, _embedded_sets()
    if _is_folder(model_id):
        raise StartupError(
            f"SAE_SETS names sets for the model in the folder {model_id!r}: LOCAL_SAE_DIR is needed to find "
            "them, or SAE_SETS='[]' to serve no SAEs."
        )
    key = _directory_key(model_id)
    return key, _directory()[key]


def hub_location(spec: SourceSpec) -> tuple[str, str]:
    """Repository and path, on the hub, of an SAE of SAELens's directory."""
    assert spec.release is not None, spec
    assert spec.sae_id is not None, spec
    release = releases()[spec.release]
    return release.repo, release.paths[spec.sae_id]


def _default_sets(model_key: str | None) -> tuple[str, ...]:
    if model_key != EMBEDDED_MODEL_ID:
        return (DEFAULT_SET,)
    return tuple(_embedded_sets())


def _pick(wanted: Iterable[str], known: SetTable, model: str) -> tuple[SourceSpec, ...]:
    picked: list[SourceSpec] = []
    for name in wanted:
        if name not in known:
            hint = "" if known else f" {model} has no SAE sets; SAE_SETS='[]' serves it without."
            raise StartupError(f"SAE_SETS: {unknown_name('source set', name, known)}{hint}")
        picked.extend(known[name])
    return tuple(picked)


def _filtered(specs: tuple[SourceSpec, ...], settings: Settings) -> tuple[SourceSpec, ...]:
    """Apply INCLUDE_SAE, then EXCLUDE_SAE; a set asked for by name must keep a source, others may vanish."""
    kept = tuple(spec for spec in specs if _passes(spec.name, settings))
    asked = dict.fromkeys(spec.source_set for spec in specs) if settings.sae_sets or not kept else {}
    left = {spec.source_set for spec in kept}
    for name in asked:
        if name not in left:
            raise _all_dropped(name, [spec.name for spec in specs if spec.source_set == name], settings)
    return kept


def _all_dropped(source_set: str, sources: list[str], settings: Settings) -> StartupError:
    if any(_passes(name, settings.model_copy(update={"exclude_sae": ()})) for name in sources):
        return StartupError(f"EXCLUDE_SAE leaves no source of the set {source_set!r}.")
    nearest = unknown_name("source pattern", " ".join(settings.include_sae), sources)
    return StartupError(f"INCLUDE_SAE keeps no source of the set {source_set!r}. {nearest}")


def _passes(name: str, settings: Settings) -> bool:
    included = not settings.include_sae or any(re.search(p, name) for p in settings.include_sae)
    return included and not any(re.search(p, name) for p in settings.exclude_sae)


def _is_embedded(model_id: str) -> bool:
    return EMBEDDED_MODEL_ID in aliases(model_id)


def _is_folder(model_id: str) -> bool:
    return Path(model_id).expanduser().is_dir()


def _embedded_sets() -> SetTable:
    from neuronpedia_inference import embedded

    specs = (
        SourceSpec(name=source, source_set=_set_of(source), folder=Path(embedded.sae_dir(source)))
        for source in embedded.SOURCES
    )
    return _by_set(specs)


def _local_sets(folder: Path) -> SetTable:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise StartupError(f"LOCAL_SAE_DIR: {str(folder)!r} is not a folder.")
    found = [child for child in folder.iterdir() if _holds_sae(child)]
    for child in found:
        if not re.fullmatch(r"[^-]+-.+", child.name) or _set_of(child.name) == _NEURONS:
            raise StartupError(f"LOCAL_SAE_DIR: {str(child)!r} is not named as a source, such as '7-res-jb'.")
    if not found:
        raise StartupError(f"LOCAL_SAE_DIR: {str(folder)!r} holds no SAE folder, such as '7-res-jb'.")
    found.sort(key=lambda child: _order(child.name))
    specs = (SourceSpec(child.name, _set_of(child.name), folder=child) for child in found)
    return dict(sorted(_by_set(specs).items()))


def _holds_sae(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))


def _order(name: str) -> tuple[int, int, str]:
    layer = name.split("-", 1)[0]
    return (0, int(layer), name) if layer.isdecimal() else (1, 0, name)


def _set_of(source: str) -> str:
    return source.split("-", 1)[1]


def _by_set(specs: Iterable[SourceSpec]) -> dict[str, tuple[SourceSpec, ...]]:
    table: dict[str, list[SourceSpec]] = {}
    for spec in specs:
        table.setdefault(spec.source_set, []).append(spec)
    return {name: tuple(group) for name, group in table.items()}


def _directory_key(model_id: str) -> str:
    directory = _directory()
    for name in lookup_order(model_id):
        if name in directory:
            return name
    listed = (name for name in all_names() if not directory.keys().isdisjoint(lookup_order(name)))
    unknown = unknown_name("model", model_id, dict.fromkeys((*known_models(), *listed)))
    raise StartupError(f"{unknown} SAE_SETS='[]' serves a model without SAEs.")


@lru_cache(maxsize=1)
def _directory() -> dict[str, SetTable]:
    """Model -> set -> sources, in directory order. SAEs without a neuronpedia id have no source name here."""
    rows: dict[str, list[SourceSpec]] = {}
    for release, about in releases().items():
        specs = rows.setdefault(about.model, [])
        for sae_id, neuronpedia_id in about.neuronpedia_ids.items():
            name = neuronpedia_id.rsplit("/", 1)[-1] if isinstance(neuronpedia_id, str) else ""
            if "-" in name:
                specs.append(SourceSpec(name, _set_of(name), release, sae_id, None, neuronpedia_id))
    return {model: _by_set(specs) for model, specs in rows.items()}
