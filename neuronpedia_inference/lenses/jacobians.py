"""The Jacobians of a Jacobian lens: of some blocks, the mean derivative of the last block's output by theirs.

Files are safetensors, a matrix [d_out, d_in] a block, named by its number; or torch's as Neuronpedia publishes them, a
dictionary whose `J` has the matrices, which is read without executing anything that is in it and rewritten once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuronpedia_inference.errors import NoJacobianLens, StartupError

TORCH_FILES = (".pt", ".pth")
FORM = 1
"""Of the copies: another number when they change."""


@dataclass(frozen=True, eq=False)
class Jacobians:
    """Of one model, on its device; none of the last block, whose output is read out as it is."""

    by_layer: Mapping[int, Tensor] = field(default_factory=dict)
    """[d_model, d_model] each, in the precision of their file"""
    off_because: str = ""
    """Why there are none."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What the file says of itself."""

    @property
    def layers(self) -> list[int]:
        return sorted(self.by_layer)

    def check(self) -> None:
        """Raises NoJacobianLens where there are none."""
        if not self.by_layer:
            raise NoJacobianLens("Jacobian lens is not available for this model", self.off_because)


def read_jacobians(file: Path, *, n_layers: int, d_model: int, device: torch.device, cache_dir: Path) -> Jacobians:
    """Raises StartupError, one line, for a file that is none or does not fit the model."""
    try:
        path = _rewritten(file, cache_dir) if file.suffix in TORCH_FILES else file
        with safe_open(path, framework="pt") as stored:
            matrices = {_layer(name): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            about = dict(stored.metadata() or {})
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, UnpicklingError) as exc:
        why = " ".join(str(exc).split()) or type(exc).__name__
        raise StartupError(f"the Jacobians in {str(file)!r} cannot be read: {why[:300]}") from exc
    kept: dict[int, Tensor] = {}
    for layer, matrix in sorted(matrices.items()):
        if layer >= n_layers or tuple(matrix.shape) != (d_model, d_model):
            raise StartupError(
                f"the Jacobians in {str(file)!r} are of another model: block {layer} has one of shape "
                f"{list(matrix.shape)}, this model has blocks 0 to {n_layers - 1} of width {d_model}"
            )
        if not bool(matrix.isfinite().all()):
            raise StartupError(f"the Jacobians in {str(file)!r} hold numbers that are not finite, in block {layer}")
        if layer < n_layers - 1:
            kept[layer] = matrix.to(device, copy=True)  # the file's own are views of a mapping
    if not kept:
        raise StartupError(f"the Jacobians in {str(file)!r} are of no block but the last, which needs none")
    return Jacobians(kept, about=about)


def _layer(name: str) -> int:
    if not (name.isascii() and name.isdecimal()):
        raise ValueError(f"{name[:80]!r} is no number of a block")
    return int(name)


def _rewritten(file: Path, cache_dir: Path) -> Path:
    """The copy in safetensors, made if it is not there."""
    about = file.stat()
    key = hashlib.sha256(repr((FORM, file.name, about.st_size, about.st_mtime_ns)).encode()).hexdigest()[:24]
    copy = cache_dir / "lenses" / f"{key}.safetensors"
    if not copy.exists():
        stored: Any = torch.load(file, map_location="cpu", weights_only=True)
        matrices = {str(int(layer)): matrix.detach().contiguous() for layer, matrix in stored["J"].items()}
        copy.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=copy.parent) as beside:
            made = Path(beside) / copy.name
            save_file(matrices, made, {name: str(value) for name, value in stored.items() if name != "J"})
            made.replace(copy)
    return copy
