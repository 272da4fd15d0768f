"""Which module of an architecture plays which part, as TransformerLens's adapters say it: plain data.

It is kept from one start to the next, because importing TransformerLens takes longer than all that is asked of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neuronpedia_inference import kept
from neuronpedia_inference.errors import StartupError

FORM = 1
"""Of what is kept: another number when its meaning changes."""


@dataclass(frozen=True)
class Part:
    """A module by its path in the module around it, with the parts inside."""

    name: str | None
    """None for a part that is the module around it."""
    submodules: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Part:
        """Raises KeyError, TypeError or AttributeError for what `asdict` has not made."""
        return cls(body["name"], {key: cls.from_json(one) for key, one in body["submodules"].items()})


@dataclass(frozen=True)
class Description:
    """A model's architecture and sizes, in TransformerLens's words."""

    architecture: str
    d_model: int
    d_head: int
    d_mlp: int | None
    n_heads: int
    n_key_value_heads: int | None
    n_ctx: int
    parts: Mapping[str, Part]
    """Of the whole model; `blocks` is among them."""

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Description:
        """Raises KeyError, TypeError or AttributeError for what `asdict` has not made."""
        parts = {key: Part.from_json(one) for key, one in body["parts"].items()}
        parts["blocks"]  # what decodes has blocks
        return cls(**{**body, "parts": parts})


def describe(model: PreTrainedModel, cache_dir: Path | None = None) -> Description:
    """cache_dir: where descriptions are kept; None: TransformerLens is asked.

    Raises StartupError for an architecture that it does not know.
    """
    config: Any = model.config
    if not config.architectures:
        config.architectures = [type(model).__name__]
    if cache_dir is None:
        return _asked(model)
    file = cache_dir / f"architecture-{_key(model)}.json"
    try:
        return Description.from_json(kept.read(file))
    except (KeyError, TypeError, AttributeError):
        found = _asked(model)
        kept.write(file, asdict(found))
        return found


def accept_integers() -> None:
    """Configurations may from now on have an integer where a number is wanted: importing TransformerLens does that."""
    import transformer_lens  # noqa: F401  # pyright: ignore[reportUnusedImport]  (for what its import does)


def _key(model: PreTrainedModel) -> str:
    versions = (version("transformers"), version("transformer-lens"), FORM, str(model.dtype))
    config = f"{versions} {model.config.architectures} {model.config.to_json_string()}"
    return hashlib.sha256(config.encode()).hexdigest()[:24]


def _asked(model: PreTrainedModel) -> Description:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config: Any = model.config
    name = config.architectures[0]
    try:
        architecture = determine_architecture_from_hf_config(config)
        cfg = build_bridge_config_from_hf(config, architecture, name, model.dtype)
        mapping: Any = ArchitectureAdapterFactory.select_architecture_adapter(cfg).component_mapping
        mapping["blocks"]  # what decodes has blocks
    except (ValueError, NotImplementedError, AttributeError, KeyError, TypeError) as exc:
        raise StartupError(f"TransformerLens does not know the architecture {name}: {exc}") from exc
    return Description(
        architecture=architecture,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_key_value_heads,
        n_ctx=cfg.n_ctx,
        parts={key: _part(component) for key, component in mapping.items()},
    )


def _part(component: Any) -> Part:
    return Part(component.name, {key: _part(one) for key, one in component.submodules.items()})
