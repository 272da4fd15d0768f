"""What an SAE's configuration asks of the model beside a hook: done, said, or refused.

SAELens reads models as TransformerLens makes them with `model_from_pretrained_kwargs`. Centred writing weights give all
that is added to the residual stream a mean of zero over its width, which no LayerNorm behind it notices. An SAE then
reads h − mean(h), and its column e reads there what e − mean(e) reads in h:

    (h − mean(h) − b)·e + β = (h − b)·(e − mean(e)) + β − mean(e) Σb
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neuronpedia_inference.domain import CENTRED, UNNORMED
from neuronpedia_inference.points import (
    ATTN_IN,
    ATTN_OUT,
    HOOK_V,
    HOOK_Z,
    MLP_IN,
    MLP_OUT,
    NORMALIZED,
    ON_THE_STREAM,
)

WITHOUT_BOS = "texts without BOS: here every text begins with it, where the tokenizer has one"
MODULE_OUTPUT = "module_output"
"""In the metadata of SAEs that read what a module gives, and not what a norm behind it makes of that."""
_BEHIND_NORMS = {ATTN_IN, MLP_IN, *NORMALIZED}
_VALUES = {HOOK_Z, HOOK_V}
_CHANGES = {
    "center_writing_weights": ON_THE_STREAM,
    "fold_ln": _BEHIND_NORMS,
    "fold_value_biases": _VALUES,
    "refactor_factored_attn_matrices": _VALUES,
    "center_unembed": frozenset(),
}
"""What TransformerLens may do to weights, and the places whose vectors are others then."""
_CENTRED_HERE = ("standard", "topk", "abstopk", "jumprelu")


def asked(metadata: Mapping[str, Any], place: str, kind: str) -> tuple[str, ...]:
    """What is done instead, or left undone, in words. place: where the SAE reads; kind: SAELens's architecture.

    Raises ValueError for what would give other numbers and is not done.
    """
    words = [] if metadata.get("prepend_bos", True) in (True, None) else [WITHOUT_BOS]
    if metadata.get(MODULE_OUTPUT) and place in (ATTN_OUT, MLP_OUT):
        words.append(UNNORMED)
    options = metadata.get("model_from_pretrained_kwargs") or {}
    for name, value in options.items():
        if name not in _CHANGES:
            words.append(f"a model loaded with {name}={value!r}: MODEL_FROM_PRETRAINED_KWARGS chooses what is loaded")
        elif value and place in _CHANGES[name]:
            if name != "center_writing_weights" or kind not in _CENTRED_HERE:
                raise ValueError(f"it asks for a model with {name}, which changes {place} and is not done")
            words.append(CENTRED)
    return tuple(words)


def centred(columns: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
    """[feature, width], [width] -> columns with a mean of zero, and what b_enc gains: [feature], float32.

    columns: contiguous, so that each is summed as if it were alone. b_dec: where it is taken off the input.
    """
    wide = columns.float()
    means = wide.mean(dim=1)
    gains = -means * (0.0 if b_dec is None else b_dec.float().sum())
    return (wide - means[:, None]).to(columns.dtype), gains
