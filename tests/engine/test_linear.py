"""The other order of a product gives the same numbers, and layers take it only where it was faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from neuronpedia_inference.engine import linear as products
from neuronpedia_inference.engine.engine import ModelEngine
from neuronpedia_inference.engine.protocol import RowSpec
from tests import models
from tests.engine.engines import engine
from tests.engine.test_merging import alone, ids, staggered, steered_rows


@pytest.mark.parametrize(
    "shape", [(1, 7), (1, 1, 7), (2, 1, 7), (3, 7), (2, 4, 7), (30, 7), (128, 7), (129, 7), (3, 90, 7)]
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("product", [products.turned, products.onednn])
def test_the_same_numbers_another_way(product: products.Product, shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(len(shape))
    x, weight = torch.randn(shape), torch.randn(5, 7)
    bias = torch.randn(5) if has_bias else None
    found = product(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", [products.turned, products.onednn])
def test_full_precision_is_kept(product: products.Product) -> None:
    """As near to double precision as torch's own product is; 16 bits or TF32 inside would be 500 times further."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(40, 1536, generator=generator), torch.randn(576, 1536, generator=generator)
    exact = x.double() @ weight.double().t()
    scale = float(exact.abs().max())
    assert float((product(x, weight, None) - exact).abs().max()) < 4e-6 * scale


def test_onednn_is_given_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that it has not seen costs memory for good."""
    sizes: set[int] = set()
    whole = products.functional.pad
    monkeypatch.setattr(products.functional, "pad", lambda rows, by: sizes.add(len(rows) + by[-1]) or whole(rows, by))
    weight = torch.randn(5, 7)
    for n_rows in range(1, 700):
        products.onednn(torch.ones(n_rows, 7), weight, None)
    assert sizes <= set(products._PART_SIZES)
    assert len(products._PART_SIZES) == 30


def pretend(monkeypatch: pytest.MonkeyPatch, fastest: dict[int, products.Product]) -> None:
    """Timings in which these products are faster for these numbers of rows."""

    def seconds(timed: list[products.Product], n_rows: int, layers: list[nn.Linear]) -> Any:
        shapes = {products._shape(layer) for layer in layers}
        return {one: dict.fromkeys(shapes, 0.5 if fastest.get(n_rows) is one else 1.0) for one in timed}

    monkeypatch.setattr(products, "_seconds", seconds)


def test_each_number_of_rows_takes_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []

    def spy(name: str) -> products.Product:
        return lambda x, w, b: used.append((name, len(x))) or linear(x, w, b)

    turned, onednn = spy("turned"), spy("onednn")
    monkeypatch.setattr(products, "turned", turned)
    monkeypatch.setattr(products, "onednn", onednn)
    pretend(monkeypatch, {1: turned, 8: turned, 16: onednn})
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    chosen = products.choose_products(net)
    assert chosen.keys() == {(6, 4), (4, 6)}
    used.clear()
    with torch.inference_mode():
        for n_rows in (1, 2, 4, 5, 6, 7, 9, 16, 17, 500):
            net[0](torch.ones(n_rows, 4))
    assert used == [*[("turned", n) for n in (1, 5, 6, 7)], *[("onednn", n) for n in (9, 16)]]


def test_nothing_changes_where_nothing_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    net = nn.Sequential(nn.Linear(4, 6))
    assert set(products.choose_products(net)[6, 4]) == {products.linear}
    assert "forward" not in vars(net[0])


@pytest.mark.parametrize(
    "broken", [lambda x, w, b: linear(x, w, b) * 1.001, lambda x, w, b: torch.ops.mkldnn.nowhere(x)]
)
def test_a_product_that_is_wrong_or_missing_is_not_used(
    broken: products.Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "onednn", broken)
    pretend(monkeypatch, dict.fromkeys(products.TIMED_ROWS, broken))
    assert set(products.choose_products(nn.Sequential(nn.Linear(4, 6)))[6, 4]) == {products.linear}


def test_gradients_still_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dict.fromkeys(products.TIMED_ROWS, products.onednn))
    net = nn.Sequential(nn.Linear(4, 6))
    products.choose_products(net)
    net(torch.ones(1, 4)).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
@pytest.mark.parametrize("product", [products.turned, products.onednn])
def test_rows_are_the_same_either_way(product: products.Product, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steered between blocks and inside them."""
    pretend(monkeypatch, dict.fromkeys(products.TIMED_ROWS, product))
    with torch.inference_mode(False):
        net = copy.deepcopy(models.model(family))
        products.choose_products(net)
        built = ModelEngine(net, model_id=family, name=family, stop_ids=())
    assert not built.unmerged_because
    for places in (["hook_resid_post"], ["hook_mlp_out"]):
        rows: list[RowSpec] = steered_rows(family, places)
        for row, steps in zip(rows, staggered(built.lane, rows, 2), strict=True):
            assert ids(steps) == alone(family, row)
    layers = [m for m in net.modules() if "forward" in vars(m)]
    assert len(layers) == sum(type(m) is nn.Linear for m in models.model(family).modules())
    assert all(vars(layer)["forward"].__self__ is layer for layer in layers)
    assert not any("forward" in vars(m) for m in models.model(family).modules())
    assert engine(family) is not built


def test_all_are_timed_for_every_shape() -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 96))
    before = net(torch.ones(3, 64))
    chosen = products.choose_products(net)
    assert chosen.keys() == {(96, 64), (64, 96)}
    assert products.described(chosen).count("(") == 2
    with torch.inference_mode():
        torch.testing.assert_close(net(torch.ones(3, 64)), before, rtol=1e-5, atol=1e-6)


def test_a_first_call_that_is_slow_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass a product follows hundreds of its own kind: only then is it as fast as it will be."""
    now_s, last = 0.0, None

    def product(seconds: float, first: float) -> products.Product:
        def takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            nonlocal now_s, last
            now_s += seconds if last is takes else first
            last = takes
            return linear(x, weight, bias)

        return takes

    monkeypatch.setattr(products, "_clock", lambda: now_s)
    steady, warms_up = product(2.0, 2.0), product(1.0, 50.0)
    taken = products._seconds([steady, warms_up], 64, [nn.Linear(8, 6) for _ in range(5)])
    assert taken == {steady: {(6, 8): 2.0}, warms_up: {(6, 8): 1.0}}


def test_what_was_chosen_before_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    pretend(monkeypatch, {1: products.turned, 8: products.onednn})
    names = products.names_of(products.choose_products(net))
    assert {tuple(listed) for listed in names.values()} == {
        ("turned", "linear", "linear", "onednn", "linear", "linear")
    }

    def timed(*_: object) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr(products, "_seconds", timed)
    again = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    assert products.names_of(products.choose_products(again, names)) == names
    for remembered in ({}, {"6x8": names["6x8"]}, {**names, "4x6": ["linear"]}, {**names, "4x6": ["nothing"] * 6}):
        with pytest.raises(AssertionError, match="timed again"):
            products.choose_products(again, remembered)


def test_what_was_chosen_before_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build of torch may lack a product, or have it wrong."""
    net = nn.Sequential(nn.Linear(8, 6))
    monkeypatch.setattr(products, "_is_right", lambda product, *_: product is not products.turned)
    pretend(monkeypatch, {})
    chosen = products.choose_products(net, {"6x8": ["turned"] * len(products.TIMED_ROWS)})
    assert set(chosen[6, 8]) == {products.linear}
