"""Write the table of prices anew from what `modal billing rates` tells the account that is logged in.

    python scripts/refresh_prices.py

Rates are named by Modal. One that names a GPU of the table is taken if it is within a factor of three of the price
known, by the hour or by the second; any other is shown and changes nothing.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

from neuronpedia_inference.prices import TABLE

PLAUSIBLE = 3
MODAL = Path(sys.executable).with_name("modal")


def main() -> int:
    """Exit code 1 where no rates can be had or none is understood."""
    asked = subprocess.run([str(MODAL), "billing", "rates", "--json"], capture_output=True, text=True, check=False)
    if asked.returncode:
        print(f"modal billing rates: {(asked.stderr or asked.stdout).strip()}", file=sys.stderr)
        return 1
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rates = {name: Decimal(rate) for name, rate in json.loads(asked.stdout).items()}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = understood({gpu: row["usd_per_hour"] for gpu, row in table.items()}, rates)
    for gpu, hourly in found.items():
        table[gpu] = {"usd_per_hour": hourly, "seen": today}
        print(f"{gpu}: {hourly} an hour")
    if not found:
        print(f"None of these rates is understood: {', '.join(rates) or 'there are none'}", file=sys.stderr)
        return 1
    TABLE.write_text(render(table), encoding="utf-8")
    return 0


def understood(known: Mapping[str, float], rates: Mapping[str, Decimal]) -> dict[str, float]:
    """US dollars an hour of every GPU in `known` that exactly one rate is about."""
    found: dict[str, float] = {}
    for gpu, before in known.items():
        about = {_hourly(rate, before) for name, rate in rates.items() if _names(name, gpu)} - {None}
        if len(about) == 1:
            found[gpu] = round(float(about.pop() or 0), 4)
    return found


def render(table: Mapping[str, Mapping[str, object]]) -> str:
    """One GPU a line."""
    rows = (f"  {json.dumps(gpu)}: {json.dumps(row)}" for gpu, row in table.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _names(rate: str, gpu: str) -> bool:
    """Whether a rate has the GPU in its name, as a word: `gpu_a100_40gb` is about neither A100-80GB nor A10."""
    wanted = r"[-_ ]?".join(re.escape(part) for part in gpu.split("-"))
    return re.search(rf"(?<![a-z0-9]){wanted}(?![a-z0-9])", rate, re.IGNORECASE) is not None


def _hourly(rate: Decimal, before: float) -> Decimal | None:
    for hourly in (rate, rate * 3600):
        if before / PLAUSIBLE <= float(hourly) <= before * PLAUSIBLE:
            return hourly
    return None


if __name__ == "__main__":
    raise SystemExit(main())
