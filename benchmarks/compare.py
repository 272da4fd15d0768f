"""This project over HTTP and in process, plain Hugging Face and `interp-engine`: the same work on the same weights.

`python -m benchmarks.compare` writes `benchmarks/results/compare.json`; `scripts/render_docs.py` makes the table and
the plot from it. Each contender is a process of its own with one thread, and only one works at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import peer_setup
from benchmarks.acceptance import judged
from benchmarks.agreement import difference
from benchmarks.cases import FLOOR, HTTP, IN_PROCESS, PEER, Case, cases
from benchmarks.machine import Load, description
from benchmarks.process import Child, Process
from benchmarks.served import Served

RESULTS = Path(__file__).parent / "results" / "compare.json"
SETTINGS = {"NUM_THREADS": "1", "TOKEN_LIMIT": "640", "MAX_TOKENS": "4096", "REUSE_MEMORY_GIB": "0"}
"""Every round asks the same: what a server keeps of the round before would be its answer."""
LEFT_OUT = "left out of this run (`--without-peer`)"


class Contender(Protocol):
    def ask(self, line: dict[str, Any]) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass
class Measured:
    """One contender at one case."""

    ms: list[float] = field(default_factory=list)
    answer: Any = None
    problem: dict[str, str] | None = None
    """Why there is no time: `not_offered`, `disagrees` or `failed`."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.ms) if self.ms and not self.problem else None

    def as_json(self) -> dict[str, Any]:
        if self.problem:
            return dict(self.problem)
        times = {"ms": statistics.median(self.ms), "min_ms": min(self.ms), "max_ms": max(self.ms)}
        return {**{name: round(value, 2) for name, value in times.items()}, "samples": len(self.ms)}


Table = dict[tuple[str, str], Measured]


def main() -> None:
    chosen = _arguments()
    load = Load()
    with ExitStack() as stack:
        contenders, versions = _started(stack, chosen)
        table = compared(list(cases()), contenders, chosen.rounds)
    body = {
        "machine": {**description(), **load.since()},
        "rounds": chosen.rounds,
        "versions": versions,
        "peer_left_out": LEFT_OUT if chosen.without_peer else None,
        "cases": [_case_json(case, table, _asked(case, contenders)) for case in cases()],
        "acceptance": list(judged(_medians(table), {key: one.answer for key, one in table.items()})),
    }
    chosen.output.parent.mkdir(exist_ok=True)
    chosen.output.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _say(f"Wrote {chosen.output}; `python scripts/render_docs.py` renders it")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up and compares")
    parser.add_argument("--without-peer", action="store_true", help="leave interp-engine out; the result says so")
    parser.add_argument("--peer-venv", type=Path, default=peer_setup.FOLDER, help="virtual environment of the peer")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: at least one round is needed")
    return chosen


def _started(stack: ExitStack, chosen: argparse.Namespace) -> tuple[dict[str, Contender], dict[str, Any]]:
    """Every contender, loaded, and the versions that it names."""
    from neuronpedia_inference.embedded import SAES_DIR
    from neuronpedia_inference.embedded.weights import model_folder

    files = (str(model_folder()), str(SAES_DIR))
    python = None if chosen.without_peer else peer_setup.python_of(chosen.peer_venv)
    children = {IN_PROCESS: Process("benchmarks.ours", env=SETTINGS), FLOOR: Process("benchmarks.plain", *files)}
    if python is not None:
        children[PEER] = Process("benchmarks.peer", *files, python=python)
    server = Process("neuronpedia_inference", "serve", "--port", "0", env=SETTINGS)
    for process in (*children.values(), server):
        stack.callback(process.close)
    loaded = {name: Child(process) for name, process in children.items()}
    served = Served(server)
    stack.callback(served.close)
    versions = {name: child.versions for name, child in loaded.items()}
    return {HTTP: served, **loaded}, {HTTP: versions[IN_PROCESS], **versions}


def compared(wanted: list[Case], contenders: Mapping[str, Contender], rounds: int) -> Table:
    """Every case by every contender that may try it: one round to agree, then `rounds` timed ones in turns."""
    table = {(case.name, name): Measured() for case in wanted for name in _asked(case, contenders)}
    for case in wanted:
        _agree(case, contenders, table)
    for number in range(rounds):
        for case in wanted:
            for name in _order(_asked(case, contenders), number):
                measured = table[case.name, name]
                if measured.problem is None:
                    _take(case, contenders[name].ask({**case.line(), "times": case.repeats}), measured)
        _say(f"Round {number + 1} of {rounds} is done")
    return table


def _agree(case: Case, contenders: Mapping[str, Contender], table: Table) -> None:
    """The first round: everybody warms up, and whoever differs from the floor is out of this case."""
    for name in sorted(_asked(case, contenders), key=lambda one: one != FLOOR):
        measured = table[case.name, name]
        _take(case, contenders[name].ask({**case.line(), "times": 1}), measured)
        measured.ms.clear()
        if measured.problem is None:
            measured.problem = _disagreement(case, measured.answer, table)
        if measured.problem is not None:
            _say(f"{case.name}, {name}: {measured.problem}")


def _disagreement(case: Case, answer: Any, table: Table) -> dict[str, str] | None:
    # Others that decode change nothing in a first token, and the floor knows only the token that comes alone.
    floor = table["first_idle" if case.name == "first_busy" else case.name, FLOOR]
    if floor.problem is not None:
        return {"failed": "the floor has no answer to compare with"}
    differs = difference(case.line()["kind"], answer, floor.answer)
    return {"disagrees": differs} if differs else None


def _asked(case: Case, contenders: Mapping[str, Contender]) -> list[str]:
    return [name for name in contenders if name in case.who]


def _take(case: Case, reply: dict[str, Any], measured: Measured) -> None:
    if "ms" not in reply:
        measured.problem = reply
        return
    measured.ms += reply["ms"]
    if measured.answer is None:
        measured.answer = reply["answer"]
    elif differs := difference(case.line()["kind"], reply["answer"], measured.answer):
        measured.problem = {"disagrees": f"with its own earlier answer: {differs}"}


def _order(names: list[str], number: int) -> Iterator[str]:
    """Each round another one begins: who comes later may find warmer caches."""
    start = number % len(names)
    yield from names[start:] + names[:start]


def _medians(table: Table) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (case, contender), measured in table.items():
        if measured.median is not None:
            found.setdefault(case, {})[contender] = measured.median
    return found


def _case_json(case: Case, table: Table, asked: list[str]) -> dict[str, Any]:
    floor = table[case.name, FLOOR].median
    results = {name: table[case.name, name].as_json() for name in asked}
    for name, result in results.items():
        median = table[case.name, name].median
        if median is not None and floor is not None:
            result["to_floor"] = round(median / floor, 3)
    return {"name": case.name, "title": case.title, "floor": case.floor, "results": results}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
