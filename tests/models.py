"""Small seeded models of several families, and plain Hugging Face computations to compare with.

Nothing here uses the library under test: hooks are written by hand on the Hugging Face modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from neuronpedia_inference.embedded.weights import model_folder
from tests.rounding import APART

BOS = "<|bos|>"
VOCAB_SIZE = 260
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}

CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=1,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    ),
    "llama": LlamaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=6, query_pre_attn_scalar=8),
    "qwen2": Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**GROUPED),
    "neox": GPTNeoXConfig(**SMALL),
}


MORE_CONFIGS: dict[str, Any] = {}
"""Of other modules' models, which they add when they are imported."""


@cache
def model(family: str) -> PreTrainedModel:
    """A seeded random model whose layers matter: weights are large enough for hooks to change its output."""
    if family == EMBEDDED:
        real = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
        return real.eval().requires_grad_(False)
    torch.manual_seed(sum(map(ord, family)))
    built = AutoModelForCausalLM.from_config((CONFIGS | MORE_CONFIGS)[family]).eval().requires_grad_(False)
    for parameter in built.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(5)
    return built


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus BOS (0), EOS (1) and two unused ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BOS: 0, "<|eos|>": 1, "<|x|>": 2, "<|y|>": 3}
    vocabulary |= {symbol: place + 4 for place, symbol in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token="<|eos|>")


def save(family: str, folder: Path) -> Path:
    """The model and tokenizer as a Hugging Face folder with safetensors."""
    model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a hook point is in a family's own modules, found by reading its source."""

    module: Callable[[Any], nn.Module]
    """From a block to the module."""
    on_input: bool


EMBEDDED = "smollm2"
"""The real model that comes with the library."""

LLAMA_PLACES = {
    "hook_resid_pre": Place(lambda block: block, True),
    "hook_resid_post": Place(lambda block: block, False),
    "attn.hook_z": Place(lambda block: block.self_attn.o_proj, True),
    "hook_attn_out": Place(lambda block: block.self_attn, False),
    "hook_mlp_out": Place(lambda block: block.mlp, False),
}
PLACES: dict[str, dict[str, Place]] = {
    EMBEDDED: LLAMA_PLACES,
    "llama": LLAMA_PLACES,
    "qwen2": LLAMA_PLACES,
    "qwen3": LLAMA_PLACES,
    "gemma2": {
        **LLAMA_PLACES,
        "hook_attn_out": Place(lambda block: block.post_attention_layernorm, False),
        "hook_mlp_out": Place(lambda block: block.post_feedforward_layernorm, False),
    },
    "gpt2": {
        **LLAMA_PLACES,
        "attn.hook_z": Place(lambda block: block.attn.c_proj, True),
        "hook_attn_out": Place(lambda block: block.attn, False),
    },
    "neox": {
        **LLAMA_PLACES,
        "attn.hook_z": Place(lambda block: block.attention.dense, True),
        "hook_attn_out": Place(lambda block: block.attention, False),
    },
}


MORE_PLACES: dict[str, dict[str, Place]] = {}
"""As MORE_CONFIGS."""


def with_places(places: Sequence[str]) -> list[tuple[str, str]]:
    """Every family with every place it has; GPT-NeoX's parallel blocks have no resid_mid."""
    return [(f, p) for f in CONFIGS for p in places if (f, p) != ("neox", "hook_resid_mid")]


def blocks(net: Any) -> nn.ModuleList:
    base = net.base_model
    for inner in ("language_model", "decoder"):
        base = getattr(base, inner, base)
    return base.h if hasattr(base, "h") else base.layers


@contextmanager
def hooked(net: PreTrainedModel, family: str, layer: int, place: str, edit: Edit):
    """`edit` applied at a point by plain torch hooks. resid_mid is edited as the sum that it is: the skip
    connection's part is taken from the block's input."""
    places = (PLACES | MORE_PLACES)[family]
    block = blocks(net)[layer]
    with ExitStack() as stack:
        if place == "hook_resid_mid":
            entry: list[Tensor] = []
            stack.callback(_hook(block, True, lambda h: entry.append(h) or h).remove)
            out = places["hook_attn_out"]

            def edit_sum(attn_out: Tensor) -> Tensor:
                mid = entry[-1] + attn_out
                return attn_out + edit(mid) - mid

            stack.callback(_hook(out.module(block), out.on_input, edit_sum).remove)
        else:
            at = places[place]
            edit = _in_rows(edit)
            stack.callback(_hook(at.module(block), at.on_input, edit).remove)
        yield


def read(net: PreTrainedModel, family: str, ids: Sequence[int], layer: int, place: str) -> Tensor:
    """[pos, width] of one prompt on its own, no padding, no cache."""
    seen: list[Tensor] = []
    _forget_lengths(net)
    with torch.no_grad(), hooked(net, family, layer, place, lambda h: seen.append(h.clone()) or h):
        net(torch.tensor([list(ids)]), use_cache=False)
    return seen[0][0]


class NearTie(AssertionError):
    """Rounding could decide which token comes next, so nothing can be compared."""


def greedy(net: PreTrainedModel, ids: Sequence[int], n_tokens: int, banned: Sequence[int] = ()) -> list[int]:
    """A plain greedy loop without cache; wrap it in `hooked` to steer it. None of the tokens is a banned one.

    Who compares with these tokens compares what rounding cannot change: a choice that it could is refused.
    """
    tokens = list(ids)
    _forget_lengths(net)
    with torch.no_grad():
        for _ in range(n_tokens):
            logits = net(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            logits[list(banned)] = logits.min()
            best, second = logits.topk(2).values.tolist()
            if best - second <= APART * float(logits.abs().max()):
                raise NearTie("take another prompt or seed")
            tokens.append(int(logits.argmax()))
    return tokens[len(ids) :]


def _forget_lengths(net: PreTrainedModel) -> None:
    """Dynamic rotations go on with the angles of the longest text they have met: a reference is its own first text."""
    modules: list[Any] = list(net.modules())
    for module in modules:
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()


def formula(method: str, vector: Tensor, coefficient: float) -> Edit:
    """The three steering formulas written out with outer products, as the contract states them."""
    unit = vector / vector.pow(2).sum().sqrt()
    projector = torch.outer(unit, unit)

    def edit(h: Tensor) -> Tensor:
        if method == "add":
            return h + coefficient * vector
        along = h @ projector
        if method == "orthogonal":
            return (h - along) + coefficient * along
        size = h @ unit
        return h + torch.outer((size.clamp(max=coefficient) - size).flatten(), unit).view_as(h)

    return edit


def _in_rows(edit: Edit) -> Edit:
    """OPT flattens a single prompt's positions into rows of the MLP; they are edited as [1, pos, width]."""
    return lambda h: edit(h) if h.ndim == 3 else edit(h[None])[0]


def _hook(module: nn.Module, on_input: bool, edit: Edit) -> Any:
    if on_input:

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: Any, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(after)
