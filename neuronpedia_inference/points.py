"""Names of places inside the model. TransformerLens spelling is understood here and nowhere else.

A point is a layer and a place in it. Most places are the input or output of one of the model's own modules, as
`engine/tree.py` says; two are computed from others: the RMS-normalised residual stream before the norm's gain, which
GemmaScope transcoders read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from neuronpedia_inference.errors import UnknownPoint

RESID_PRE = "hook_resid_pre"
RESID_MID = "hook_resid_mid"
RESID_POST = "hook_resid_post"
ATTN_IN = "attn.hook_in"
ATTN_OUT = "hook_attn_out"
MLP_IN = "mlp.hook_in"
MLP_OUT = "hook_mlp_out"
HOOK_Z = "attn.hook_z"
HOOK_V = "attn.hook_v"
PATTERN = "attn.hook_pattern"
INSIDE_ATTENTION = (PATTERN, HOOK_V)
"""Places that are no module's input or output."""
MLP_PRE = "mlp.hook_pre"
MLP_PRE_LINEAR = "mlp.hook_pre_linear"
MLP_POST = "mlp.hook_post"

WRITABLE = (RESID_PRE, HOOK_Z, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST)
"""Places that can be steered, in the order in which a block reaches them."""

ON_THE_STREAM = frozenset((RESID_PRE, RESID_MID, RESID_POST, ATTN_OUT, MLP_OUT))
"""Places whose vectors are added to the residual stream, or are it."""

NORMALIZED = {"ln1.hook_normalized": RESID_PRE, "ln2.hook_normalized": RESID_MID}
"""Computed places: x / sqrt(mean(x²) + eps) of the residual stream named, before the norm's gain."""

READABLE = (
    *WRITABLE,
    ATTN_IN,
    "attn.hook_out",
    HOOK_V,
    MLP_IN,
    "mlp.hook_out",
    MLP_PRE,
    MLP_PRE_LINEAR,
    MLP_POST,
    *NORMALIZED,
)
"""Places with one vector per token."""

IN_ORDER = (
    RESID_PRE,
    "ln1.hook_normalized",
    ATTN_IN,
    *INSIDE_ATTENTION,
    HOOK_Z,
    "attn.hook_out",
    ATTN_OUT,
    RESID_MID,
    "ln2.hook_normalized",
    MLP_IN,
    MLP_PRE,
    MLP_PRE_LINEAR,
    MLP_POST,
    "mlp.hook_out",
    MLP_OUT,
    RESID_POST,
)
"""All places, as a pass comes to them."""

_ALIASES = {"hook_z": HOOK_Z, "hook_mlp_in": MLP_IN, "hook_attn_in": ATTN_IN}
_NAME = re.compile(r"blocks\.(\d{1,4})\.([\w.]+)")


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A named place in one layer."""

    layer: int
    place: str

    @property
    def name(self) -> str:
        """TransformerLens's name, `blocks.7.hook_resid_pre`."""
        return f"blocks.{self.layer}.{self.place}"

    @property
    def is_inside_attention(self) -> bool:
        """Whether reading it makes attention hold its pattern, for every row of the pass."""
        return self.place in INSIDE_ATTENTION

    @property
    def reached(self) -> tuple[int, int]:
        """Points that a pass comes to earlier have a lower one."""
        return self.layer, IN_ORDER.index(self.place)

    @classmethod
    def parse(cls, name: str) -> Point:
        """`blocks.7.hook_resid_pre` → Point(7, "hook_resid_pre"). Raises UnknownPoint for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnknownPoint(f"Unknown hook {_short(name)!r}: expected the form blocks.<layer>.<place>.")
        place = _ALIASES.get(match[2], match[2])
        if place not in READABLE:
            raise UnknownPoint(f"Unknown hook {_short(name)!r}. Places in a block: {', '.join(READABLE)}.")
        return cls(int(match[1]), place)


def _short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."
