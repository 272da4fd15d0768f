"""Checkpoints with quantised weights: which are loaded, by whose packages, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from neuronpedia_inference.errors import StartupError


@dataclass(frozen=True)
class Method:
    """One way to quantise, as transformers loads it."""

    name: str
    packages: tuple[str, ...]
    """That it needs beside transformers; module names, which are those of the packages too."""
    is_widened_without_gpu: bool = False
    """Without a GPU transformers turns its weights into bfloat16."""


METHODS: Mapping[str, Method] = {
    "bitsandbytes": Method("bitsandbytes", ("accelerate", "bitsandbytes")),
    "awq": Method("AWQ", ("accelerate", "gptqmodel")),
    "gptq": Method("GPTQ", ("optimum", "gptqmodel")),
    "fp8": Method("FP8", ("accelerate",), is_widened_without_gpu=True),
    "mxfp4": Method("MXFP4", ("accelerate",), is_widened_without_gpu=True),
}
"""By `quant_method` in a configuration."""


def method_of(config: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a checkpoint, or of options that quantise it while it is loaded; None for plain weights.

    config: as in `config.json`.
    """
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    for about in (config.get("quantization_config"), inner, options.get("quantization_config")):
        if isinstance(about, Mapping):
            is_old = bool(about.get("load_in_8bit") or about.get("load_in_4bit"))
            return "bitsandbytes" if is_old else str(about.get("quant_method"))
    return None


def check(model: str, method: str, device: str, *, has_gpu: bool) -> None:
    """Raises StartupError, one line, unless this method can be loaded here.

    model: its name, for the message. has_gpu: the machine, whatever the device.

    transformers passes over a method that it does not know, and reads packed numbers as if they were weights.
    """
    known = METHODS.get(method)
    if known is None:
        names = ", ".join(one.name for one in METHODS.values())
        raise StartupError(f"The weights of {model!r} are quantised by {method!r}, which is not served ({names} are).")
    missing = [package for package in known.packages if find_spec(package) is None]
    if missing:
        raise StartupError(
            f"The weights of {model!r} are quantised by {known.name}, which needs packages that are not installed: "
            f"pip install {' '.join(missing)}"
        )
    if known.is_widened_without_gpu and has_gpu and not device.startswith("cuda"):
        raise StartupError(
            f"The weights of {model!r} are quantised by {known.name}, for which transformers takes the GPU of this "
            f"machine, and DEVICE is {device!r}: set DEVICE=cuda, or hide the GPU with CUDA_VISIBLE_DEVICES=-1."
        )
