"""The table of prices is dated, covers what `plan` recommends, and its arithmetic is that of the benchmark."""

from __future__ import annotations

import importlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from neuronpedia_inference import prices
from neuronpedia_inference.cli import app
from neuronpedia_inference.memory import GPUS

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / "benchmarks" / "results" / "compare.json"


@pytest.fixture
def refresh_prices(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("refresh_prices")


def test_every_gpu_has_a_dated_price() -> None:
    table = prices.prices()
    assert table.keys() == GPUS.keys()
    assert all(price.seen.startswith("20") and price.usd_per_hour > 0 for price in table.values())


def test_gpus_go_from_the_cheapest_to_the_dearest() -> None:
    """`plan` takes the first that fits."""
    known = [prices.prices()[gpu].usd_per_hour for gpu in GPUS]
    assert known == sorted(known)


@pytest.mark.parametrize(("asked", "same"), [("H100!", "H100"), ("B200+", "B200"), ("A100", "A100-40GB")])
def test_other_ways_to_ask_for_a_gpu(asked: str, same: str) -> None:
    assert prices.price_of(asked) == prices.prices()[same]


def test_the_pace_is_the_benchmark_s() -> None:
    cases = {case["name"]: case["results"] for case in json.loads(BENCHMARK.read_text(encoding="utf-8"))["cases"]}
    assert pytest.approx(cases["steers_together"]["http"]["ms"] / 8e3, abs=1e-3) == prices.STEERED_TEXT_S
    assert pytest.approx(cases["features_together"]["http"]["ms"] / 16e3, abs=1e-3) == prices.FEATURE_S


def test_an_hour_pays_for_its_seconds() -> None:
    one = prices.costs(3.6, 2 * 10**9)
    assert one.hour * 24 == one.idle_day
    assert one.cold_start == pytest.approx((prices.RESTORED_START_S + 2) / 1000)
    assert one.steered_texts == pytest.approx(prices.STEERED_TEXT_S)
    assert one.features == pytest.approx(prices.FEATURE_S)


def test_plan_names_the_costs() -> None:
    said = CliRunner().invoke(app, ["plan"]).output
    hour, day = prices.prices()["T4"].usd_per_hour, 24 * prices.prices()["T4"].usd_per_hour
    assert f"{hour:.2f}" in said
    assert f"{day:.2f}" in said
    assert all(word in said for word in ("idle day", "cold start", "1000 steered texts", prices.prices()["T4"].seen))


def test_rates_of_an_account_are_understood_or_left(refresh_prices: Any) -> None:
    known = {"A10": 1.1, "A100-40GB": 2.1, "A100-80GB": 2.5, "T4": 0.59}
    rates = {
        "gpu_a10": "1.2",
        "GPU A100-80GB": "0.0007",
        "gpu-a100-40gb": "900",
        "cpu_core": "0.04",
        "t4": "0.5",
        "T4 (reserved)": "0.4",
    }
    found = refresh_prices.understood(known, {name: Decimal(rate) for name, rate in rates.items()})
    assert found == {"A10": 1.2, "A100-80GB": 2.52}


def test_the_table_reads_back_as_it_was_written(refresh_prices: Any) -> None:
    text = prices.TABLE.read_text(encoding="utf-8")
    table = json.loads(text)
    assert json.loads(refresh_prices.render(table)) == table
