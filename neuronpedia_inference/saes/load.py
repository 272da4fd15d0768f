"""Loading one SAE with SAELens: checked, decoder norms folded in, on its device."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.catalogue import CONFIG_NAME, WEIGHTS_NAME, SourceSpec
from neuronpedia_inference.saes.encode import LoadedSae

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


def load_sae(spec: SourceSpec, *, dtype: str, device: str) -> LoadedSae:
    """Load the SAE that `spec` names, in `dtype` ("float32", ...), onto `device`.

    Raises StartupError, one line naming the source and the file or the architecture, if the SAE is missing,
    broken or of a kind that is not served.
    """
    module = _from_folder(spec, spec.folder, dtype) if spec.folder else _from_directory(spec, dtype)
    source = _describe(spec, module)
    module.turn_off_forward_pass_hook_z_reshaping()
    _fold_decoder_norms(module)
    module.to(device=device)
    module.eval()
    module.requires_grad_(False)
    return LoadedSae(source, module)


def _from_folder(spec: SourceSpec, folder: Path, dtype: str) -> Any:
    _check_architecture(spec, _read_architecture(spec, folder / CONFIG_NAME))
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise StartupError(f"SAE {spec.name!r}: {str(weights)!r} is missing.")
    from sae_lens import SAE

    try:
        with _without_model_advice():
            return SAE.load_from_disk(folder, device="cpu", dtype=dtype)
    except _UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(weights)!r} could not be read: {_line(exc)}") from exc


def _read_architecture(spec: SourceSpec, config: Path) -> str:
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("architecture", "standard"))
    except FileNotFoundError:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} is missing.") from None
    except (OSError, ValueError, AttributeError) as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} could not be read: {_line(exc)}") from exc


def _from_directory(spec: SourceSpec, dtype: str) -> Any:
    assert spec.release is not None, spec
    assert spec.sae_id is not None, spec
    from sae_lens import SAE

    try:
        with _without_model_advice():
            module = SAE.from_pretrained(spec.release, spec.sae_id, device="cpu", dtype=dtype)
    except _UNREADABLE as exc:
        where = f"{spec.release}/{spec.sae_id}"
        raise StartupError(f"SAE {spec.name!r}: {where!r} could not be fetched or read: {_line(exc)}") from exc
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
    metadata = config.metadata.to_dict()
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
        architecture=config.architecture(),
        has_dfa=hook.endswith("hook_z") and _reads_attention(spec, metadata.get("neuronpedia_id")),
    )


def _reads_attention(spec: SourceSpec, written_id: Any) -> bool:
    for name in (spec.neuronpedia_id, written_id):
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


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
