"""Loading a Hugging Face causal language model and its tokenizer, or one line that says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from neuronpedia_inference.errors import StartupError

_LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What libraries raise of files that are missing, broken, or hold something else than they should."""


def pick_device(wanted: str) -> str:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises StartupError for a device that is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[kind]:
        raise StartupError(f"DEVICE is {wanted!r}, but this machine has no {kind} device. Use auto or cpu.")
    number = wanted.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{n}" for n in range(torch.cuda.device_count()))
        raise StartupError(f"DEVICE is {wanted!r}, but this machine has {there} only.")
    return wanted


def load_weights(where: str, *, dtype: str, device: str, options: dict[str, Any]) -> PreTrainedModel:
    """where: local folder or Hugging Face name; dtype: "auto" or a torch dtype's name; options: more arguments.

    Safetensors only. Raises StartupError when files are missing, corrupt or incomplete: a weight that the checkpoint
    lacks would be made up at random.
    """
    transformers_logging.disable_progress_bar()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        **options,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if "gguf_file" in options:
        del arguments["use_safetensors"]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, **arguments)
    except _LOAD_ERRORS as exc:
        raise StartupError(f"Cannot load the model {where!r}: {first_line(exc)}{_culprit(where)}") from exc
    model, report = loaded
    lacking = sorted(report.get("missing_keys", ())) + sorted(str(k) for k in report.get("mismatched_keys", ()))
    if lacking:
        raise StartupError(f"The weights of {where!r} are incomplete: {len(lacking)} missing, {lacking[0]} first.")
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(where: str) -> PreTrainedTokenizerBase:
    """Raises StartupError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(where)
    except _LOAD_ERRORS as exc:
        raise StartupError(f"Cannot load the tokenizer of {where!r}: {first_line(exc)}") from exc


def first_line(exc: BaseException) -> str:
    """The gist of an error on one line: its first, and the next where the first introduces it."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))


def _culprit(where: str) -> str:
    """The first weights file that cannot be read, if that is what is wrong."""
    try:
        folder = Path(where) if Path(where).is_dir() else Path(snapshot_download(where, local_files_only=True))
    except (OSError, ValueError):
        return ""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                continue
        except (OSError, SafetensorError):
            return f" (file {file})"
    return "" if files else f" ({folder} holds no *.safetensors file)"
