"""What MODEL_FROM_PRETRAINED_KWARGS may hold, and which of it says where the files are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Where files are looked for. Nothing in them is left to do once these are in a folder of this machine."""
SHARED = (*PLACES, "code_revision", "gguf_file", "trust_remote_code")
"""What concerns the tokenizer too."""

_ONE_DEVICE = "a model is served whole on DEVICE"
_FILES_ONLY = "weights and configuration come from MODEL_ID's files"
_NO_EFFECT = "it has had no effect for long"
REFUSED: Mapping[str, str] = {
    "dtype": "MODEL_DTYPE says it",
    "torch_dtype": "MODEL_DTYPE says it",
    "device_map": _ONE_DEVICE,
    "max_memory": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_buffers": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "use_safetensors": "only safetensors are read, and GGUF with gguf_file: other formats can run code",
    "weights_only": "only safetensors are read, and GGUF with gguf_file",
    "config": _FILES_ONLY,
    "state_dict": _FILES_ONLY,
    "pretrained_model_name_or_path": _FILES_ONLY,
    "adapter_kwargs": "merge the adapter into the weights first",
    "adapter_name": "merge the adapter into the weights first",
    "output_loading_info": "it is always asked for",
    "return_unused_kwargs": "unused ones stop the start",
    "ignore_mismatched_sizes": "a weight of another size would be made up at random",
    "load_in_8bit": 'write {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}',
    "load_in_4bit": 'write {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}',
    "low_cpu_mem_usage": _NO_EFFECT,
    "mirror": _NO_EFFECT,
    "from_tf": _NO_EFFECT,
    "from_flax": _NO_EFFECT,
    "offload_state_dict": _NO_EFFECT,
}
"""Options of `from_pretrained` that are not taken, and why."""


def check(options: Mapping[str, Any]) -> None:
    """Raises ValueError, one line, for an option that is decided otherwise, or a file's place that is no text."""
    for name, value in options.items():
        why = REFUSED.get(name) or ("no option begins so" if name.startswith("_") else None)
        if why is not None:
            raise ValueError(f"{name!r} is not taken: {why}")
        if name in ("gguf_file", "revision", "subfolder", "cache_dir") and not (isinstance(value, str) and value):
            raise ValueError(f"{name!r} is {value!r}, but has to be a text that is not empty")


def of_tokenizer(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part that concerns the tokenizer too."""
    return {name: value for name, value in options.items() if name in SHARED}


def without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part that is left to say when the files are in a folder."""
    return {name: value for name, value in options.items() if name not in PLACES}
