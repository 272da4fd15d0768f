"""What Modal's GPUs cost an hour, and what that makes of a deployment. The table is `prices.json`.

`python scripts/refresh_prices.py` writes it anew from what `modal billing rates` tells an account. CPU and memory of
the containers come on top.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("prices.json")

VOLUME_BYTES_PER_S = 10**9
"""The lower of the rates that Modal publishes for reading a volume."""
RESTORED_START_S = 0.5
"""From the snapshot to being ready where the device comes with the restore, on one CPU core with the embedded model
(docs/experiments.md)."""
STEERED_TEXT_S = 1.772 / 8
"""One of eight texts of 32 tokens, steered at once, on one CPU core with the embedded model (docs/benchmarks.md)."""
FEATURE_S = 0.269 / 16
"""One feature of a prompt of 19 tokens, eight requests at a time, measured as the above."""


@dataclass(frozen=True)
class Price:
    """Of one GPU, by the hour, and when it was seen."""

    usd_per_hour: float
    seen: str


@dataclass(frozen=True)
class Costs:
    """US dollars for the GPU of one container."""

    hour: float
    idle_day: float
    """With MIN_CONTAINERS=1 and no requests."""
    cold_start: float
    """Until it answers; it then waits for SCALEDOWN_WINDOW as well."""
    steered_texts: float
    """A thousand, at the pace of the benchmark's CPU."""
    features: float
    """A thousand, at the pace of the benchmark's CPU."""


@cache
def prices() -> dict[str, Price]:
    """By the name of the GPU."""
    return {name: Price(**row) for name, row in json.loads(TABLE.read_text(encoding="utf-8")).items()}


def price_of(gpu: str) -> Price | None:
    """Of a GPU as Modal is asked for it: `H100!` and `B200+` cost as the plain ones, A100 is the one with 40 GB."""
    name = gpu.rstrip("!+")
    return prices().get("A100-40GB" if name == "A100" else name)


def costs(usd_per_hour: float, bytes_read: int) -> Costs:
    """bytes_read: weights, which a start reads from the volume; of SAEs it reads headers."""
    second = usd_per_hour / 3600
    start_s = RESTORED_START_S + bytes_read / VOLUME_BYTES_PER_S
    return Costs(
        hour=usd_per_hour,
        idle_day=24 * usd_per_hour,
        cold_start=start_s * second,
        steered_texts=1000 * STEERED_TEXT_S * second,
        features=1000 * FEATURE_S * second,
    )
