"""How much memory a model and its SAEs need, and the smallest GPU of Modal that has it. Nothing is loaded.

    weights   parameters × bytes of MODEL_DTYPE
    SAEs      numbers × bytes of SAE_DTYPE, all sources, at most MAX_LOADED_SAES of them
    cache     2 × layers × key-value heads × d_head × MAX_TOKENS × generating rows × bytes of MODEL_DTYPE
    headroom  1.5 GiB for the CUDA context and libraries, and a tenth of the rest for activations and fragmentation

The headroom is a rule of thumb; everything else is counted.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.catalogue import WEIGHTS_NAME, SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.names import hugging_face_name
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.settings import Settings

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CONTEXT_BYTES = 3 * GIB // 2
HEADROOM_SHARE = 0.1
STORED_BYTES = 4
"""SAEs on the hub are nearly always stored in float32."""

GPUS = {
    "T4": 16,
    "L4": 24,
    "A10": 24,
    "L40S": 48,
    "A100-40GB": 40,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""Modal's GPUs and their memory in GB, from the cheapest to the dearest."""


@dataclass(frozen=True)
class Needs:
    """Bytes, for one pair of precisions."""

    model_dtype: str
    sae_dtype: str
    weights: int
    saes: int
    cache: int

    @property
    def headroom(self) -> int:
        return CONTEXT_BYTES + int(HEADROOM_SHARE * (self.weights + self.saes + self.cache))

    @property
    def total(self) -> int:
        return self.weights + self.saes + self.cache + self.headroom

    @property
    def gpu(self) -> str | None:
        """The cheapest GPU that has the memory; None if a single one is not enough."""
        return next((name for name, gigabytes in GPUS.items() if self.total <= gigabytes * 10**9), None)


@dataclass(frozen=True)
class Sizes:
    """What is counted, in numbers and not in bytes."""

    parameters: int
    cache_numbers: int
    sae_numbers: int
    n_sources: int

    def needs(self, model_dtype: str, sae_dtype: str) -> Needs:
        model, sae = BYTES[model_dtype], BYTES[sae_dtype]
        return Needs(
            model_dtype, sae_dtype, self.parameters * model, self.sae_numbers * sae, self.cache_numbers * model
        )


def sizes(settings: Settings) -> Sizes:
    """Counted from files on this machine, or from the hub's metadata. Raises StartupError."""
    specs = resolve(settings).specs
    parameters, config = _model(settings)
    per_source = [_sae_numbers(spec) for spec in specs]
    largest = sorted(per_source, reverse=True)[: settings.max_loaded_saes]
    return Sizes(parameters, _cache_numbers(config, settings), sum(largest), len(specs))


def tensor_numbers(file: Path) -> int:
    """Numbers in a safetensors file, from its header. Raises StartupError."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 2**28)))
        return sum(prod(about["shape"]) for name, about in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, struct.error) as exc:
        raise StartupError(f"{str(file)!r} cannot be read as safetensors: {exc}") from None


def _model(settings: Settings) -> tuple[int, dict[str, Any]]:
    """Parameters and configuration."""
    from neuronpedia_inference.embedded.weights import model_folder

    folder = model_folder() if settings.is_embedded else Path(settings.weights_id).expanduser()
    if not folder.is_dir():
        return _hub_model(hugging_face_name(settings.weights_id))
    files = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not files or not config.is_file():
        raise StartupError(f"{str(folder)!r} holds no model: it needs config.json and *.safetensors.")
    return sum(map(tensor_numbers, files)), json.loads(config.read_text(encoding="utf-8"))


def _hub_model(repo: str) -> tuple[int, dict[str, Any]]:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        parameters = sum(get_safetensors_metadata(repo).parameter_count.values())
        return parameters, json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise _unreachable(repo, exc) from None


def _sae_numbers(spec: SourceSpec) -> int:
    if spec.folder is not None:
        return tensor_numbers(spec.folder / WEIGHTS_NAME)
    repo, path = hub_location(spec)
    stored = sum(size for name, size in _hub_files(repo).items() if name.startswith(path))
    return stored // STORED_BYTES


def _hub_files(repo: str) -> dict[str, int]:
    """Size in bytes by name."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repo, files_metadata=True).siblings or []
    except (OSError, ValueError) as exc:
        raise _unreachable(repo, exc) from None
    return {one.rfilename: one.size or 0 for one in siblings}


def _unreachable(repo: str, exc: Exception) -> StartupError:
    why = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return StartupError(f"The hub's metadata of {repo!r} cannot be read: {why}")


def _cache_numbers(config: dict[str, Any], settings: Settings) -> int:
    """Keys and values of all rows at full length."""
    text = config.get("text_config", config)
    n_layers = text.get("num_hidden_layers") or text["n_layer"]
    n_heads = text.get("num_attention_heads") or text["n_head"]
    width = text.get("hidden_size") or text["n_embd"]
    d_head = text.get("head_dim") or width // n_heads
    n_kv_heads = text.get("num_key_value_heads") or n_heads
    return 2 * n_layers * n_kv_heads * d_head * settings.max_tokens * Limits().max_rows
