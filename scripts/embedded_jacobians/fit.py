"""The mean derivative of the last block's output by the output of earlier blocks, at the same position.

Of a Llama block y = h + MLP(N₂ h), h = x + Attention(N₁ x), the derivative at one position is (I + M N₂)(I + A N₁),
with the RMS norms' own derivatives in N. By causality, what a position changes at others never comes back to it: so
only its own query, key and value vary in A, and the product over blocks is the derivative itself, no estimate of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TEXTS_PER_FILE = 8
EVERY = 4
"""One in so many positions is fitted: neighbours are much alike."""
SINK = 3.0
"""Times the median norm."""


def fit(model: Any, texts: np.ndarray, layers: Sequence[int], folder: Path) -> None:
    """Sums of the Jacobians of eight texts [text, pos] a file, at one in four positions.

    Position 0 and other attention sinks are left out: SINK times the median norm behind a block or more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), TEXTS_PER_FILE):
        path = folder / f"{start:04}.npz"
        if path.exists():
            continue
        began = time.monotonic()
        found = [jacobian_sums(model, torch.from_numpy(ids), layers) for ids in texts[start : start + TEXTS_PER_FILE]]
        scratch = path.with_suffix(".part.npz")
        sums = torch.stack([one for one, _ in found]).sum(0).numpy()
        np.savez(scratch, layers=np.array(layers), sums=sums, positions=sum(n for _, n in found))
        scratch.rename(path)
        print(f"texts {start} to {start + TEXTS_PER_FILE}: {time.monotonic() - began:.0f} s", flush=True)


def load(folder: Path) -> dict[int, Tensor]:
    """The fitted Jacobians [d_out, d_in], by layer."""
    parts = _parts(folder)
    total: Any = np.sum([part["sums"] for part in parts], axis=0, dtype=np.float64) / n_positions(folder)
    layers = parts[0]["layers"].tolist()
    return {layer: torch.from_numpy(total[place]).float() for place, layer in enumerate(layers)}


def n_positions(folder: Path) -> int:
    """Over which they are means."""
    return sum(int(part["positions"]) for part in _parts(folder))


def _parts(folder: Path) -> list[Any]:
    return [np.load(path) for path in sorted(folder.glob("????.npz"))]


@torch.no_grad()
def jacobian_sums(model: Any, ids: Tensor, layers: Sequence[int], every: int = EVERY) -> tuple[Tensor, int]:
    """Of each layer, the sum [layer, d_out, d_in] over positions of `ids` [pos], and how many they are."""
    blocks, attended = model.model.layers, dict[int, Tensor]()
    with _second_norms(blocks, attended):
        states = model.model(ids[None], use_cache=False, output_hidden_states=True).hidden_states
    norms = states[layers[0] + 1][0].norm(dim=-1)
    at = torch.tensor([t for t in range(1, len(ids), every) if norms[t] < SINK * norms.median()])
    jacobian, found = torch.eye(states[0].shape[-1]).expand(len(at), -1, -1), {}
    for layer in range(len(blocks) - 1, layers[0], -1):
        block, residual = blocks[layer], states[layer][0]
        of_mlp = torch.bmm(jacobian.bfloat16(), _mlp(block, attended[layer][at])).float()
        jacobian = jacobian + _through_norm(of_mlp, attended[layer][at], block.post_attention_layernorm)
        by_head = (jacobian.bfloat16() @ block.self_attn.o_proj.weight.bfloat16()).bfloat16()
        of_heads = torch.bmm(by_head, _attention(model, block, residual, at).bfloat16()).float()
        jacobian = jacobian + _through_norm(of_heads, residual[at], block.input_layernorm)
        found[layer - 1] = jacobian.sum(0)
    return torch.stack([found[layer] for layer in layers]), len(at)


@contextmanager
def _second_norms(blocks: Any, attended: dict[int, Tensor]) -> Iterator[None]:
    """Keeps what comes to each block's second norm, [pos, d_model]."""

    def keep(layer: int, args: tuple[Tensor, ...]) -> None:
        attended[layer] = args[0][0]

    with ExitStack() as hooks:
        for layer, block in enumerate(blocks):
            norm = block.post_attention_layernorm
            hook = norm.register_forward_pre_hook(lambda _, args, layer=layer: keep(layer, args))
            hooks.callback(hook.remove)
        yield


def _through_norm(change: Tensor, inputs: Tensor, norm: Any) -> Tensor:
    """X times the derivative of x/rms(x), (I − x xᵀ/(d rms²))/rms. X [pos, d_out, d], x [pos, d]; the gain is in X."""
    size = _size(inputs, norm)
    along = torch.bmm(change, inputs[..., None]) / (inputs.shape[-1] * size[..., None] ** 3)
    return torch.baddbmm(change / size[..., None], along, inputs[:, None], alpha=-1)


def _size(inputs: Tensor, norm: Any) -> Tensor:
    return (inputs.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def _mlp(block: Any, attended: Tensor) -> Tensor:
    """W_down diag(..) of gate and up, [pos, d, d]; the norm's gain is in it."""
    norm, mlp = block.post_attention_layernorm, block.mlp
    gate, up = (part.weight * norm.weight for part in (mlp.gate_proj, mlp.up_proj))
    unit = attended / _size(attended, norm)
    before, factor = unit @ gate.T, unit @ up.T
    sigmoid = before.sigmoid()
    slope = sigmoid * (1 + before * (1 - sigmoid)) * factor
    rows = slope.bfloat16()[..., None] * gate.bfloat16() + functional.silu(before).bfloat16()[..., None] * up.bfloat16()
    return torch.matmul(mlp.down_proj.weight.bfloat16(), rows)


def _attention(model: Any, block: Any, residual: Tensor, at: Tensor) -> Tensor:
    """Of what the heads give at positions `at`, by the norm's output there: [place, heads × d_head, d].

    o = Σ pₛ vₛ over the positions s up to t. Own key and value of t, and its query, vary:
    do = p_t dv_t + c Σ pₛ (vₛ − o) kₛᵀ dq + c p_t (v_t − o) qᵀ dk_t, with the scores' factor c.
    """
    attention, norm = block.self_attn, block.input_layernorm
    n, d_head, scale = len(residual), attention.head_dim, attention.scaling
    unit = residual / _size(residual, norm)
    weights = [getattr(attention, f"{name}_proj").weight * norm.weight for name in "qkv"]
    query, key, value = ((unit @ weight.T).view(n, -1, d_head) for weight in weights)
    rotations = _rotations(model, unit, n, d_head)
    query, key = (torch.einsum("tij,thj->thi", rotations, part) for part in (query, key))
    of_query, of_key, of_value = (weight.view(-1, d_head, weight.shape[-1]) for weight in weights)
    groups = len(of_query) // len(of_key)
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    of_key, of_value = (part.repeat_interleave(groups, 0) for part in (of_key, of_value))
    query, rotation = query[at], rotations[at]
    scores = torch.einsum("thi,shi->hts", query, key) * scale
    pattern = scores.masked_fill(torch.arange(n) > at[:, None], -torch.inf).softmax(-1)
    given = torch.einsum("hts,shi->thi", pattern, value)
    own = pattern[:, torch.arange(len(at)), at].T[..., None]
    mixing = torch.einsum("hts,shij->thij", pattern, value[..., None] * key[..., None, :])
    mixing = mixing - given[..., None] * torch.einsum("hts,shj->thj", pattern, key)[..., None, :]
    by_query = torch.einsum("thij,tjk->thik", mixing, rotation) * scale
    by_key = torch.einsum("thk,hkd->thd", torch.einsum("thj,tjk->thk", query, rotation), of_key) * scale
    found = own[..., None] * of_value + torch.einsum("thik,hkd->thid", by_query, of_query)
    return (found + (own * (value[at] - given))[..., None] * by_key[..., None, :]).flatten(1, 2)


def _rotations(model: Any, like: Tensor, n: int, d_head: int) -> Tensor:
    """The rotation of each position as a matrix, [pos, d_head, d_head]."""
    cos, sin = (part[0] for part in model.model.rotary_emb(like[None], torch.arange(n)[None]))
    half = torch.eye(d_head).roll(d_head // 2, 0)
    half[: d_head // 2] *= -1
    return torch.diag_embed(cos) + sin[..., None] * half
