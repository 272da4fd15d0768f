"""What a loaded model can be asked for, place by place, as plain data that can be kept from one start to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from neuronpedia_inference import kept
from neuronpedia_inference.points import Point

FORMAT = 4
"""Changes with the meaning of what is kept."""
_NUMBERS = 8
"""Of every tensor, to know the weights again."""


@dataclass(frozen=True)
class Finding:
    """One point."""

    width: int = 0
    """Numbers per position, heads concatenated."""
    which: int = 0
    """Of the point's candidates."""
    unread_because: str = ""
    """Empty if it can be read."""
    unwritten_because: str = ""
    """Empty if it can be steered."""
    norm: float = 0.0
    """Of what is there, where it can be steered: the median over tokens from all over the vocabulary. 0: unknown."""


@dataclass(frozen=True)
class Verdict:
    """What a probe has found."""

    findings: Mapping[Point, Finding] = field(default_factory=dict)
    mask_form: str = ""
    """How merged decode steps are masked; a `cache.MaskForm`."""
    unmerged_because: str = ""
    """Empty if rows of different requests may decode together, and prompts run in pieces."""
    uncaptured_because: str = ""
    """Empty if prompts of different length may share a pass that is only read."""
    unrecorded_because: str = ""
    """Empty if decode steps can be recorded."""
    n_value_heads: int = 0
    """Of attention's values, where they can be read."""
    no_lens_because: str = ""
    """Empty if the residual stream can be read out behind any block."""

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        findings = {point.name: asdict(finding) for point, finding in self.findings.items()}
        return {**vars(self), "findings": findings}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Verdict:
        """Raises KeyError, TypeError, ValueError or AttributeError for what `to_json` has not made."""
        findings = {_point(name): Finding(**finding) for name, finding in body["findings"].items()}
        return cls(**{**body, "findings": findings})


class VerdictFile:
    """The verdict on one model, kept in a folder by all that it depends on."""

    def __init__(self, folder: Path, model: PreTrainedModel, *limits: object) -> None:
        """`limits`: what else the verdict depends on."""
        self._path = folder / f"verdict-{_key(model, *limits)}.json"

    def read(self) -> Verdict | None:
        """None where there is none that can be read."""
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            return Verdict.from_json(kept.read(self._path))
        return None

    def write(self, verdict: Verdict) -> None:
        """A folder that cannot be written to makes the next start as slow as this one."""
        kept.write(self._path, verdict.to_json())


def _key(model: PreTrainedModel, *limits: object) -> str:
    """Of weights, configuration, versions, device and limits."""
    versions = (torch.__version__, transformers.__version__, version("transformer-lens"), FORMAT)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    config: Any = model.config
    found = hashlib.sha256(repr((*versions, device, config._attn_implementation, *limits)).encode())
    found.update(config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(repr(tensor.flatten()[:_NUMBERS].tolist()).encode())
    return found.hexdigest()[:24]


def _point(name: str) -> Point:
    """Of any name that `Point.name` gives, also of places that callers cannot name."""
    _, layer, place = name.split(".", 2)
    return Point(int(layer), place)
