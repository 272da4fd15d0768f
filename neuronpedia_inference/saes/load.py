"""Loading one SAE whole: checked, decoder norms folded in, in host memory; and copying it to a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from neuronpedia_inference.domain import READ_BY_COLUMN
from neuronpedia_inference.errors import OutOfMemory, StartupError
from neuronpedia_inference.saes import foreign, saelens
from neuronpedia_inference.saes.asks import centred
from neuronpedia_inference.saes.describe import (
    check_architecture,
    config_of,
    folder_of,
    folds_norms,
    here,
    source_of,
)
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae
from neuronpedia_inference.saes.files import Files
from neuronpedia_inference.saes.originals import FOREIGN
from neuronpedia_inference.saes.plain import PlainConfig, PlainSae, load_plain
from neuronpedia_inference.saes.reading import UNREADABLE, line
from neuronpedia_inference.saes.specs import WEIGHTS_NAME, SourceSpec


class Load(Protocol):
    def __call__(self, spec: SourceSpec, /, *, dtype: str, device: str) -> FeatureReader: ...


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
    files = here(spec)
    folder = folder_of(spec, files)
    module = _from_folder(spec, files, folder, dtype) if folder is not None else _from_files(spec, files, dtype)
    source = source_of(spec, module.cfg)
    if source.architecture in READ_BY_COLUMN and not isinstance(module.activation_fn, torch.nn.ReLU):
        raise StartupError(f"SAE {spec.name!r}: its activation {module.activation_fn} is not ReLU, and is not served.")
    if source.is_centred:
        _centre(module)
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


def _copy(master: LoadedSae, device: str) -> LoadedSae:
    # A new module, not a deep copy: functions in the old one may hold it, and would write to it when the copy is used.
    if isinstance(master.module, PlainSae):
        module: Any = PlainSae(master.module.cfg)
    else:
        config = deepcopy(master.module.cfg)
        config.device = "meta"
        with torch.device("meta"):
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


def _from_folder(spec: SourceSpec, files: Files, folder: Path, dtype: str) -> Any:
    config, weights = config_of(spec, files, folder), folder / WEIGHTS_NAME
    try:
        plain = load_plain(config, weights, dtype) if isinstance(config, PlainConfig) else None
        return plain or saelens.sae_in(folder, dtype)
    except UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(weights)!r} could not be read: {line(exc)}") from exc


def _from_files(spec: SourceSpec, files: Files, dtype: str) -> Any:
    """Of other formats, and of the hub's repositories."""
    try:
        module = foreign.sae_in(files, dtype) if files.loader in FOREIGN else saelens.sae_on_hub(spec, dtype)
    except UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} could not be read: {line(exc)}") from exc
    check_architecture(spec, module.cfg.architecture())
    return module


def _centre(module: Any) -> None:
    columns, gains = centred(
        module.W_enc.data.T.contiguous(), module.b_dec if module.cfg.apply_b_dec_to_input else None
    )
    module.W_enc.data = columns.T.contiguous()
    module.b_enc.data += gains.to(module.b_enc.dtype)


def _fold_decoder_norms(module: Any) -> None:
    """Give decoder rows unit norm and activations the old one, where that leaves the choice of features."""
    # Rows that lie together are summed alike whatever order the file has.
    module.W_dec.data = module.W_dec.data.contiguous()
    if folds_norms(module.cfg):
        module.fold_W_dec_norm()
