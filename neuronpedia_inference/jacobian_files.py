"""Where a model's Jacobians are: with the embedded model, where JLENS_SOURCE says, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from neuronpedia_inference import embedded
from neuronpedia_inference.downloads import check_hub, download, hub_files
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.folders import existing_folder, expanded
from neuronpedia_inference.saes.explicit import HUB
from neuronpedia_inference.saes.files import cached
from neuronpedia_inference.saes.names import aliases, hugging_face_name
from neuronpedia_inference.settings import Settings

NONE = "none"
SUFFIXES = (".safetensors", ".pt")


def jacobian_file(settings: Settings, progress: Callable[[str], None], *, asks_hub: bool) -> Path:
    """The file, downloaded where JLENS_SOURCE names the hub, or with `asks_hub`. Raises StartupError that says
    why there is none.

    asks_hub: whether the hub may be asked although JLENS_SOURCE does not name it.
    """
    source = settings.jlens_source
    if source == NONE:
        raise StartupError(f"JLENS_SOURCE is {NONE!r}")
    if source is not None and source.startswith(HUB):
        owner, _, rest = source.removeprefix(HUB).partition("/")
        name, _, path = rest.partition("/")
        return _on_hub(f"{owner}/{name}", path, settings, progress, asks_hub=True)
    if source is not None:
        return _in_folder(expanded("JLENS_SOURCE", source))
    if settings.is_embedded:
        return embedded.JACOBIANS
    if existing_folder(settings.weights_variable, settings.weights_id) is not None:
        raise StartupError("the model comes from a folder, and JLENS_SOURCE names no file")
    path = f"{_short_name(settings)}/jlens/{settings.jlens_dataset}"
    return _on_hub(settings.jlens_hf_repo, path, settings, progress, asks_hub=asks_hub)


def _in_folder(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES) if path.is_dir() else []
    if not files:
        raise StartupError(f"JLENS_SOURCE: {str(path)!r} is neither a file nor a folder that holds one ({SUFFIXES})")
    return next((file for file in files if file.suffix == SUFFIXES[0]), files[0])


def _on_hub(repo: str, path: str, settings: Settings, progress: Callable[[str], None], *, asks_hub: bool) -> Path:
    """A file there, or in a folder there the one that contract 4.5 would take."""
    there = cached(repo)
    names = [] if there is None else [str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()]
    name = _chosen(names, path, settings)
    if there is not None and name is not None:
        return there / name
    if not asks_hub:
        raise StartupError(f"{path!r} of {repo!r} is not on this machine; JLENS_SOURCE='{HUB}{repo}/{path}' fetches it")
    check_hub(repo, "JLENS_SOURCE")
    name = _chosen(hub_files(repo), path, settings)
    if name is None:
        raise StartupError(f"{repo!r} has no Jacobian lens at {path!r}")
    progress(f"Downloading the Jacobian lens {name}")
    return download(repo, [name], f"the Jacobian lens {name!r}") / name


def _chosen(names: Collection[str], path: str, settings: Settings) -> str | None:
    if path in names:
        return path
    slug = hugging_face_name(settings.weights_id).rpartition("/")[2]
    wanted = [f"{path}/{slug}_jacobian_lens{ending}.pt" for ending in ("", "_n1000")]
    others = sorted(name for name in names if name.rpartition("/")[0] == path and name.endswith(SUFFIXES))
    return next((name for name in (*wanted, *others) if name in names), None)


def _short_name(settings: Settings) -> str:
    """Neuronpedia's for the model."""
    names = aliases(settings.sae_model_id)
    return next((name for name in names if "/" not in name), names[0].rpartition("/")[2])
