"""Loading one SAE with SAELens: checked, decoder norms folded in, in host memory; and copying it to a device."""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import OutOfMemory, StartupError
from neuronpedia_inference.saes.encode import ACROSS_LAYERS, FeatureReader, LoadedSae
from neuronpedia_inference.saes.originals import loader_of
from neuronpedia_inference.saes.plain import PlainSae, load_plain, plain_config
from neuronpedia_inference.saes.specs import CONFIG_NAME, WEIGHTS_NAME, SourceSpec

SERVED = frozenset(
    (
        "standard",
        "gated",
        "topk",
        "abstopk",
        "jumprelu",
        "matching_pursuit",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    )
)
"""Architectures that encode each position by itself; `temporal` attends to earlier ones."""

_RUN_TIME_NORMALISATION = ("none", "layer_norm", "constant_norm_rescale")
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
)


class Load(Protocol):
    def __call__(self, spec: SourceSpec, /, *, dtype: str, device: str) -> FeatureReader: ...


class Masters:
    """SAEs in host memory, read when first fetched. At most `most` are kept (0: none), the last fetched of them."""

    def __init__(self, load: Load, *, dtype: str, pinned: bool, most: int) -> None:
        self._load = load
        self._dtype = dtype
        self._pinned = pinned
        self._most = most
        self._kept: OrderedDict[str, FeatureReader] = OrderedDict()
        self.n_loads = 0
        """From disk, so far."""

    def __len__(self) -> int:
        return len(self._kept)

    def fetch(self, spec: SourceSpec) -> FeatureReader:
        """Raises what `load` raises. Never from two threads at once."""
        master = self._kept.pop(spec.name, None) or self._read(spec)
        if self._most:
            self._kept[spec.name] = master
        return master

    def _read(self, spec: SourceSpec) -> FeatureReader:
        while self._kept and len(self._kept) >= self._most:
            self._kept.popitem(last=False)[1].free()
        master = self._load(spec, dtype=self._dtype, device="cpu")
        self.n_loads += 1
        if self._pinned:
            pin(master)
        return master


def load_sae(spec: SourceSpec, *, dtype: str, device: str) -> LoadedSae:
    """Load the SAE that `spec` names, in `dtype` ("float32", ...), onto `device`.

    Raises StartupError as `load_on_host` does, OutOfMemory as `place_on_device` does.
    """
    master = load_on_host(spec, dtype=dtype)
    return master if device == "cpu" else _copy(master, device)


def load_on_host(spec: SourceSpec, *, dtype: str) -> LoadedSae:
    """The SAE that `spec` names, in host memory.

    Raises StartupError, one line naming the source and the file or the architecture, if the SAE is missing,
    broken or of a kind that is not served.
    """
    module = _from_folder(spec, spec.folder, dtype) if spec.folder else _from_hub(spec, dtype)
    source = _describe(spec, module)
    _fold_decoder_norms(module)
    return LoadedSae(source, _only_read(module))


def place_on_device(master: FeatureReader, device: str) -> FeatureReader:
    """A copy whose weights are on `device`; the two share no memory. Raises OutOfMemory, naming the source."""
    return _copy(master, device) if isinstance(master, LoadedSae) else master


def pin(master: FeatureReader) -> None:
    """Lock the weights in host memory, from where CUDA copies them fastest. Where that cannot be, they stay as is."""
    if isinstance(master, LoadedSae):
        with suppress(RuntimeError):
            for weights in (*master.module.parameters(), *master.module.buffers()):
                weights.data = weights.data.pin_memory()


def stored_bytes(spec: SourceSpec, dtype: str) -> int:
    """What the SAE in a folder will take in `dtype`, by the header of its file; 0 where there is none to be read."""
    if spec.folder is None:
        return 0
    try:
        with safe_open(spec.folder / WEIGHTS_NAME, framework="pt") as file:
            numbers = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return 0
    return numbers * getattr(torch, dtype).itemsize


def _copy(master: LoadedSae, device: str) -> LoadedSae:
    # A new module, not a deep copy: functions in the old one may hold it, and would write to it when the copy is used.
    if isinstance(master.module, PlainSae):
        module: Any = PlainSae(master.module.cfg)
    else:
        config = deepcopy(master.module.cfg)
        config.device = "meta"
        with _without_model_advice():
            module = type(master.module)(config)
    module.load_state_dict(_weights_on(device, master), assign=True)
    module.to(device=device)
    return LoadedSae(master.source, _only_read(module))


def _weights_on(device: str, master: LoadedSae) -> dict[str, torch.Tensor]:
    weights = master.module.state_dict()
    try:
        with _beside_the_model(device) as non_blocking:
            return {name: w.to(device, copy=True, non_blocking=non_blocking) for name, w in weights.items()}
    except torch.OutOfMemoryError as exc:
        size = master.n_bytes / 2**30
        raise OutOfMemory(
            f"The device has no {size:.3g} GiB left for source {master.source.name!r}. Try again soon."
        ) from exc


@contextmanager
def _beside_the_model(device: str) -> Iterator[bool]:
    """Copies inside do not hold up the model's own work on a CUDA device; yields whether they may run on by themselves.

    They have ended when the block has.
    """
    if torch.device(device).type != "cuda":
        yield False
        return
    stream = _copy_stream(device)
    # The memory they get may be that of an SAE which has left, and which work queued before still reads.
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield True
    stream.synchronize()


@cache
def _copy_stream(device: str) -> torch.cuda.Stream:
    """One for all: memory given back by one stream is not used by another."""
    return torch.cuda.Stream(device)


def _only_read(module: Any) -> Any:
    """The module as it is used here: encoding flat vectors, never trained."""
    if not isinstance(module, PlainSae):
        module.turn_off_forward_pass_hook_z_reshaping()
    return module.eval().requires_grad_(False)


def _from_folder(spec: SourceSpec, folder: Path, dtype: str) -> Any:
    config = _read_config(spec, folder / CONFIG_NAME)
    _check_architecture(spec, str(config.get("architecture", "standard")))
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise StartupError(f"SAE {spec.name!r}: {str(weights)!r} is missing.")
    plain = plain_config(config)
    try:
        return (plain and load_plain(plain, weights, dtype)) or _by_saelens(folder, dtype)
    except _UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(weights)!r} could not be read: {_line(exc)}") from exc


def _by_saelens(folder: Path, dtype: str) -> Any:
    from sae_lens import SAE

    with _without_model_advice():
        return SAE.load_from_disk(folder, device="cpu", dtype=dtype)


def _read_config(spec: SourceSpec, config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except FileNotFoundError:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} is missing.") from None
    except (OSError, ValueError) as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} could not be read: {_line(exc)}") from exc


def _from_hub(spec: SourceSpec, dtype: str) -> Any:
    from sae_lens import SAE

    # To SAELens a repository that is in no release is a release of its own.
    release, sae_id = spec.release or spec.repo, spec.sae_id or spec.path
    assert release is not None, spec
    assert sae_id is not None, spec
    try:
        with _without_model_advice(), _headers_from_files():
            module = SAE.from_pretrained(release, sae_id, device="cpu", dtype=dtype)
    except _UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} could not be fetched or read: {_line(exc)}") from exc
    _check_architecture(spec, module.cfg.architecture())
    return module


def _check_architecture(spec: SourceSpec, architecture: str) -> None:
    if architecture not in SERVED:
        raise StartupError(
            f"SAE {spec.name!r} has the architecture {architecture!r}, which is not served "
            f"({', '.join(sorted(SERVED))} are); EXCLUDE_SAE leaves it out."
        )


def _describe(spec: SourceSpec, module: Any) -> Source:
    config = module.cfg
    # SAELens's metadata answers None for any name, so only what is written there counts.
    metadata = config.metadata if isinstance(module, PlainSae) else config.metadata.to_dict()
    hook = metadata.get("hook_name")
    layer = re.search(r"(?:^|\.)blocks\.(\d+)\.", hook) if isinstance(hook, str) else None
    if not isinstance(hook, str) or layer is None:
        raise StartupError(f"SAE {spec.name!r}: its metadata has no hook_name with a layer, but {hook!r}.")
    if metadata.get("hook_head_index") is not None:
        raise StartupError(f"SAE {spec.name!r} reads one attention head of {hook!r}, which is not served.")
    if config.normalize_activations not in _RUN_TIME_NORMALISATION:
        raise StartupError(f"SAE {spec.name!r}: {config.normalize_activations!r} of its input is not folded in.")
    return Source(
        name=spec.name,
        source_set=spec.source_set,
        layer=int(layer.group(1)),
        hook=hook,
        n_features=config.d_sae,
        width=config.d_in,
        architecture=_architecture(spec, config),
        has_dfa=hook.endswith("hook_z") and _reads_attention(spec, metadata.get("neuronpedia_id")),
    )


def _architecture(spec: SourceSpec, config: Any) -> str:
    """What SAELens says, but for one layer of a cross-layer transcoder, which it loads as a transcoder of its own."""
    is_one_layer = loader_of(spec) == "mntss_clt_layer_transcoder"
    return ACROSS_LAYERS if is_one_layer else config.architecture()


def _reads_attention(spec: SourceSpec, written_id: Any) -> bool:
    for name in (spec.neuronpedia_id, written_id, f"/{spec.name}" if spec.release else None):
        if isinstance(name, str) and re.search(r"-att[-_]", name):
            return True
    return spec.folder is not None and "att" in spec.name


def _fold_decoder_norms(module: Any) -> None:
    """Give decoder rows unit norm and activations the old one, where that leaves the choice of features."""
    if module.cfg.architecture() == "matching_pursuit":
        return
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", True):
        module.fold_W_dec_norm()


@contextmanager
def _without_model_advice() -> Iterator[None]:
    """SAELens advises how to load the model of an SAE; that is decided elsewhere."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        yield


@contextmanager
def _headers_from_files() -> Iterator[None]:
    """Inside, SAELens reads shapes from files in the hub's cache, which it fetches whole anyway.

    For two formats its loaders would ask the hub for the header of a file even where that file is here.
    """
    from sae_lens.loading import pretrained_sae_loaders

    before = pretrained_sae_loaders.get_safetensors_tensor_shapes
    pretrained_sae_loaders.get_safetensors_tensor_shapes = _shapes_on_hub
    try:
        yield
    finally:
        pretrained_sae_loaders.get_safetensors_tensor_shapes = before


def _shapes_on_hub(repo_id: str, filename: str) -> dict[str, list[int]]:
    from huggingface_hub import hf_hub_download

    with safe_open(hf_hub_download(repo_id, filename), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
