"""Words of SAE_SETS that are no names: `release/sae_id`, `hf://owner/repo/path`, a folder, each with `NAME=` before it
where it is to be called otherwise. Only a configuration has them; a request never does.
"""

from __future__ import annotations

import re
from pathlib import Path

from neuronpedia_inference.errors import StartupError, unknown_name
from neuronpedia_inference.folders import expanded, missing_folder
from neuronpedia_inference.saes.directory import releases
from neuronpedia_inference.saes.listed import derived_name, find
from neuronpedia_inference.saes.specs import (
    SourceSpec,
    from_directory,
    from_folder,
    holds_sae,
    is_source_name,
    layer_order,
    set_of,
)

HUB = "hf://"


def is_explicit(word: str) -> bool:
    """Whether it says where an SAE is: names of sets and sources have no slash."""
    return "/" in word or word.startswith("~")


def located(word: str) -> tuple[SourceSpec, ...]:
    """The SAE that the word says, or the SAEs in the folder. Raises StartupError, one line."""
    name, place = _split(word)
    if place.startswith(HUB):
        return (_on_hub(name, place),)
    if place.startswith(("/", "./", "../", "~")):
        return _in_folder(name, expanded("SAE_SETS", place))
    return (_in_release(name, place),)


def _split(word: str) -> tuple[str | None, str]:
    name, equals, place = word.partition("=")
    if not equals or "/" in name:
        return None, word
    if not is_source_name(name):
        raise StartupError(f"SAE_SETS: {name!r} in {word!r} is not the name of a source, such as '7-res-jb'.")
    return name, place


def _in_release(name: str | None, place: str) -> SourceSpec:
    release, _, sae_id = place.partition("/")
    if release not in releases():
        raise StartupError(
            f"SAE_SETS: {unknown_name('release', release, releases(), most=3)} A folder is written ./{place}, "
            f"a path in a repository of the hub {HUB}owner/repo/path."
        )
    if sae_id not in releases()[release].paths:
        raise StartupError(f"SAE_SETS: {unknown_name(f'SAE of {release}', sae_id, releases()[release].paths, most=3)}")
    return from_directory(find(release, sae_id), name)


def _on_hub(name: str | None, place: str) -> SourceSpec:
    owner, _, rest = place.removeprefix(HUB).partition("/")
    repo, _, path = rest.partition("/")
    path = path.strip("/")
    if not (owner and repo and path) or ".." in path.split("/"):
        raise StartupError(f"SAE_SETS: {place!r} is not of the form {HUB}owner/repo/path, with the folder of one SAE.")
    for release, about in releases().items():
        if about.repo == f"{owner}/{repo}":
            for sae_id, listed_path in about.paths.items():
                if listed_path == path:
                    return from_directory(find(release, sae_id), name)
    name = name or _derived(f"{owner}-{repo}", path)
    if name is None:
        raise _unnamed(place)
    return SourceSpec(name, set_of(name), repo=f"{owner}/{repo}", path=path)


def _in_folder(name: str | None, folder: Path) -> tuple[SourceSpec, ...]:
    if not folder.is_dir():
        raise missing_folder("SAE_SETS", folder)
    if holds_sae(folder):
        return (from_folder(folder, _name_of(name, folder)),)
    found = [child for child in folder.iterdir() if holds_sae(child)]
    if not found or name is not None:
        kind = "an SAE" if name is not None else "SAEs"
        raise StartupError(f"SAE_SETS: {str(folder)!r} is not the folder of {kind}: it holds no cfg.json and no ae.pt.")
    named = [from_folder(child, _name_of(None, child)) for child in found]
    return tuple(sorted(named, key=lambda spec: (spec.source_set, layer_order(spec.name))))


def _name_of(name: str | None, folder: Path) -> str:
    if name is not None or is_source_name(folder.name):
        return name or folder.name
    derived = _derived("local", folder.name)
    if derived is None:
        raise _unnamed(str(folder))
    return derived


def _derived(collection: str, path: str) -> str | None:
    """As in the directory. EleutherAI's folders are called by modules, `layers.5.mlp`."""
    return derived_name(collection, re.sub(r"(?<![A-Za-z])(?:layers|h)\.(\d+)", r"layer_\1", path))


def _unnamed(place: str) -> StartupError:
    return StartupError(f"SAE_SETS: {place!r} names no layer: give it a name, such as 7-my-set={place}")
