"""What an SAE is, by its configuration and the headers of its files: no weights are read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuronpedia_inference.domain import TEMPORAL, Source
from neuronpedia_inference.errors import StartupError, UnknownPoint
from neuronpedia_inference.points import Point
from neuronpedia_inference.saes import foreign, saelens
from neuronpedia_inference.saes.asks import asked
from neuronpedia_inference.saes.convert import converted_folder
from neuronpedia_inference.saes.feature import (
    ACROSS_LAYERS,
    CONSTANT_NORM,
    LAYER_NORM,
    NORMALISATIONS,
    FeatureWeights,
    check_rows,
)
from neuronpedia_inference.saes.files import Files, files_of
from neuronpedia_inference.saes.kinds import SERVED, shapes_of
from neuronpedia_inference.saes.layout import Layout
from neuronpedia_inference.saes.layouts import folder_layout, original_layout
from neuronpedia_inference.saes.originals import CONVERTED, FOREIGN, SCALED, loaders_of
from neuronpedia_inference.saes.plain import PlainConfig, plain_config
from neuronpedia_inference.saes.reading import UNREADABLE, line
from neuronpedia_inference.saes.specs import CONFIG_NAME, WEIGHTS_NAME, SourceSpec
from neuronpedia_inference.saes.stored import Version

AUTO = "auto"
"""In place of a precision: that of the files."""
PRECISIONS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Described:
    """One SAE whose files are here."""

    source: Source
    config: Any
    """With SAELens's names."""
    dtype: str
    """The precision in which it is served."""
    layout: Layout | None
    """None where features cannot be read by themselves: until it has been converted, or for ever."""
    is_original: bool = False
    """It is in a format that is to be converted."""

    @property
    def n_bytes(self) -> int:
        """What all of it takes in memory."""
        return sum(map(prod, shapes_of(self.config).values())) * getattr(torch, self.dtype).itemsize

    @property
    def files(self) -> dict[Path, Version]:
        """Where its tensors are read; none where that is not known."""
        parts = () if self.layout is None else self.layout.parts.values()
        return {part.stored.file: part.stored.version for part in parts}

    def decoder_row(self, index: int) -> Tensor:
        """[decoder width], float32, read from the file; there must be a layout.

        Raises OSError, and InvalidRequest where rows mean nothing.
        """
        assert self.layout is not None, self.source
        check_rows(self.source)
        return self.layout.row(index, getattr(torch, self.dtype), folds=folds_norms(self.config)).float()

    def feature(self, index: int) -> FeatureWeights:
        """Read from the file. Raises OSError; there must be a layout."""
        assert self.layout is not None, self.source
        dtype = getattr(torch, self.dtype)
        return self.layout.feature(self.source, index, dtype, config=self.config, folds=folds_norms(self.config))


def describe(spec: SourceSpec, dtype: str) -> Described:
    """dtype: a precision, or AUTO.

    Raises StartupError, one line naming the source and the file or the architecture, for an SAE that is missing, broken
    or of a kind that is not served.
    """
    files = here(spec)
    folder = folder_of(spec, files)
    config = config_of(spec, files, folder)
    source = source_of(spec, config)
    layout = _layout(spec, files, folder, config)
    is_original = folder is None and files.loader in CONVERTED
    return Described(source, config, _precision(spec, dtype, layout), layout, is_original)


def here(spec: SourceSpec) -> Files:
    """Raises StartupError where its files are not on this machine."""
    files = files_of(spec)
    if files is None:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} is not on this machine.")
    return files


def folder_of(spec: SourceSpec, files: Files) -> Path | None:
    """Where it lies as SAELens writes SAEs, its own or a copy that was made; None for other formats and the hub's."""
    if files.loader in CONVERTED:
        folder = converted_folder(spec, files)
        return folder if folder.is_dir() else None
    return spec.folder if files.loader is None else None


def config_of(spec: SourceSpec, files: Files, folder: Path | None) -> Any:
    """With SAELens's names. folder: where it lies as SAELens writes SAEs. Raises StartupError."""
    try:
        if folder is not None:
            config = _folder_config(spec, folder)
        elif files.loader in FOREIGN:
            config = foreign.config_in(files)
        else:
            config = _hub_config(spec, files)
    except UNREADABLE as exc:
        raise StartupError(f"SAE {spec.name!r}: {spec.address!r} could not be read: {line(exc)}") from exc
    check_architecture(spec, config.architecture())
    return config


def folds_norms(config: Any) -> bool:
    """Whether decoder rows get unit norm and activations the old one: where that leaves the choice of features."""
    is_folded = config.architecture() not in ("matching_pursuit", TEMPORAL)
    return is_folded and getattr(config, "rescale_acts_by_decoder_norm", True)


def check_architecture(spec: SourceSpec, architecture: str) -> None:
    """Raises StartupError for one that is not served."""
    if architecture not in SERVED:
        raise StartupError(
            f"SAE {spec.name!r} has the architecture {architecture!r}, which is not served "
            f"({', '.join(sorted(SERVED))} are); EXCLUDE_SAE leaves it out."
        )


def source_of(spec: SourceSpec, config: Any) -> Source:
    """Raises StartupError where the configuration asks for what is not done."""
    # SAELens's metadata answers None for any name, so only what is written there counts.
    metadata = config.metadata if isinstance(config, PlainConfig) else config.metadata.to_dict()
    hook = metadata.get("hook_name")
    layer = re.search(r"(?:^|\.)blocks\.(\d+)\.", hook) if isinstance(hook, str) else None
    if not isinstance(hook, str) or layer is None:
        raise StartupError(f"SAE {spec.name!r}: its metadata has no hook_name with a layer, but {hook!r}.")
    if metadata.get("hook_head_index") is not None:
        raise StartupError(f"SAE {spec.name!r} reads one attention head of {hook!r}, which is not served.")
    try:
        asks = asked(metadata, Point.parse(hook).place, config.architecture())
    except (ValueError, UnknownPoint) as exc:
        raise StartupError(f"SAE {spec.name!r}: {exc}; EXCLUDE_SAE leaves it out.") from None
    if config.normalize_activations not in NORMALISATIONS and not _scales_by_itself(config):
        raise StartupError(f"SAE {spec.name!r}: {config.normalize_activations!r} of its input is not folded in.")
    return Source(
        name=spec.name,
        source_set=spec.source_set,
        layer=int(layer.group(1)),
        hook=hook,
        n_features=config.d_sae,
        width=config.d_in,
        architecture=_architecture(spec, config),
        hook_out=metadata.get("hook_name_out"),
        has_dfa=hook.endswith("hook_z") and _reads_attention(spec, metadata.get("neuronpedia_id")),
        n_heads=getattr(config, "n_heads", 0),
        asks=asks,
        normalises=config.normalize_activations in (CONSTANT_NORM, LAYER_NORM),
    )


def _scales_by_itself(config: Any) -> bool:
    """Whether its input is multiplied by a factor that its own configuration has."""
    return config.architecture() == TEMPORAL and config.normalize_activations == "constant_scalar_rescale"


def _architecture(spec: SourceSpec, config: Any) -> str:
    """What SAELens says, but for one layer of a cross-layer transcoder, which it loads as a transcoder of its own."""
    is_one_layer = loaders_of(spec) == ("mntss_clt_layer_transcoder",)
    return ACROSS_LAYERS if is_one_layer else config.architecture()


def _reads_attention(spec: SourceSpec, written_id: Any) -> bool:
    for name in (spec.neuronpedia_id, written_id, f"/{spec.name}" if spec.release else None):
        if isinstance(name, str) and re.search(r"-att[-_]", name):
            return True
    return spec.folder is not None and "att" in spec.name


def _folder_config(spec: SourceSpec, folder: Path) -> Any:
    found = _checked(spec, folder / CONFIG_NAME)
    if not (folder / WEIGHTS_NAME).is_file():
        raise StartupError(f"SAE {spec.name!r}: {str(folder / WEIGHTS_NAME)!r} is missing.")
    return plain_config(found) or saelens.config_in(folder)


def _hub_config(spec: SourceSpec, files: Files) -> Any:
    if files.loader is None:
        _checked(spec, files.folder / CONFIG_NAME)
    return saelens.config_on_hub(spec)


def _checked(spec: SourceSpec, config: Path) -> dict[str, Any]:
    """A configuration of SAELens as it is written. Raises StartupError."""
    found = _read_config(spec, config)
    check_architecture(spec, str(found.get("architecture", "standard")))
    # SAELens takes ReLU whatever is written there, but for TopK.
    activation = found.get("activation_fn_str", found.get("activation_fn"))
    if activation not in (None, "relu", "topk"):
        raise StartupError(
            f"SAE {spec.name!r}: its activation {activation!r} is not served; EXCLUDE_SAE leaves it out."
        )
    return found


def _read_config(spec: SourceSpec, config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return found
    except FileNotFoundError:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} is missing.") from None
    except (OSError, ValueError) as exc:
        raise StartupError(f"SAE {spec.name!r}: {str(config)!r} could not be read: {line(exc)}") from exc


def _layout(spec: SourceSpec, files: Files, folder: Path | None, config: Any) -> Layout | None:
    try:
        layout = folder_layout(folder) if folder is not None else _hub_layout(spec, files)
        if layout is not None:
            layout.check(config)
        return layout
    except (OSError, ValueError, KeyError, TypeError) as exc:
        where = folder / WEIGHTS_NAME if folder is not None else spec.address
        raise StartupError(f"SAE {spec.name!r}: {str(where)!r} could not be read: {line(exc)}") from exc


def _hub_layout(spec: SourceSpec, files: Files) -> Layout | None:
    if files.loader is None:
        return folder_layout(files.folder)
    scale = saelens.scale_of(spec) if files.loader in SCALED else None
    return original_layout(files.loader, files.root, files.path, scale)


def _precision(spec: SourceSpec, dtype: str, layout: Layout | None) -> str:
    if dtype != AUTO:
        return dtype
    own = layout.dtype if layout is not None else torch.float32
    if own not in PRECISIONS:
        raise StartupError(f"SAE {spec.name!r}: its weights are in {own}; SAE_DTYPE chooses float32 or another.")
    return PRECISIONS[own]
