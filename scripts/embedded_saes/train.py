"""A BatchTopK sparse autoencoder, trained on one CPU thread.

The dense products run in bfloat16; the backward pass uses only the (token, feature) pairs that are active,
with gradients written out by hand: several times faster than autograd over the dense [token, feature] matrix.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .collect import D_MODEL
from .text import CONTEXT, load

D_SAE = 4096
SINK_RATIO = 3.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters; `k` features are active per token on average, `dead_after` is in tokens."""

    k: int = 40
    epochs: int = 5
    batch_tokens: int = 2048
    lr: float = 7e-4
    warmup_steps: int = 200
    decay_share: float = 0.3
    aux_coefficient: float = 1 / 32
    aux_k: int = 32
    dead_after: int = 250_000
    seed: int = 1


@dataclass(slots=True)
class Weights:
    """`w_enc`, `w_dec` [d_sae, d_model], one feature per row; `b_enc` [d_sae], `b_dec` [d_model]; fp32."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor

    def all(self) -> list[Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Active (token, feature) pairs of a batch, in token order: `row`, `feature`, `value` are [pair]."""

    row: Tensor
    feature: Tensor
    value: Tensor
    rows: int
    features: int

    def by_token(self, value: Tensor) -> Tensor:
        """Sparse [token, feature]."""
        start = torch.searchsorted(self.row, torch.arange(self.rows + 1))
        return torch.sparse_csr_tensor(start, self.feature, value, (self.rows, self.features))

    def by_feature(self, value: Tensor) -> Tensor:
        """Sparse [feature, token]."""
        order = torch.argsort(self.feature, stable=True)
        start = torch.searchsorted(self.feature[order], torch.arange(self.features + 1))
        return torch.sparse_csr_tensor(start, self.row[order], value[order], (self.features, self.rows))


@dataclass(frozen=True, slots=True)
class Activations:
    """Training residuals [token, d_model] float16 and the rows that are used."""

    values: np.ndarray
    rows: np.ndarray
    sink_norm: float


def training_activations(work: Path, layer: int) -> Activations:
    """Every training position but position 0 and attention sinks (norm above 3 times the median)."""
    values, kept = [], []
    for part, contexts in load(work).items():
        rows = np.load(work / "acts" / f"{part}-{layer}.npy", mmap_mode="r")
        use = np.repeat(~contexts.held_out, CONTEXT)
        use[::CONTEXT] = False
        kept.append(np.flatnonzero(use) + sum(len(block) for block in values))
        values.append(np.asarray(rows))
    joined, rows = np.concatenate(values), np.concatenate(kept)
    norms = np.concatenate(
        [np.linalg.norm(joined[rows[at : at + 65536]].astype(np.float32), axis=1) for at in range(0, len(rows), 65536)]
    )
    sink_norm = float(SINK_RATIO * np.median(norms))
    return Activations(joined, rows[norms <= sink_norm], sink_norm)


class Trainer:
    """One SAE in training. `scale` gives the centred residuals a mean square norm of d_model."""

    def __init__(self, data: Activations, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe
        self.random = np.random.default_rng(recipe.seed)
        sample = self._gather(self.random.choice(data.rows, 50_000, replace=False))
        mean = sample.mean(0)
        self.scale = math.sqrt(D_MODEL / (sample - mean).square().sum(1).mean().item())
        self.weights = self._initial(mean * self.scale)
        for parameter in self.weights.all():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(self.weights.all(), lr=recipe.lr, betas=(0.9, 0.999), fused=True)
        self.threshold = 0.0
        self.idle_tokens = np.zeros(D_SAE, dtype=np.int64)
        self.steps = recipe.epochs * len(data.rows) // recipe.batch_tokens

    def _initial(self, b_dec: Tensor) -> Weights:
        generator = torch.Generator().manual_seed(self.recipe.seed)
        directions = torch.randn(D_SAE, D_MODEL, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        return Weights(directions.clone(), torch.zeros(D_SAE), directions, b_dec)

    def run(self) -> None:
        began, losses = time.monotonic(), []
        for step, rows in enumerate(self._batches()):
            losses.append(self._step(self._gather(rows) * self.scale, self._lr(step)))
            if step % 200 == 199:
                dead = int((self.idle_tokens > self.recipe.dead_after).sum())
                speed = (time.monotonic() - began) / (step + 1)
                fvu = np.mean(losses[-200:]) / D_MODEL
                print(
                    f"{step + 1}/{self.steps} fvu {fvu:.4f} dead {dead} {speed * 1000:.0f} ms/step",
                    flush=True,
                )

    def _batches(self) -> Iterator[np.ndarray]:
        size = self.recipe.batch_tokens
        carried = np.empty(0, dtype=np.int64)
        for _ in range(self.recipe.epochs):
            carried = np.concatenate([carried, self.random.permutation(self.data.rows)])
            while len(carried) >= size:
                yield carried[:size]
                carried = carried[size:]

    def _gather(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.data.values[np.sort(rows)].astype(np.float32))

    def _lr(self, step: int) -> float:
        decay = (self.steps - step) / (self.steps * self.recipe.decay_share)
        return self.recipe.lr * min(1.0, (step + 1) / self.recipe.warmup_steps, max(decay, 0.0))

    def _step(self, x: Tensor, lr: float) -> float:
        w = self.weights
        centred = x - w.b_dec
        pre = torch.addmm(w.b_enc.bfloat16(), centred.bfloat16(), w.w_enc.bfloat16().T).float()
        pairs = self._strongest(pre, self.recipe.k * len(x))
        error = pairs.by_token(pairs.value) @ w.w_dec + w.b_dec - x
        for parameter in w.all():
            parameter.grad.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        self._accumulate(pairs, error * (2 / len(x)), centred, slice(None))
        self._accumulate_aux(pre, error, centred)
        self._update(lr)
        self.idle_tokens += len(x)
        self.idle_tokens[np.unique(pairs.feature.numpy())] = 0
        return error.square().sum(1).mean().item()

    def _strongest(self, pre: Tensor, count: int) -> Pairs:
        """The `count` largest pre-activations of the whole batch, all of them positive."""
        flat = pre.numpy().reshape(-1)
        at = np.flatnonzero(flat > 0.7 * self.threshold)
        if len(at) < count:
            at = np.flatnonzero(flat > 0)
        values = flat[at]
        if len(at) > count:
            self.threshold = max(0.0, float(np.partition(values, len(at) - count)[len(at) - count]))
            keep = values >= self.threshold
            at, values = at[keep], values[keep]
        return _pairs(at, values, *pre.shape)

    def _accumulate(self, pairs: Pairs, grad_out: Tensor, centred: Tensor, features: slice | np.ndarray) -> None:
        """Add the gradients of a loss with derivative `grad_out`, [token, d_model], by the reconstruction."""
        w = self.weights
        dense = grad_out.bfloat16() @ w.w_dec[features].bfloat16().T
        grad_value = dense[pairs.row, pairs.feature].float()
        add = (pairs.by_feature(pairs.value) @ grad_out, pairs.by_feature(grad_value) @ centred)
        w.w_dec.grad[features] += add[0]  # pyright: ignore[reportOptionalSubscript]
        w.w_enc.grad[features] += add[1]  # pyright: ignore[reportOptionalSubscript]
        by_feature = torch.zeros(pairs.features).index_add_(0, pairs.feature, grad_value)
        w.b_enc.grad[features] += by_feature  # pyright: ignore[reportOptionalSubscript]
        if isinstance(features, slice):
            w.b_dec.grad += grad_out.sum(0) - by_feature @ w.w_enc  # pyright: ignore[reportOperatorIssue]

    def _accumulate_aux(self, pre: Tensor, error: Tensor, centred: Tensor) -> None:
        """Dead features learn to rebuild what the others left over."""
        dead = np.flatnonzero(self.idle_tokens > self.recipe.dead_after)
        if len(dead) == 0:
            return
        flat = pre[:, torch.from_numpy(dead)].numpy().reshape(-1)
        count = min(self.recipe.aux_k, max(len(dead) // 2, 1)) * len(pre)
        at = np.sort(np.argpartition(flat, len(flat) - count)[len(flat) - count :])
        pairs = _pairs(at, flat[at], len(pre), len(dead))
        rebuilt = pairs.by_token(pairs.value) @ self.weights.w_dec[dead]
        grad_out = (rebuilt + error) * (2 * self.recipe.aux_coefficient / len(pre))
        self._accumulate(pairs, grad_out, centred, dead)

    def _update(self, lr: float) -> None:
        w = self.weights
        torch.nn.utils.clip_grad_norm_(w.all(), 1.0)
        # The part of the gradient along a decoder row only changes its norm, which stays 1.
        grad = w.w_dec.grad
        assert grad is not None
        grad -= (grad * w.w_dec).sum(1, keepdim=True) * w.w_dec
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        w.w_dec /= w.w_dec.norm(dim=1, keepdim=True)


def _pairs(at: np.ndarray, values: np.ndarray, rows: int, features: int) -> Pairs:
    row, feature = np.divmod(at, features)
    return Pairs(torch.from_numpy(row), torch.from_numpy(feature), torch.from_numpy(values), rows, features)


@torch.no_grad()
def train(work: Path, layer: int, recipe: Recipe) -> None:
    """Write `trained/LAYER.npz`: fp32 weights in residual units, before thresholds are calibrated."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    data = training_activations(work, layer)
    print(f"layer {layer}: {len(data.rows)} positions, sinks above {data.sink_norm:.0f}", flush=True)
    trainer = Trainer(data, recipe)
    began = time.monotonic()
    trainer.run()
    w, scale = trainer.weights, trainer.scale
    folder = work / "trained"
    folder.mkdir(exist_ok=True)
    np.savez(
        folder / f"{layer}.npz",
        w_enc=w.w_enc.numpy(),
        b_enc=w.b_enc.numpy() / scale,
        w_dec=w.w_dec.numpy(),
        b_dec=w.b_dec.numpy() / scale,
        threshold=np.float32(trainer.threshold / scale),
        sink_norm=np.float32(data.sink_norm),
    )
    about = {"positions": len(data.rows), "steps": trainer.steps, "seconds": round(time.monotonic() - began)}
    (folder / f"{layer}.json").write_text(json.dumps(about), encoding="utf-8")
