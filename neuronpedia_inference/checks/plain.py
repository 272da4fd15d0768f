"""The model without this project: Hugging Face's own forward, with hooks put on its blocks by hand, and no cache.

Nothing of `engine` is used: blocks are found by their number, linear layers multiply as torch does, and every token
runs the whole text again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

METHODS = ("SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP")


@dataclass(frozen=True)
class PlainSteer:
    """One vector at one block's output."""

    layer: int
    method: str
    coefficient: float
    vector: Sequence[float]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[1, pos, width], at every position: h + c·v; h + (c − 1)(h·v̂)v̂; h + (min(h·v̂, c) − h·v̂)v̂."""
        v = torch.tensor(self.vector, dtype=torch.float32, device=hidden.device)
        if self.method == "SIMPLE_ADDITIVE":
            return hidden + (self.coefficient * v).to(hidden.dtype)
        v = v / v.norm()
        along = (hidden.float() * v).sum(-1, keepdim=True)
        wanted = self.coefficient * along if self.method == "ORTHOGONAL_DECOMP" else along.clamp(max=self.coefficient)
        return hidden + ((wanted - along) * v).to(hidden.dtype)


def blocks(model: nn.Module, n_layers: int) -> Sequence[nn.Module]:
    """The decoder's blocks: its outermost list of so many modules. Raises LookupError where there is none."""
    decoder: Any = getattr(model, "get_decoder", lambda: None)() or model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    raise LookupError(f"the model holds no list of {n_layers} modules")


@torch.inference_mode()
def residuals(model: nn.Module, n_layers: int, ids: Sequence[int]) -> list[Tensor]:
    """[pos, width] before every block and after the last, of one text."""
    seen: list[Tensor] = []
    found = blocks(model, n_layers)
    with ExitStack() as hooks, _as_torch_multiplies(model):
        for block in found:
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(_input(args, kwargs)), with_kwargs=True
            )
            hooks.callback(handle.remove)
        hooks.callback(found[-1].register_forward_hook(lambda _, args, output: seen.append(_first(output))).remove)
        _logits(model, ids)
    return [tensor.reshape(len(ids), -1).clone() for tensor in seen]


@torch.inference_mode()
def next_tokens(model: nn.Module, n_layers: int, ids: Sequence[int], steer: PlainSteer | None) -> Tensor:
    """[pos, vocabulary]: logits after every position of one text, float32."""
    with ExitStack() as hooks, _as_torch_multiplies(model):
        if steer is not None:
            hooks.callback(blocks(model, n_layers)[steer.layer].register_forward_hook(_edits_output(steer)).remove)
        return _logits(model, ids)


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    output = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return output.logits[0].float()


def _edits_output(steer: PlainSteer) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        changed = steer(_first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _as_torch_multiplies(model: nn.Module) -> Iterator[None]:
    """Linear layers that were given a product of their own do without it inside."""
    own = {layer: layer.__dict__.pop("forward") for layer in model.modules() if "forward" in layer.__dict__}
    try:
        yield
    finally:
        for layer, forward in own.items():
            layer.forward = forward
