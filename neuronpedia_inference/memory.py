"""How much memory a model and its SAEs need, and the smallest GPU of Modal that has it. Nothing is loaded.

    weights   parameters × bytes of MODEL_DTYPE; of quantised weights the bytes in their files
    SAEs      numbers × bytes of SAE_DTYPE, all sources, at most MAX_LOADED_SAES of them, at most SAE_MEMORY_GIB: once
              all features of all have been asked for; until then, and for single features, less
    cache     2 × layers × key-value heads × d_head × MAX_TOKENS × MAX_ROWS × bytes of MODEL_DTYPE
    headroom  1.5 GiB for the CUDA context and libraries, and a tenth of the rest for activations and fragmentation

The headroom is a rule of thumb; everything else is counted.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from neuronpedia_inference import downloads
from neuronpedia_inference.costs import ITEM_BYTES, cache_numbers
from neuronpedia_inference.engine.quantised import method_of
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.load_options import without_places
from neuronpedia_inference.saes.catalogue import SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.files import files_of
from neuronpedia_inference.saes.names import hugging_face_name
from neuronpedia_inference.saes.originals import counted_files, loader_among, loaders_of
from neuronpedia_inference.settings import Settings

GIB = 2**30
CONTEXT_BYTES = 3 * GIB // 2
HEADROOM_SHARE = 0.1
STORED_BYTES = 4
"""Of a number in the hub's SAEs that are not safetensors: they are stored in float32."""
MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Tensors of old GPT-2 and GPT-NeoX checkpoints that are no parameters, and are not loaded."""

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
    def one_by_one(self) -> Needs:
        """The same where features are read one by one, from their files: no SAE is in memory."""
        return replace(self, saes=0)

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
    packed_bytes: int | None = None
    """Of quantised weights, which MODEL_DTYPE does not change."""
    sae_budget: int | None = None
    """Bytes that SAEs may take together: some leave when others are asked for."""

    def needs(self, model_dtype: str, sae_dtype: str) -> Needs:
        model, sae = ITEM_BYTES[model_dtype], item_bytes(sae_dtype)
        weights = self.parameters * model if self.packed_bytes is None else self.packed_bytes
        saes = self.sae_numbers * sae
        resident = saes if self.sae_budget is None else min(saes, self.sae_budget)
        return Needs(model_dtype, sae_dtype, weights, resident, self.cache_numbers * model)


@dataclass(frozen=True)
class _Counted:
    """A model by its files."""

    parameters: int
    n_bytes: int
    config: dict[str, Any]

    @property
    def packed_bytes(self) -> int | None:
        return self.n_bytes if method_of(self.config, {}) else None

    @property
    def text_config(self) -> dict[str, Any]:
        """Of the text's part, where there are others; what only the whole says holds for the part."""
        return {**self.config, **self.config.get("text_config", {})}


def item_bytes(sae_dtype: str) -> int:
    """Of a number in SAE_DTYPE; `auto` takes no more than float32."""
    return ITEM_BYTES.get(sae_dtype, STORED_BYTES)


def sizes(settings: Settings) -> Sizes:
    """Counted from files on this machine, or from the hub's metadata. Raises StartupError."""
    return _sizes(settings, resolve(settings).specs, _model(settings))


def planned(settings: Settings) -> Needs:
    """Everything, in the precisions of the settings. Raises StartupError."""
    specs = resolve(settings).specs
    model = _model(settings)
    return _sizes(settings, specs, model).needs(_dtype(model.text_config, settings), settings.sae_dtype)


def _sizes(settings: Settings, specs: Sequence[SourceSpec], model: _Counted) -> Sizes:
    largest = sorted(sae_numbers(specs), reverse=True)[: settings.max_loaded_saes]
    return Sizes(
        model.parameters,
        _cache_numbers(model.text_config, settings),
        sum(largest),
        len(specs),
        model.packed_bytes,
        None if settings.sae_memory_gib is None else int(settings.sae_memory_gib * GIB),
    )


def needs_at_start(settings: Settings) -> Needs | None:
    """What must fit for the model to be served at all: its weights, and the cache of one row.

    SAEs are left out: they can take turns, and are judged one by one when they are loaded. None where files and hub
    do not tell, or where options change what is loaded.
    """
    if without_places(settings.model_from_pretrained_kwargs):
        return None
    try:
        model = _model(settings)
        if model.packed_bytes is not None:  # without a GPU some of it is widened
            return None
        cache = _cache_numbers(model.text_config, settings) // settings.max_rows
        return Sizes(model.parameters, cache, 0, 0).needs(_dtype(model.text_config, settings), settings.sae_dtype)
    except StartupError:
        return None


def _dtype(config: dict[str, Any], settings: Settings) -> str:
    """The precision of the loaded weights."""
    if settings.model_dtype != "auto":
        return settings.model_dtype
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if own not in ITEM_BYTES:
        raise StartupError(f"The weights of {settings.weights_id!r} are in {own!r}: MODEL_DTYPE chooses another.")
    return own


def tensor_numbers(file: Path) -> int:
    """Parameters in a safetensors file, from its header. Raises StartupError."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 2**28)))
        return _numbers({name: about["shape"] for name, about in header.items() if name != "__metadata__"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
        raise StartupError(f"{str(file)!r} cannot be read as safetensors: {exc}") from None


def _numbers(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(prod(shape) for name, shape in shapes.items() if MASKS.search(name) is None)


def _model(settings: Settings) -> _Counted:
    options = settings.model_from_pretrained_kwargs
    if "gguf_file" in options:
        raise StartupError(f"The weights of {settings.weights_id!r} are a GGUF file: only safetensors are counted.")
    if "quantization_config" in options:
        raise StartupError(f"The weights of {settings.weights_id!r} are to be quantised while loading: not counted.")
    folder = downloads.found(settings)
    if folder is None:
        return _hub_model(hugging_face_name(settings.weights_id), options)
    files = downloads.weight_files(folder)
    config = folder / "config.json"
    if not files or not config.is_file():
        raise StartupError(f"{str(folder)!r} holds no model: it needs config.json and *.safetensors.")
    n_bytes = sum(file.stat().st_size for file in files)
    return _Counted(sum(map(tensor_numbers, files)), n_bytes, _config(config))


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config.get("text_config", {}), dict):
            raise ValueError("its text_config is no object")
        return config
    except (OSError, ValueError, AttributeError) as exc:
        raise StartupError(f"{str(file)!r} cannot be read: {exc}") from None


def _hub_model(repo: str, options: Mapping[str, Any]) -> _Counted:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    if options.get("subfolder"):
        raise StartupError(f"{repo!r} is counted on the hub without subfolders only: fetch its files first.")
    how = {name: options[name] for name in ("revision", "token") if name in options}
    with downloads.asking(repo):
        files = get_safetensors_metadata(repo, **how).files_metadata.values()
        config = Path(hf_hub_download(repo, "config.json", **how))
    shapes = [{name: tensor.shape for name, tensor in file.tensors.items()} for file in files]
    n_bytes = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for file in files for tensor in file.tensors.values())
    return _Counted(sum(map(_numbers, shapes)), n_bytes, _config(config))


def sae_numbers(specs: Sequence[SourceSpec]) -> list[int]:
    """Numbers of each source, once it is in memory.

    On the hub, files of one size in one repository are alike, so one header is read.
    """
    hub_files = cache(downloads.hub_files)
    known: dict[tuple[str, int], int] = {}
    numbers = []
    for spec in specs:
        here = files_of(spec)
        if here is not None:
            names, times = counted_files(here.loader, here.path)
            numbers.append(times * sum(_file_numbers(here.root / name) for name in names))
            continue
        repo, path = hub_location(spec)
        names, times = counted_files(_listed_loader(spec, path, hub_files(repo)), path)
        files = {name: hub_files(repo)[name] for name in names if name in hub_files(repo)}
        if not files:
            raise StartupError(f"SAE {spec.name!r}: {repo!r} lists no weights under {path!r}.")
        for name, size in files.items():
            if (repo, size) not in known:
                known[repo, size] = _hub_numbers(repo, name, size)
        numbers.append(times * sum(known[repo, size] for size in files.values()))
    return numbers


def _listed_loader(spec: SourceSpec, path: str, listed: Mapping[str, int]) -> str | None:
    try:
        return loader_among(spec, path, listed.__contains__)
    except LookupError:
        return loaders_of(spec)[0]


def _file_numbers(file: Path) -> int:
    return tensor_numbers(file) if file.suffix == ".safetensors" else file.stat().st_size // STORED_BYTES


def _hub_numbers(repo: str, name: str, size: int) -> int:
    """Numbers in one SAE file."""
    from huggingface_hub import parse_safetensors_file_metadata

    if not name.endswith(".safetensors"):
        return size // STORED_BYTES
    with downloads.asking(repo):
        return sum(parse_safetensors_file_metadata(repo, name).parameter_count.values())


def _cache_numbers(config: dict[str, Any], settings: Settings) -> int:
    """Keys and values of all rows at full length."""
    try:
        n_layers = config.get("num_hidden_layers") or config["n_layer"]
        n_heads = config.get("num_attention_heads") or config["n_head"]
        width = config.get("hidden_size") or config["n_embd"]
    except KeyError as exc:
        raise StartupError(f"The configuration of {settings.weights_id!r} has no {exc.args[0]!r}.") from None
    d_head = config.get("head_dim") or width // n_heads
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    return cache_numbers(n_layers, n_kv_heads, d_head) * settings.max_tokens * settings.max_rows
