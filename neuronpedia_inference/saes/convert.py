"""SAEs in formats of numpy and torch, rewritten once as SAELens writes them: then their features are read one by one.

They are read by SAELens, with loaders that execute nothing that is in a file.
"""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import save_file

from neuronpedia_inference.embedded.weights import default_cache_dir
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes import foreign, saelens
from neuronpedia_inference.saes.files import Files, files_of
from neuronpedia_inference.saes.originals import FOREIGN
from neuronpedia_inference.saes.reading import UNREADABLE, line
from neuronpedia_inference.saes.specs import CONFIG_NAME, WEIGHTS_NAME, SourceSpec

FORM = 1
"""Of the copies: another number when they change."""


def converted_folder(spec: SourceSpec, files: Files) -> Path:
    """Where the copy is, or would be. It is another where the original is another."""
    versions = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files.weights]
    key = hashlib.sha256(repr((FORM, spec.repo or str(files.root), files.path, versions)).encode()).hexdigest()[:24]
    return default_cache_dir() / "saes" / key


def convert(spec: SourceSpec) -> Path:
    """The folder with the copy, made if it is not there. Raises StartupError."""
    files = files_of(spec)
    if files is None:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} is not on this machine.")
    folder = converted_folder(spec, files)
    try:
        if not folder.is_dir():
            dtype = _precision(files.weights[0])
            is_foreign = files.loader in FOREIGN
            _write(foreign.sae_in(files, dtype) if is_foreign else saelens.sae_on_hub(spec, dtype), folder)
    except UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} could not be rewritten: {line(exc)}") from exc
    return folder


def _write(module: Any, folder: Path) -> None:
    """At once and whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        save_file({name: t.detach().contiguous() for name, t in module.state_dict().items()}, made / WEIGHTS_NAME)
        config = module.cfg.to_dict()
        config["metadata"]["sae_lens_version"] = saelens.version()
        (made / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process was faster
                raise


def _precision(file: Path) -> str:
    """The least that holds all of the file; SAELens reads numpy's files as float32."""
    if file.suffix == ".npz":
        return "float32"
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    dtypes = [t.dtype for t in tensors.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")
