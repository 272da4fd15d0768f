"""Products of rows with weights, as fast as this machine's libraries can.

torch multiplies matrices on a CPU with one library, MKL, which is far from the speed of memory and of the cores on some
processors. Two others give the same numbers up to rounding: oneDNN, which torch has too, and, for few rows, the same
product turned around, (W xᵀ)ᵀ. All are timed at start on the loaded weights, for every shape of weight and several
numbers of rows, and each linear layer takes the fastest.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

TIMED_ROWS = (1, 2, 4, 8, 16, 64)
"""What is fastest for one of these is taken for all numbers of rows down to the one before, and from the last on."""
TIMED_BY = "the thread's own time, in turns, the median layer"
"""What was chosen another way is chosen again."""
_PART_SIZES = (*range(1, 9), *range(12, 33, 4), *range(40, 65, 8), *range(80, 257, 16))
_PART_ROWS = _PART_SIZES[-1]
_AHEAD_NUMBERS = 2**29
_TIMED_BYTES, _TIMED_BYTES_MANY_ROWS = 2**27, 2**25
"""Weights that are timed in turn: several times what a cache holds, as in a real step. With many rows time goes into
arithmetic, whatever the cache holds.
"""
_ROUNDS = 3
_CHECKED_ROWS = (1, 3, 40)
_CHECKED_AGAIN_ROWS = (3,)
_MUST_SAVE = 0.1
_IS_FINE = time.get_clock_info("thread_time").resolution < 1e-6
_clock = time.thread_time if _IS_FINE else time.perf_counter
"""Of the thread that computes: it stands still while other processes have its core."""

Shape = tuple[int, int]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""[..., in], weight [out, in], bias [out] or None -> [..., out]"""
Chosen = tuple[Product, ...]
"""One for each of TIMED_ROWS."""
Names = Mapping[str, Sequence[str]]
"""Names of the products by `<out>x<in>`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own."""
    return functional.linear(x, weight, bias)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(W xᵀ)ᵀ"""
    rows = x.reshape(-1, x.shape[-1])
    n_rows = len(rows)
    if n_rows == 1:
        rows = torch.cat((rows, rows))  # a single one takes another way inside, which is slow
    product = torch.mm(weight, rows.t())[:, :n_rows].t().contiguous()
    return (product if bias is None else product.add_(bias)).view(*x.shape[:-1], -1)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, in full precision. An operator of torch's compiler: not every build has it.

    It compiles a kernel for every number of rows and keeps it, most of a MiB each. So rows go in parts of few sizes.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = [_onednn_part(part, weight, bias) for part in rows.split(_PART_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)


def _onednn_part(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n_rows = len(rows)
    size = _PART_SIZES[bisect_left(_PART_SIZES, n_rows)]
    padded = rows if size == n_rows else functional.pad(rows, (0, 0, 0, size - n_rows))
    return torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")[:n_rows]


def choose_products(model: nn.Module, remembered: Names | None = None) -> dict[Shape, Chosen]:
    """Time the products for every shape of linear layer, and let the model's layers use the fastest.

    For models on a CPU, under the number of threads that will be used. Gives what was chosen by [out, in]. What was
    chosen before, on a like machine for like weights, is not timed again, but checked again.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    with torch.inference_mode():
        chosen = _remembered(remembered or {}, layers) or _fastest(layers)
        _compile_ahead({_shape(layer): layer for layer in layers}, chosen)
    for layer in layers:
        if any(product is not linear for product in chosen[_shape(layer)]):
            layer.forward = MethodType(partial(_forward, chosen[_shape(layer)]), layer)
    return chosen


def names_of(chosen: Mapping[Shape, Chosen]) -> Names:
    """What was chosen, to be remembered."""
    return {_key(shape): [product.__name__ for product in products] for shape, products in chosen.items()}


def described(chosen: Mapping[Shape, Chosen]) -> str:
    """One line for the log: by shape, the product for each of TIMED_ROWS."""
    return "; ".join(f"{shape}: {' '.join(product.__name__ for product in chosen[shape])}" for shape in chosen)


@contextmanager
def torch_products() -> Iterator[None]:
    """Every layer takes torch's own product inside, whatever was the fastest at this start."""
    token = _FIXED.set(True)
    try:
        yield
    finally:
        _FIXED.reset(token)


_FIXED: ContextVar[bool] = ContextVar("fixed_products", default=False)


def _forward(chosen: Chosen, layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or _FIXED.get():
        return linear(x, layer.weight, layer.bias)
    return _of(chosen, x.numel() // x.shape[-1])(x, layer.weight, layer.bias)


def _shape(layer: nn.Linear) -> Shape:
    return layer.out_features, layer.in_features


def _key(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _remembered(names: Names, layers: Sequence[nn.Linear]) -> dict[Shape, Chosen] | None:
    """The products of these names, if they are known for every shape and give the right numbers here."""
    by_name = {product.__name__: product for product in (linear, turned, onednn)}
    chosen: dict[Shape, Chosen] = {}
    for layer in layers:
        listed = names.get(_key(_shape(layer)), ())
        if len(listed) != len(TIMED_ROWS) or not by_name.keys() >= set(listed):
            return None
        chosen[_shape(layer)] = tuple(by_name[name] for name in listed)
    others = {product for products in chosen.values() for product in products} - {linear}
    return chosen if all(_is_right(product, layers, _CHECKED_AGAIN_ROWS) for product in others) else None


def _timed(layers: Sequence[nn.Linear], most_bytes: int) -> list[nn.Linear]:
    """The first layers, as many as are enough, and one of every other shape."""
    timed: list[nn.Linear] = []
    n_bytes, shapes = 0, set()
    for layer in layers:
        if n_bytes < most_bytes or _shape(layer) not in shapes:
            timed.append(layer)
            n_bytes += layer.weight.nbytes
            shapes.add(_shape(layer))
    return timed


def _fastest(layers: Sequence[nn.Linear]) -> dict[Shape, Chosen]:
    candidates = [product for product in (turned, onednn) if _is_right(product, layers)]
    chosen: dict[Shape, list[Product]] = {_shape(layer): [] for layer in layers}
    for n_rows in TIMED_ROWS:
        timed = _timed(layers, _TIMED_BYTES if n_rows <= 8 else _TIMED_BYTES_MANY_ROWS)
        taken = _seconds((linear, *candidates), n_rows, timed)
        for shape, products in chosen.items():
            best = min(candidates, key=lambda product, shape=shape: taken[product][shape], default=linear)
            saves = best is not linear and taken[best][shape] < (1 - _MUST_SAVE) * taken[linear][shape]
            products.append(best if saves else linear)
    return {shape: tuple(products) for shape, products in chosen.items()}


def _compile_ahead(layers: Mapping[Shape, nn.Linear], chosen: Mapping[Shape, Chosen]) -> None:
    """Let oneDNN make the kernels that will be wanted, so that neither time nor memory goes to them later."""
    for shape, layer in layers.items():
        for n_rows in _PART_SIZES:
            is_small = n_rows * layer.weight.numel() < _AHEAD_NUMBERS  # the unembedding runs on few rows
            if is_small and _of(chosen[shape], n_rows) is onednn:
                x = torch.ones(n_rows, layer.in_features, dtype=layer.weight.dtype)
                onednn(x, layer.weight, layer.bias)


def _of(chosen: Chosen, n_rows: int) -> Product:
    return chosen[min(bisect_left(TIMED_ROWS, n_rows), len(TIMED_ROWS) - 1)]


def _is_right(product: Product, layers: Sequence[nn.Linear], rows: Sequence[int] = _CHECKED_ROWS) -> bool:
    """Whether this build of torch has it, and it gives the numbers of `linear` up to rounding."""
    for layer in {_shape(layer): layer for layer in layers}.values():
        generator = torch.Generator().manual_seed(0)
        for n_rows in rows:
            x = torch.randn(n_rows, layer.in_features, generator=generator).to(layer.weight.dtype)
            usual = linear(x, layer.weight, layer.bias).float()
            try:
                other = product(x, layer.weight, layer.bias).float()
            except (RuntimeError, AttributeError, NotImplementedError):
                return False
            allowed = 1e-5 if layer.weight.dtype == torch.float32 else 2e-2
            if float((other - usual).abs().max()) > allowed * float(usual.abs().max()):
                return False
    return True


def _seconds(
    products: Sequence[Product], n_rows: int, layers: Sequence[nn.Linear]
) -> dict[Product, dict[Shape, float]]:
    """By product and shape, the median layer's fastest round: what disturbs a round only makes it slower.

    The products take turns, so that what lasts longer than a round is in all of them. The first of a kind may take some
    milliseconds more than the next, which in a real pass is one of hundreds.
    """
    inputs = {_shape(one): torch.ones(n_rows, one.in_features, dtype=one.weight.dtype) for one in layers}
    best = {product: [math.inf] * len(layers) for product in products}
    for product in [*products] * _ROUNDS:
        for place, layer in enumerate(layers):
            started = _clock()
            product(inputs[_shape(layer)], layer.weight, layer.bias)
            best[product][place] = min(best[product][place], _clock() - started)
    return {product: _medians(layers, seconds) for product, seconds in best.items()}


def _medians(layers: Sequence[nn.Linear], seconds: Sequence[float]) -> dict[Shape, float]:
    by_shape: dict[Shape, list[float]] = {}
    for layer, taken in zip(layers, seconds, strict=True):
        by_shape.setdefault(_shape(layer), []).append(taken)
    return {shape: statistics.median(taken) for shape, taken in by_shape.items()}
