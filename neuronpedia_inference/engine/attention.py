"""What attention makes inside: its pattern and its values, read where Hugging Face hands them to an attention function.

These are no module's input or output. But most architectures in Hugging Face's library choose the function that
attends by name, so one of our own stands in while somebody reads. It computes the pattern, which fused kernels never
hold, in the layers that are read, by the architecture's own plain function (which knows its soft-caps and sinks), and
leaves the other layers to the function that the model was loaded with, if that takes the same masks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neuronpedia_inference.engine.hooks import Edit, Remove
from neuronpedia_inference.points import PATTERN

_NAME = "read-{}"
_TAKE_MASKS = ("sdpa", "eager")
"""Functions that take the additive masks that the plain ones need."""
_READERS: WeakKeyDictionary[nn.Module, list[tuple[str, Edit]]] = WeakKeyDictionary()


class AttentionReader:
    """Reads the attention of one model."""

    def __init__(self, modules: Sequence[nn.Module | None]) -> None:
        """`modules`: each layer's attention, None for a layer that has none of this kind."""
        self._modules = modules
        configs: list[Any] = [getattr(module, "config", None) for module in modules]
        self._configs = list(
            {id(config): config for config in configs if config and config._attn_implementation}.values()
        )
        self._own: list[str] = []
        """Names of the model's own functions, while others stand in for them."""
        self._n_attached = 0

    def attach(self, layer: int, place: str, edit: Edit) -> Remove:
        """`edit` gets [row, head, query, key] for PATTERN, [row, pos, key-value head, d_head] for HOOK_V; no changes.

        Where the architecture does not ask for its attention function by name, `edit` is never called.
        """
        module = self._modules[layer]
        if module is None:
            return lambda: None
        reader = (place, edit)
        readers = _READERS.setdefault(module, [])
        readers.append(reader)
        self._stand_in(1)

        def remove() -> None:
            readers.remove(reader)
            self._stand_in(-1)

        return remove

    def _stand_in(self, more: int) -> None:
        """The function of our own takes the place of the model's as long as anybody reads."""
        before, self._n_attached = self._n_attached, self._n_attached + more
        if not before:
            self._own = [config._attn_implementation for config in self._configs]
        if bool(before) != bool(self._n_attached):
            for config, own in zip(self._configs, self._own, strict=True):
                config._attn_implementation = own if before else _registered(own)


def _registered(own: str) -> str:
    name = _NAME.format(own)
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend, own))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    return name


def _attend(own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """As the attention functions of Hugging Face's library: -> output, pattern or None."""
    plain: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    readers = _READERS.get(module)
    functions: Any = ALL_ATTENTION_FUNCTIONS
    if not readers or plain is None:
        takes_masks = own if own in _TAKE_MASKS or plain is None else "eager"
        return functions.get_interface(takes_masks, plain)(module, query, key, value, mask, **options)
    output, pattern = plain(module, query, key, value, mask, **options)
    for place, read in readers:
        read(pattern if place == PATTERN else value[:, :, -query.shape[2] :].transpose(1, 2))
    return output, pattern
