"""Where the files of a model are on this machine, without asking the hub when they are all there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.catalogue import SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.names import hugging_face_name
from neuronpedia_inference.saes.originals import all_files, needed_files
from neuronpedia_inference.settings import Settings

WEIGHT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
INDEX = "model.safetensors.index.json"


def found(settings: Settings) -> Path | None:
    """The folder with the model's files, all of them; None if some must be downloaded. Raises StartupError."""
    if settings.is_embedded:
        return model_folder()
    folder = Path(settings.weights_id).expanduser()
    if folder.is_dir():
        return folder
    cached = _cached(hugging_face_name(settings.weights_id))
    return cached if cached is not None and _is_complete(cached) else None


def fetch(settings: Settings) -> Path:
    """As `found`, downloading what is missing. Raises StartupError, one line."""
    there = found(settings)
    if there is not None:
        return there
    name = hugging_face_name(settings.weights_id)
    return _download(name, WEIGHT_FILES, f"the model {name!r}")


def fetch_everything(settings: Settings, progress: Callable[[str], None]) -> bool:
    """Have the model's files and those of its SAEs here; whether some had to be downloaded. Raises StartupError."""
    specs = resolve(settings).specs
    missing = [spec for spec in specs if not is_here(spec)]
    is_missing = found(settings) is None
    if is_missing:
        progress(f"Downloading {settings.weights_id}")
        fetch(settings)
    for number, spec in enumerate(missing, 1):
        progress(f"Downloading SAE {number} of {len(missing)}: {spec.name}")
        repo, path = hub_location(spec)
        _download(repo, all_files(spec, path), f"SAE {spec.name!r}")
    return is_missing or bool(missing)


def is_here(spec: SourceSpec) -> bool:
    """Whether an SAE's files are on this machine."""
    if spec.folder is not None:
        return True
    repo, path = hub_location(spec)
    cached = _cached(repo)
    return cached is not None and all((cached / name).exists() for name in needed_files(spec, path))


@contextmanager
def hub_left_alone() -> Iterator[None]:
    """The hub's client takes what is here and asks nothing inside."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def weight_files(folder: Path) -> list[Path]:
    """The parts of a model's weights: those of the index, else the file of the usual name, else all safetensors."""
    if (folder / INDEX).is_file():
        return [folder / name for name in _indexed(folder)]
    one = folder / "model.safetensors"
    return [one] if one.is_file() else sorted(folder.glob("*.safetensors"))


def _download(repo: str, files: Sequence[str], what: str) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    # httpx2 is the hub client's transport; without a route it raises its own errors.
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files)))
    except (OSError, ValueError, HTTPError) as exc:
        why = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise StartupError(f"Cannot download {what}: {why}") from None


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_complete(folder: Path) -> bool:
    """Whether configuration, tokenizer and all parts of the weights are there: a download may have been cut off."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    if "config.json" not in names or names.isdisjoint(("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return False
    if INDEX not in names:
        return "model.safetensors" in names
    parts = _indexed(folder)
    return bool(parts) and names.issuperset(parts)


def _indexed(folder: Path) -> list[str]:
    """Names of the files that the index lists; none if it cannot be read."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        return []
