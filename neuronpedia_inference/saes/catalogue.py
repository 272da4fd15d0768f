"""What SAEs exist for a model: the embedded ones, a local folder's, or those of SAELens's directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from neuronpedia_inference.errors import StartupError, unknown_name
from neuronpedia_inference.folders import existing_folder, expanded, missing_folder
from neuronpedia_inference.saes import listed
from neuronpedia_inference.saes.directory import releases
from neuronpedia_inference.saes.explicit import is_explicit, located
from neuronpedia_inference.saes.listed import ListedSae
from neuronpedia_inference.saes.names import aliases, all_names, bases, lookup_order
from neuronpedia_inference.saes.specs import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    SetTable,
    SourceSpec,
    by_set,
    from_directory,
    from_folder,
    holds_sae,
    is_source_name,
    set_of,
)
from neuronpedia_inference.settings import EMBEDDED_MODEL_ID, Settings

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "OfferedSet",
    "SaeCatalogue",
    "SourceSpec",
    "aliases",
    "hub_location",
    "known_models",
    "offered",
    "resolve",
]


@dataclass(frozen=True)
class OfferedSet:
    """What could be served for a model under one name."""

    source_set: str
    specs: tuple[SourceSpec, ...]
    is_default: bool = False

    @property
    def is_canonical(self) -> bool:
        """Whether Neuronpedia has all of it under this name; what is embedded is as good."""
        return _is_canonical(self.source_set, self.specs)

    @property
    def release(self) -> str:
        """Of several releases, all."""
        return ", ".join(dict.fromkeys(spec.release or "embedded" for spec in self.specs))

    @property
    def base(self) -> str | None:
        """The model whose SAEs these are, where the one asked about was finetuned from that."""
        return self.specs[0].base

    @property
    def refused(self) -> Mapping[str, int]:
        """Why some cannot be served, and how many."""
        return Counter(spec.listed.refused for spec in self.specs if spec.listed and spec.listed.refused)

    @property
    def limited(self) -> Mapping[str, int]:
        """Why a part of some is not served, and of how many."""
        return Counter(spec.listed.limited for spec in self.specs if spec.listed and spec.listed.limited)


@dataclass(frozen=True)
class SaeCatalogue:
    """The SAEs to serve, set by set in the order asked for, the sources of each by layer."""

    specs: tuple[SourceSpec, ...] = ()
    model_key: str | None = None
    """The name under which SAELens's directory lists the model; None for local folders."""

    @property
    def source_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(spec.source_set for spec in self.specs))


def resolve(settings: Settings) -> SaeCatalogue:
    """The SAEs that the settings ask for.

    Raises StartupError, one line with the nearest names, for an unknown model, set or address, an SAE that cannot be
    served, a set that the filters empty, or a LOCAL_SAE_DIR that does not hold SAE folders.
    """
    if settings.sae_sets == ():
        return SaeCatalogue()
    local = _local_sets(settings.local_sae_dir) if settings.local_sae_dir else {}
    wanted = tuple(local) if settings.sae_sets is None else settings.sae_sets
    model_key, known = None, local
    if not wanted and existing_folder(settings.sae_model_variable, settings.sae_model_id):
        return SaeCatalogue()
    if not wanted or any(name not in local for name in wanted):
        can_do_without = bool(local) or (bool(wanted) and all(map(is_explicit, wanted)))
        model_key, known = _beside(local, settings, can_do_without=can_do_without)
    wanted = wanted or (_default_set(known, settings.sae_model_id),)
    specs = _filtered(_pick(wanted, known, settings.sae_model_id), settings)
    _check_served(specs)
    return SaeCatalogue(specs, model_key)


def offered(model_id: str) -> tuple[OfferedSet, ...]:
    """The sets that exist for a model. Raises StartupError with the nearest names if it is unknown."""
    table = _embedded_sets() if _is_embedded(model_id) else _directory_sets(model_id)[1]
    default = _first_choice(table)
    return tuple(OfferedSet(name, specs, name == default) for name, specs in table.items())


def known_models() -> tuple[str, ...]:
    """Models that have SAEs: the embedded one, then those of SAELens's directory."""
    return (EMBEDDED_MODEL_ID, *listed.models())


def hub_location(spec: SourceSpec) -> tuple[str, str]:
    """Repository and path, on the hub, of an SAE that is in no folder."""
    if spec.repo is not None and spec.path is not None:
        return spec.repo, spec.path
    assert spec.release is not None, spec
    assert spec.sae_id is not None, spec
    release = releases()[spec.release]
    return release.repo, release.paths[spec.sae_id]


def _beside(local: SetTable, settings: Settings, *, can_do_without: bool) -> tuple[str | None, SetTable]:
    """The local sets, which win, and those listed for the model; one that can do without may be listed nowhere."""
    try:
        key, found = _sets_of_model(settings)
    except StartupError:
        if can_do_without:
            return None, local
        raise
    return key, {**found, **local}


def _sets_of_model(settings: Settings) -> tuple[str, SetTable]:
    model_id = settings.sae_model_id
    if _is_embedded(model_id):
        return EMBEDDED_MODEL_ID, _embedded_sets()
    if existing_folder(settings.sae_model_variable, model_id):
        raise StartupError(
            f"SAE_SETS names sets for the model in the folder {model_id!r}: LOCAL_SAE_DIR is needed to find "
            "them, or SAE_SETS='[]' to serve no SAEs."
        )
    return _directory_sets(model_id)


def _default_set(known: SetTable, model: str) -> str:
    found = _first_choice(known)
    if found is None:
        sets = ", ".join(list(known)[:12])
        raise StartupError(
            f"{model} has no SAEs that read the residual stream, so none are served by default: SAE_SETS chooses "
            f"among {sets}; SAE_SETS='[]' serves it without."
        )
    return found


def _first_choice(table: SetTable) -> str | None:
    """Of the sets on the residual stream one of the model's own before its base's, one with a Neuronpedia name before
    others, then that of most layers, the narrowest, the first. Embedded ones are all as good."""

    def rank(item: tuple[str, tuple[SourceSpec, ...]]) -> tuple[bool, bool, int, int]:
        name, specs = item
        saes = [spec.listed for spec in specs]
        is_canonical = _is_canonical(name, specs)
        widths = [sae.n_features or 0 for sae in saes if sae is not None]
        return specs[0].base is not None, not is_canonical, -len(specs), max(widths, default=0)

    return min((item for item in table.items() if _is_residual(item[1])), key=rank, default=(None, ()))[0]


def _is_canonical(source_set: str, specs: tuple[SourceSpec, ...]) -> bool:
    return "__" not in source_set and all(spec.listed is None or spec.listed.neuronpedia_id for spec in specs)


def _is_residual(specs: tuple[SourceSpec, ...]) -> bool:
    saes = [spec.listed for spec in specs]
    return all(sae is None or (sae.reads_residual and sae.refused is None) for sae in saes)


def _pick(wanted: Iterable[str], known: SetTable, model: str) -> tuple[SourceSpec, ...]:
    """Each SAE once. Raises StartupError for an unknown name, and for two SAEs of one name."""
    by_name = {spec.name: spec for group in known.values() for spec in group}
    picked: dict[str, SourceSpec] = {}
    for word in wanted:
        for spec in _named(word, known, by_name, model):
            other = picked.setdefault(spec.name, spec)
            if other.address != spec.address:
                raise StartupError(
                    f"SAE_SETS: {other.address} and {spec.address} are both called {spec.name!r}: give one another "
                    f"name, such as {spec.name}-b={spec.address}"
                )
    return tuple(picked.values())


def _named(word: str, known: SetTable, by_name: Mapping[str, SourceSpec], model: str) -> tuple[SourceSpec, ...]:
    """The SAEs of a set, of a source, or at an address: under their names for this model, where they have one."""
    if is_explicit(word):
        ours = {spec.address: spec for spec in by_name.values()}
        return tuple(_called(spec, ours, is_named="=" in word) for spec in located(word))
    if word in known:
        return known[word]
    if word in by_name:
        return (by_name[word],)
    raise StartupError(f"SAE_SETS: {unknown_name('source set', word, known)}")


def _called(spec: SourceSpec, ours: Mapping[str, SourceSpec], *, is_named: bool) -> SourceSpec:
    sae = spec.listed
    if is_named or sae is None:
        return spec
    return ours.get(spec.address) or from_directory(sae, sae.derived)


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


def _check_served(specs: Iterable[SourceSpec]) -> None:
    for spec in specs:
        if spec.listed and spec.listed.refused:
            raise StartupError(
                f"SAE {spec.name!r} ({spec.address}) is not served: {spec.listed.refused}; EXCLUDE_SAE leaves it out."
            )


def _is_embedded(model_id: str) -> bool:
    return EMBEDDED_MODEL_ID in aliases(model_id)


def _embedded_sets() -> SetTable:
    from neuronpedia_inference import embedded

    return by_set(from_folder(Path(embedded.sae_dir(source)), source) for source in embedded.SOURCES)


def _local_sets(folder: Path) -> SetTable:
    folder = expanded("LOCAL_SAE_DIR", folder)
    if not folder.is_dir():
        raise missing_folder("LOCAL_SAE_DIR", folder)
    found = [folder] if holds_sae(folder) else [child for child in folder.iterdir() if holds_sae(child)]
    for child in found:
        if not is_source_name(child.name):
            raise StartupError(f"LOCAL_SAE_DIR: {str(child)!r} is not named as a source, such as '7-res-jb'.")
    if not found:
        raise StartupError(f"LOCAL_SAE_DIR: {str(folder)!r} holds no SAE folder, such as '7-res-jb'.")
    return dict(sorted(by_set(from_folder(child) for child in sorted(found)).items()))


@cache
def _directory_sets(model_id: str) -> tuple[str, SetTable]:
    """The model's key in the directory, and its sets with those of its base; of two with one name the base goes by the
    derived name. Raises StartupError with the nearest names for an unknown model.
    """
    own = [key for key in listed.models() if key in aliases(model_id)]
    base = [key for key in listed.models() if key in bases(model_id)]
    if not own and not base:
        raise _unknown_model(model_id)
    specs = [from_directory(sae) for key in own for sae in listed.of_model(key)]
    taken = {spec.source_set for spec in specs}
    specs += [_of_base(sae, taken) for key in base for sae in listed.of_model(key)]
    return (own or base)[0], by_set(specs)


def _of_base(sae: ListedSae, taken: set[str]) -> SourceSpec:
    return from_directory(sae, sae.derived if set_of(sae.name) in taken else sae.name, base=sae.model)


def _unknown_model(model_id: str) -> StartupError:
    keys = set(listed.models())
    reachable = (name for name in all_names() if not keys.isdisjoint(lookup_order(name)))
    unknown = unknown_name("model", model_id, dict.fromkeys((*known_models(), *reachable)))
    return StartupError(f"{unknown} SAE_SETS='[]' serves a model without SAEs.")
