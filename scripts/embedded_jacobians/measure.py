"""Whether the Jacobians are what they are said to be, and whether their lens says more than the logit lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fit import jacobian_sums

STEP = 1e-2
"""Of a finite difference, by the norm of the state."""
DIRECTIONS = 4
EVERY = 4
"""Of the positions of held-out texts, one in so many is looked at."""


@torch.no_grad()
def against_differences(
    model: Any, jacobians: Mapping[int, Tensor], ids: np.ndarray, layers: Sequence[int]
) -> dict[str, Any]:
    """Correlations with central differences of the plain model, along random directions, on one prompt [pos].

    own: of the Jacobian of this prompt, by the same formula as the fit; fitted: of the fitted one, which is a mean over
    other prompts. Both and the differences are means over the prompt's positions but the first.
    """
    tokens = torch.from_numpy(ids)
    sums, n_positions = jacobian_sums(model, tokens, layers, every=1)
    own = sums / n_positions
    states = model.model(tokens[None], use_cache=False, output_hidden_states=True).hidden_states
    chance = torch.Generator().manual_seed(5)
    found = {}
    for place, layer in enumerate(layers):
        directions = torch.randn(DIRECTIONS, own.shape[-1], generator=chance)
        directions /= directions.norm(dim=-1, keepdim=True)
        differences = torch.stack([_difference(model, states[layer + 1][0], layer, one) for one in directions])
        found[str(layer)] = {
            "own": _correlation(differences, directions @ own[place].T),
            "fitted": _correlation(differences, directions @ jacobians[layer].T),
        }
    return found


def _difference(model: Any, state: Tensor, layer: int, direction: Tensor) -> Tensor:
    """Mean over positions of what the last block gives there, by a step along `direction` behind block `layer`."""
    n = len(state)
    at = torch.arange(1, n)
    steps = torch.zeros(n - 1, n, 1)
    steps[at - 1, at, 0] = STEP * state[1:].norm(dim=-1)
    both = [_from(model, state + sign * steps * direction, layer)[at - 1, at] for sign in (1, -1)]
    return ((both[0] - both[1]) / (2 * steps[at - 1, at])).mean(0)


def _from(model: Any, states: Tensor, layer: int) -> Tensor:
    """What the last block gives, [row, pos, d_model], of other states behind block `layer`."""
    n = states.shape[1]
    mask = torch.full((n, n), torch.finfo(states.dtype).min).triu(1)[None, None]
    rotation = model.model.rotary_emb(states, torch.arange(n)[None])
    for block in model.model.layers[layer + 1 :]:
        states = block(states, attention_mask=mask, position_embeddings=rotation)
    return states


def _correlation(one: Tensor, other: Tensor) -> float:
    return round(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]), 4)


@torch.no_grad()
def agreement(model: Any, jacobians: Mapping[int, Tensor], texts: np.ndarray) -> dict[str, Any]:
    """By layer, the share of positions where a lens's likeliest token is the model's. texts: [text, pos]"""
    looked_at = slice(1, None, EVERY)
    by_layer: dict[int, list[Tensor]] = {layer: [] for layer in jacobians}
    said: list[Tensor] = []
    for ids in texts:
        output = model(torch.from_numpy(ids)[None], use_cache=False, output_hidden_states=True)
        said.append(output.logits[0, looked_at].argmax(-1))
        for layer, states in by_layer.items():
            states.append(output.hidden_states[layer + 1][0, looked_at])
    wanted = torch.cat(said)
    found: dict[str, Any] = {"positions": len(wanted), "layers": {}}
    for layer, states in by_layer.items():
        seen = torch.cat(states)
        found["layers"][str(layer)] = {
            "logit_lens": _share(model, seen, wanted),
            "jacobian_lens": _share(model, seen @ jacobians[layer].half().float().T, wanted),
        }
    return found


def _share(model: Any, states: Tensor, wanted: Tensor) -> float:
    said = torch.cat([model.lm_head(model.model.norm(part)).argmax(-1) for part in states.split(256)])
    return round(float((said == wanted).float().mean()), 4)
