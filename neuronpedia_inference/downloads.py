"""Where the files of a model are on this machine, without asking the hub when they are all there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import StartupError, did_you_mean, unknown_name
from neuronpedia_inference.folders import existing_folder, folders_beside, missing_folder
from neuronpedia_inference.saes.catalogue import hub_location, resolve
from neuronpedia_inference.saes.files import cached, is_here
from neuronpedia_inference.saes.names import all_names, hugging_face_name
from neuronpedia_inference.saes.originals import all_files, is_converted, loader_among, loaders_of, needed_files
from neuronpedia_inference.saes.specs import SourceSpec
from neuronpedia_inference.settings import Settings

log = logging.getLogger(__name__)

WEIGHT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HUB_S = 10.0
"""How long the hub may take to say whether it has something."""
GIB = 2**30
DISK_LEFT = GIB
"""Bytes of the disk that no download takes."""
INDEX = "model.safetensors.index.json"


def found(settings: Settings) -> Path | None:
    """The folder with the model's files, all of them; None if some must be downloaded. Raises StartupError.

    The `subfolder`, `revision` and `cache_dir` of MODEL_FROM_PRETRAINED_KWARGS count; a `subfolder` is in the answer.
    """
    if settings.is_embedded:
        return model_folder()
    options = settings.model_from_pretrained_kwargs
    folder = existing_folder(settings.weights_variable, settings.weights_id)
    if folder is not None:
        return _checked(_within(folder, options), options)
    if options.get("force_download"):
        return None
    there = cached(hugging_face_name(settings.weights_id), _of(options, "revision", "cache_dir"))
    if there is None:
        return None
    inner = there / options.get("subfolder", "")
    return inner if _is_complete(inner, options.get("gguf_file")) else None


def decisive_files(folder: Path, settings: Settings) -> list[Path]:
    """Configuration and weights of the model in a folder that `found` gives: what its numbers depend on."""
    gguf = settings.model_from_pretrained_kwargs.get("gguf_file")
    return [folder / gguf] if gguf is not None else [folder / "config.json", *weight_files(folder)]


def fetch(settings: Settings) -> Path:
    """As `found`, downloading what is missing. Raises StartupError, one line."""
    there = found(settings)
    if there is not None:
        return there
    options = settings.model_from_pretrained_kwargs
    name = hugging_face_name(settings.weights_id)
    check_hub(name, settings.weights_variable, options)
    subfolder = options.get("subfolder", "")
    wanted = [options["gguf_file"]] if "gguf_file" in options else WEIGHT_FILES
    how = _of(options, "revision", "cache_dir", "token", "force_download")
    files = [f"{subfolder}/{one}" if subfolder else one for one in wanted]
    return download(name, files, f"the model {name!r}", how) / subfolder


def _of(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _within(folder: Path, options: Mapping[str, Any]) -> Path:
    """Raises StartupError for a `subfolder` that is not there."""
    inner = folder / options.get("subfolder", "")
    if not inner.is_dir():
        raise missing_folder("MODEL_FROM_PRETRAINED_KWARGS, subfolder", inner)
    return inner


def _checked(folder: Path, options: Mapping[str, Any]) -> Path:
    """Raises StartupError unless there is something to load in a folder, of which its user has to know what it is."""
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    wanted = options.get("gguf_file")
    if wanted is not None and not (folder / wanted).is_file():
        raise StartupError(f"MODEL_FROM_PRETRAINED_KWARGS: {unknown_name('gguf_file', wanted, gguf)} ({folder})")
    if wanted is None and not (folder / "config.json").is_file():
        hint = json.dumps({"gguf_file": gguf[0]}) if gguf else ""
        remedy = f": it holds {gguf[0]}, which MODEL_FROM_PRETRAINED_KWARGS='{hint}' loads" if gguf else ""
        raise StartupError(f"{str(folder)!r} holds no model: it needs config.json and *.safetensors{remedy}.")
    return folder


def fetch_everything(settings: Settings, progress: Callable[[str], None]) -> bool:
    """Have the model's files and those of its SAEs here; whether some had to be downloaded. Raises StartupError."""
    specs = resolve(settings).specs
    is_missing = found(settings) is None
    if is_missing:
        progress(f"Downloading {settings.weights_id}")
        fetch(settings)
    return fetch_saes(specs, progress) or is_missing


def fetch_saes(specs: Sequence[SourceSpec], progress: Callable[[str], None]) -> bool:
    """Have the files of SAEs here; whether some had to be downloaded.

    How large they are is said first. Raises StartupError, also where the disk would not hold them.
    """
    missing = missing_saes(specs, progress)
    for number, (spec, n_bytes) in enumerate(missing.items(), 1):
        progress(f"Downloading SAE {number} of {len(missing)}: {spec.name}, {n_bytes / GIB:.2f} GiB")
        fetch_sae(spec)
    return bool(missing)


def missing_saes(specs: Sequence[SourceSpec], progress: Callable[[str], None]) -> dict[SourceSpec, int]:
    """SAEs whose files are not here, and the bytes of those; what they come to is said.

    Raises StartupError where the hub has not what is needed, or the disk would not hold it.
    """
    missing = [spec for spec in specs if not is_here(spec)]
    if not missing:
        return {}
    check_hub(hub_location(missing[0])[0], "SAE_SETS")
    listed = cache(hub_files)
    sizes = [missing_sizes(spec, listed) for spec in missing]
    found = dict(zip(missing, (sum(one.values()) for one in sizes), strict=True))
    progress(f"{len(missing)} SAEs are not on this machine: {sum(found.values()) / GIB:.2f} GiB to download")
    check_disk(sum(map(disk_bytes, sizes)))
    return found


def fetch_sae(spec: SourceSpec) -> None:
    """Raises StartupError, one line."""
    repo, path = hub_location(spec)
    first, *others = loaders_of(spec)
    loader = _loader_on_hub(spec, hub_files(repo)) if others else first
    download(repo, all_files(loader, path), f"SAE {spec.name!r}")


def missing_sizes(spec: SourceSpec, listed: Callable[[str], Mapping[str, int]] | None = None) -> dict[str, int]:
    """Bytes of the files of an SAE that are not here, by name.

    listed: instead of `hub_files`, to ask for each repository once. Raises StartupError where the hub has not what is
    needed.
    """
    repo, path = hub_location(spec)
    files, there = (listed or hub_files)(repo), cached(repo)
    wanted = [name for name in all_files(_loader_on_hub(spec, files), path) if name in files]
    return {name: files[name] for name in wanted if there is None or not (there / name).exists()}


def _loader_on_hub(spec: SourceSpec, files: Mapping[str, int]) -> str | None:
    """The format of an SAE by the files that its repository lists. Raises StartupError where some are missing."""
    repo, path = hub_location(spec)
    try:
        return loader_among(spec, path, files.__contains__)
    except LookupError:
        missing = next(name for name in needed_files(loaders_of(spec)[0], path) if name not in files)
        raise StartupError(f"SAE {spec.name!r}: {repo!r} lists no {missing!r}.") from None


def disk_bytes(sizes: Mapping[str, int]) -> int:
    """What files of an SAE take on disk once it is used: those in other formats are there twice."""
    return sum(size * (2 if is_converted(name) else 1) for name, size in sizes.items())


def check_disk(n_bytes: int) -> None:
    """Raises StartupError where the hub's cache has no room for so many more bytes."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free - DISK_LEFT
    if n_bytes > free:
        raise StartupError(
            f"{n_bytes / GIB:.2f} GiB of SAEs do not fit on the disk of {constants.HF_HUB_CACHE!r}, which has "
            f"{max(0, free) / GIB:.2f} GiB beside one that is left free. HF_HOME names a folder on another disk."
        )


def hub_files(repo: str) -> dict[str, int]:
    """Every file of a repository on the hub: bytes by name. Raises StartupError."""
    from huggingface_hub import HfApi

    with asking(repo):
        siblings = HfApi().model_info(repo, files_metadata=True).siblings or []
    return {one.rfilename: one.size or 0 for one in siblings}


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """The hub's errors, and those of the way there, as one line."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    # httpx2 is the hub client's transport; without a route it raises its own errors.
    try:
        yield
    except (OSError, ValueError, HTTPError, NotASafetensorsRepoError, SafetensorsParsingError) as exc:
        raise StartupError(f"The hub's metadata of {repo!r} cannot be read: {_first_line(exc)}") from None


def check_hub(repo: str, setting: str, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raises StartupError, one line that says what to set, where the hub cannot be reached or has no such repository.

    One request, where libraries would try each file again for a minute. A hub that is there and has trouble of its own
    is left to them. setting: its name, for the message. options: `revision` and `token`.
    """
    from httpx2 import ConnectError, ConnectTimeout, HTTPError
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    is_not_here = f"{setting}: {repo!r} is not on this machine"
    near = did_you_mean(repo, (*all_names(), *folders_beside(repo)))
    if constants.HF_HUB_OFFLINE:
        raise StartupError(
            f"{is_not_here} (HF_HOME is {constants.HF_HOME!r}), and HF_HUB_OFFLINE keeps off the hub.{near}"
        )
    try:
        url = hf_hub_url(repo, "config.json", revision=options.get("revision"))
        get_hf_file_metadata(url, timeout=HUB_S, token=options.get("token"))
    except errors.GatedRepoError:
        raise StartupError(
            f"{setting}: {repo!r} is gated: accept its terms on its page on the hub, and give your token in HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        revision = options.get("revision")
        raise StartupError(f"MODEL_FROM_PRETRAINED_KWARGS: {repo!r} has no revision {revision!r} on the hub.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise StartupError(f"{setting}: the hub has no {repo!r}, or HF_TOKEN may not read it.{near}") from None
    except (ConnectError, ConnectTimeout) as exc:
        raise StartupError(
            f"{is_not_here}, and the hub at {constants.ENDPOINT} cannot be asked: {_first_line(exc)}. Bring the files "
            "here (HF_HOME names the folder that holds them), give a local folder, or set HF_ENDPOINT to a mirror."
            f"{near}"
        ) from None
    except (OSError, HTTPError) as exc:  # also a repository that has no such file
        log.debug("the hub was asked for %s: %s", repo, _first_line(exc))


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


def download(repo: str, files: Sequence[str], what: str, how: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """how: more arguments for the hub's client."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    # httpx2 is the hub client's transport; without a route it raises its own errors.
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files), **how))
    except (OSError, ValueError, HTTPError) as exc:
        raise StartupError(f"Cannot download {what}: {_first_line(exc)}") from None


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def _is_complete(folder: Path, gguf_file: str | None = None) -> bool:
    """Whether configuration, tokenizer and all parts of the weights are there: a download may have been cut off."""
    if gguf_file is not None:
        return (folder / gguf_file).exists()
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if path.exists()}
    if "config.json" not in names or names.isdisjoint(TOKENIZER_FILES):
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
