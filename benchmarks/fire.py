"""Holds under fire: every fault that an attack or a new user has found, tried on a tree of this project.

`python -m benchmarks.fire` tries this tree; `git worktree add ../before 232fc0c` and `--tree ../before` an earlier one,
with the same interpreter and the same probes. Each starts commands and servers of that tree, and says what it saw.
Prints a table as it goes, writes its rows to `benchmarks/results/fire.json`, and ends with 1 if a probe failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import (
    fire_answers,
    fire_batches,
    fire_browsers,
    fire_connections,
    fire_failures,
    fire_signals,
    fire_starts,
    fire_words,
)
from benchmarks.fire_tree import Tree, short
from benchmarks.machine import Load, description
from benchmarks.process import ROOT

RESULTS = Path(__file__).parent / "results" / "fire.json"
PARTS = {
    1: "before the secret",
    2: "bodies",
    3: "browsers",
    4: "memory failures",
    5: "panics, dead workers",
    6: "signals",
    7: "start-up faults",
    8: "batch files",
    9: "friendly operations",
    10: "streamed text",
    11: "messages",
    12: "the suite",
    13: "verify",
}
MODULES = (
    fire_connections,
    fire_browsers,
    fire_failures,
    fire_signals,
    fire_starts,
    fire_batches,
    fire_answers,
    fire_words,
)
Probe = Callable[[Tree], str]
"""Tries one line, which its docstring says; gives what it saw, or raises AssertionError."""


@dataclass(frozen=True)
class Outcome:
    part: int
    name: str
    commit: str
    wanted: str
    holds: bool
    seen: str
    seconds: float


def probes() -> Iterator[tuple[int, Probe]]:
    """All of them, by part."""
    for part in PARTS:
        for module in MODULES:
            for one in module.PROBES.get(part, ()):
                yield part, one


def tried(part: int, probe: Probe, tree: Tree) -> Outcome:
    """What a probe gives; a server that is gone, or does not answer, is a failure like others."""
    started = time.monotonic()
    try:
        holds, seen = True, probe(tree)
    except (AssertionError, httpx.HTTPError, OSError) as exc:
        holds, seen = False, str(exc) or type(exc).__name__
    for place, name in ((tree.folder, "TMP"), (tree.root, "TREE")):
        seen = seen.replace(str(place), name)
    wanted = " ".join((probe.__doc__ or "").split())
    return Outcome(
        part, probe.__name__, tree.commit, wanted, holds, short(seen, 300), round(time.monotonic() - started, 1)
    )


def chosen(names: Sequence[str] | None) -> list[tuple[int, Probe]]:
    """Those of these names, or all. Raises SystemExit for a name that is none."""
    every = list(probes())
    if unknown := set(names or ()) - {one.__name__ for _, one in every}:
        raise SystemExit(f"no probe is called {', '.join(sorted(unknown))}")
    return [(part, one) for part, one in every if not names or one.__name__ in names]


def show(outcome: Outcome) -> None:
    mark = "holds" if outcome.holds else "FAILS"
    print(f"{outcome.part:>2} {mark}  {outcome.name}  ({outcome.seconds:.0f} s)", flush=True)
    print(f"          wanted: {outcome.wanted}\n          seen:   {outcome.seen}", flush=True)


def write(outcomes: Sequence[Outcome], tree: Tree, load: dict[str, Any], out: Path) -> None:
    """Their rows of this tree's table, or of the other's; the rest of the file stays."""
    held: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    which = "this tree" if tree.root == ROOT else "before"
    rows = {row["name"]: row for row in held.get(which, {}).get("probes", ())}
    rows |= {one.name: asdict(one) for one in outcomes}
    kept = [rows[probe.__name__] for _, probe in probes() if probe.__name__ in rows]
    n_failed = sum(not row["holds"] for row in kept)
    head = {"machine": description(), "load": load, "n_probes": len(kept), "n_failed": n_failed}
    held[which] = {**head, "probes": kept}
    out.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fire", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="a worktree; this one by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these probes; the other rows stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table goes")
    wanted = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores it, and its children would too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    tree, load, outcomes = Tree(wanted.tree), Load(), []
    try:
        for part, probe in chosen(wanted.only):
            outcomes.append(tried(part, probe, tree))
            show(outcomes[-1])
    finally:
        tree.close()
    n_failed = sum(not one.holds for one in outcomes)
    print(f"{len(outcomes) - n_failed} of {len(outcomes)} hold at {tree.commit}")
    write(outcomes, tree, load.since(), wanted.out)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
