"""What SAELens does for us: configurations and SAEs of the formats that it knows. The only module that imports it.

Its loaders take files from the hub's cache and nowhere else: whoever calls them has seen to it that the files are
there. Many threads may call them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from neuronpedia_inference.saes.specs import SourceSpec

_from_cache_only: ContextVar[bool] = ContextVar("from_cache_only", default=False)
ADVICE = r"\s*This SAE has non-empty model_from_pretrained_kwargs"
"""A warning on how to load the model of an SAE, which is decided elsewhere."""


def config_in(folder: Path) -> Any:
    """Of the SAE in a folder."""
    from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, handle_config_defaulting

    _prepare()
    return _as_config(handle_config_defaulting(get_sae_lens_config_from_disk(folder)))


def config_on_hub(spec: SourceSpec) -> Any:
    """Of an SAE whose configuration is in the hub's cache."""
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    _prepare()
    with _cache_only():
        config = _as_config(load_sae_config_from_huggingface(*_address(spec)))
    if config.normalize_activations == "expected_average_only_in" and scale_of(spec) is not None:
        config.normalize_activations = "none"  # it is folded in
    return config


def sae_in(folder: Path, dtype: str) -> Any:
    """The SAE in a folder, in host memory, as it lies there."""
    from sae_lens import SAE

    _prepare()
    return SAE.load_from_disk(folder, device="cpu", dtype=dtype)


def sae_on_hub(spec: SourceSpec, dtype: str) -> Any:
    """The same for one in the hub's cache."""
    from sae_lens import SAE

    _prepare()
    with _cache_only():
        return SAE.from_pretrained(*_address(spec), device="cpu", dtype=dtype)


def config_from(config: dict[str, Any]) -> Any:
    """From what its `cfg.json` would hold."""
    _prepare()
    return _as_config(config)


def sae_from(config: Any, weights: dict[str, torch.Tensor], dtype: str) -> Any:
    """An SAE of tensors by SAELens's names, in host memory."""
    from sae_lens import SAE

    config.device, config.dtype = "meta", dtype
    made: Any = SAE.get_sae_class_for_architecture(config.architecture())
    module = made(config)
    config.device = module.cfg.device = "cpu"
    module.load_state_dict({name: w.to(getattr(torch, dtype)).contiguous() for name, w in weights.items()}, assign=True)
    return module.to(device="cpu")


def scale_of(spec: SourceSpec) -> float | None:
    """The factor by which the directory says that inputs are multiplied."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    return get_norm_scaling_factor(*_address(spec))


def version() -> str:
    return metadata.version("sae-lens")


def _address(spec: SourceSpec) -> tuple[str, str]:
    # To SAELens a repository that is in no release is a release of its own.
    release, sae_id = spec.release or spec.repo, spec.sae_id or spec.path
    assert release is not None, spec
    assert sae_id is not None, spec
    return release, sae_id


def _as_config(config: dict[str, Any]) -> Any:
    from sae_lens import SAE

    return SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)


@contextmanager
def _cache_only() -> Iterator[None]:
    token = _from_cache_only.set(True)
    try:
        yield
    finally:
        _from_cache_only.reset(token)


@cache
def _prepare() -> None:
    """SAELens asks the hub for each file, also for those that are here; for shapes even where the file is here."""
    from sae_lens.loading import pretrained_sae_loaders

    on_hub, shapes = pretrained_sae_loaders.hf_hub_download, pretrained_sae_loaders.get_safetensors_tensor_shapes
    pretrained_sae_loaders.hf_hub_download = lambda *args, **more: (
        _in_cache(*args, **more) if _from_cache_only.get() else on_hub(*args, **more)
    )
    pretrained_sae_loaders.get_safetensors_tensor_shapes = lambda repo_id, filename: (
        _shapes(repo_id, filename) if _from_cache_only.get() else shapes(repo_id, filename)
    )
    warnings.filterwarnings("ignore", message=ADVICE)


def _in_cache(repo_id: str, filename: str, *, subfolder: str | None = None, **more: Any) -> str:
    """As the hub's client answers. more: of its other arguments the revision counts."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = f"{subfolder}/{filename}" if subfolder else filename
    found = try_to_load_from_cache(repo_id, name, revision=more.get("revision"))
    if not isinstance(found, str):
        raise LocalEntryNotFoundError(f"{repo_id}/{name} is not on this machine")
    return found


def _shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    with safe_open(_in_cache(repo_id, filename), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
