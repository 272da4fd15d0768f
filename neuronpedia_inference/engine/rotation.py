"""Rotary positions whose angles depend on the length of the text.

Two kinds of Hugging Face's rotations look at the longest row of a forward pass: `longrope` has one set of angles up to
a length and another beyond it, `dynamic` has other angles for every length beyond it. There a row must not run beside a
longer one, and keys that were kept under other angles are of no more use: Hugging Face's answer for a text is the one
without a cache, and so is ours.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


class Rotation:
    """What a model's angles depend on."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        kinds = _kinds(getattr(config, "rope_parameters", None) or {})
        self._dynamic = any("dynamic" in str(kind.get("rope_type")) for kind in kinds)
        longest: int = getattr(config, "max_position_embeddings", 0)
        lengths = [
            kind["original_max_position_embeddings"] if kind.get("rope_type") == "longrope" else longest
            for kind in kinds
            if kind.get("rope_type") == "longrope" or "dynamic" in str(kind.get("rope_type"))
        ]
        self.horizon: int | None = min(lengths, default=None)
        """The longest text, in positions, up to which all texts have the same angles; None: all have."""
        self._modules = [module for module in model.modules() if hasattr(module, "max_seq_len_cached")]

    def passes(self, n_positions: int) -> bool:
        """Whether texts of so many positions may have angles of their own."""
        return self.horizon is not None and n_positions > self.horizon

    def outdates(self, n_positions: int) -> bool:
        """Whether a text that has just grown to so many positions has other angles than before."""
        if self.horizon is None or n_positions <= self.horizon:
            return False
        return self._dynamic or n_positions == self.horizon + 1

    def begin(self) -> None:
        """Before a forward pass: angles are those of its own rows, whatever ran before.

        Hugging Face's dynamic rotation remembers the longest text that it has met, and goes on with its angles.
        """
        if self._dynamic:
            for module in self._modules:
                for name in vars(module):
                    if name.endswith("max_seq_len_cached"):
                        setattr(module, name, 0)


def _kinds(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """One set, or one for each kind of layer."""
    nested = [one for one in parameters.values() if isinstance(one, dict)]
    return nested or [parameters]
