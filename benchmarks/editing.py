"""What edits, conditions and watches cost in a decode step of the embedded model.

`python -m benchmarks.editing` prints the numbers and writes `benchmarks/results/editing.json`. Lanes of as many rows at
the same lengths take turns: plain rows; rows that each clamp a feature of their own on a condition of its own and watch
five features; rows with 1, 2, 4, 8 and 16 different plans.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Load, description
from benchmarks.sampling import alternating, over
from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.edits.plan import Do, Edit, Feature, Fires, Plan
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.protocol import RowId, RowSpec
from neuronpedia_inference.loading import Loaded, load
from neuronpedia_inference.resolving.edits import EditResolver
from neuronpedia_inference.resolving.watches import WatchResolver
from neuronpedia_inference.saes.shelf import Shelf
from neuronpedia_inference.scheduler.jobs import Steps
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.watches.plan import WatchPlan

RESULTS = Path(__file__).parent / "results" / "editing.json"
TEXT = "The most important thing is"
CLAMPED, CONDITION = "15-res-4k", "10-res-4k"
N_TOKENS, N_WATCHES = 4000, 5


class Rows:
    """Specs by hand, where a request would make them."""

    def __init__(self, loaded: Loaded, held: ExitStack) -> None:
        shelf = Shelf(loaded.store, loaded.engine, loaded.annotations, loaded.newcomers)
        self._edits = EditResolver(loaded.engine, shelf, loaded.codec.special_ids)
        self._watches = WatchResolver(loaded.engine, shelf, loaded.jacobians, max_top_k=256)
        self._engine, self._held = loaded.engine, held
        self._prompt: Tokens = loaded.codec.tokenize(TEXT, "once", limit=100)

    def plain(self, n: int) -> list[RowSpec]:
        return [RowSpec(self._prompt.ids, Sampling(N_TOKENS))] * n

    def edited(self, n: int, n_plans: int, *, waits: bool) -> list[RowSpec]:
        """waits: on a condition each."""
        plans = [self._plan(number % n_plans, waits=waits) for number in range(n)]
        return [RowSpec(self._prompt.ids, Sampling(N_TOKENS), done(self._edits.resolve(plan))) for plan in plans]

    def watched(self, specs: list[RowSpec]) -> list[RowSpec]:
        """Five features each, of the clamped source."""
        return [self._watched(spec, number) for number, spec in enumerate(specs)]

    def _plan(self, number: int, *, waits: bool) -> Plan:
        when = Fires(Feature(CONDITION, 50 + number), 0.5, n_tokens=None) if waits else None
        return Plan((Edit(Do.CLAMP, Feature(CLAMPED, 100 + number), 5.0, when=when),))

    def _watched(self, spec: RowSpec, number: int) -> RowSpec:
        plan = WatchPlan.of([self._watches.feature(CLAMPED, 200 + 10 * number + n) for n in range(N_WATCHES)])
        found = done(self._watches.readings(plan, self._held))
        return replace(
            spec, watches=tuple(self._engine.watch(one.point, found[one], before=True) for one in plan.reads)
        )


def done(steps: Steps) -> Any:
    """What the worker would make of it, waiting for weights on the spot."""
    value = None
    while True:
        try:
            awaited = steps.send(value)
        except StopIteration as end:
            return end.value
        value = None if awaited is None else awaited.result(600)


def measured(n_steps: int) -> dict[str, Any]:
    loaded = load(Settings.read(num_threads=1), lambda _: None)
    decoder = replace(loaded.engine.decoder, stop_ids=frozenset())
    with ExitStack() as held:
        rows = Rows(loaded, held)

        def lane(specs: list[RowSpec]) -> Any:
            made = Lane.merging(decoder, MaskForm.ADDITIVE)
            made.prefill([(RowId(n, 0), spec) for n, spec in enumerate(specs)])
            return made.decode

        eight = {"plain": rows.plain(8), "edited": rows.watched(rows.edited(8, 8, waits=True))}
        sixteen = {f"{n} plans": rows.edited(16, n, waits=False) for n in (1, 2, 4, 8, 16)}
        found = {
            "eight_rows": over("plain", alternating({name: lane(of) for name, of in eight.items()}, n_steps)),
            "sixteen_rows": over("1 plans", alternating({name: lane(of) for name, of in sixteen.items()}, n_steps)),
        }
    loaded.store.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of every lane")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    machine = Load()
    with torch.inference_mode():
        found = measured(chosen.steps)
    body = {"machine": {**description(), **machine.since()}, **found}
    print(json.dumps(body, indent=2))
    chosen.output.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
