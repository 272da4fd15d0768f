"""This tree beside an earlier one, in turns: the comparison's cases, one pair of times after the other.

`git worktree add ../before COMMIT`, then `python -m benchmarks.before ../before` writes
`benchmarks/results/before.json`. A pair's ratio is this tree's time by the other's, taken one after the other, and who
begins alternates. The interval of the median ratio is the one of the order statistics: it assumes nothing about how
times are distributed. Two processes of the same tree differ by several percent, by where their memory lies and which
products a moment's timing chose: pairs come from several starts of both, and of each start's own median is told too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases import HTTP, IN_PROCESS, Case, cases
from benchmarks.compare import SETTINGS, Contender
from benchmarks.machine import Load, description
from benchmarks.process import Child, Process
from benchmarks.served import Served

RESULTS = Path(__file__).parent / "results" / "before.json"
BOUND = 1.05
COVERED = 0.90
Trees = tuple[Contender, Contender]
"""This one and the earlier one."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="a worktree of the earlier commit")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of times for every case, of each start")
    parser.add_argument("--starts", type=int, default=1, help="of both trees, one after the other")
    parser.add_argument("--doors", nargs="+", choices=(IN_PROCESS, HTTP), default=(IN_PROCESS, HTTP))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result goes")
    chosen = parser.parse_args()
    load = Load()
    wanted = [case for case in cases() if not chosen.cases or case.name in chosen.cases]
    found = {door: _door(door, wanted, chosen.before.resolve(), chosen.pairs, chosen.starts) for door in chosen.doors}
    how_often = {"pairs": chosen.pairs, "starts": chosen.starts}
    body = {"machine": {**description(), **load.since()}, **how_often, "bound": BOUND, "ratios": found}
    chosen.output.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {chosen.output}")


def _door(door: str, wanted: list[Case], before: Path, pairs: int, starts: int) -> dict[str, Any]:
    offered = [case for case in wanted if door in case.who]
    by_start = [_ratios(door, offered, before, pairs) for _ in range(starts)]
    summed: dict[str, Any] = {}
    for case in offered:
        ratios = [of[case.name] for of in by_start]
        each = [round(statistics.median(of_start), 4) for of_start in ratios]
        summed[case.name] = one = {**interval([ratio for of_start in ratios for ratio in of_start]), "starts": each}
        print(f"{door:12}{case.name:18}{one['median']:7.3f}  {one['from']:.3f} to {one['to']:.3f}  {each}", flush=True)
    return summed


def _ratios(door: str, offered: list[Case], before: Path, pairs: int) -> dict[str, list[float]]:
    """Of one start of both."""
    with ExitStack() as stack:
        trees = (_started(stack, door, {}), _started(stack, door, {"PYTHONPATH": str(before)}))
        ratios: dict[str, list[float]] = {case.name: [] for case in offered}
        for case in offered:
            _ratio(case, trees, 0)  # warms up
        for number in range(pairs):
            for case in offered:
                ratios[case.name].append(_ratio(case, trees, number))
    return ratios


def _started(stack: ExitStack, door: str, env: dict[str, str]) -> Contender:
    env = {**SETTINGS, **env}
    if door == IN_PROCESS:
        process = Process("benchmarks.ours", env=env)
        stack.callback(process.close)
        return Child(process)
    process = Process("neuronpedia_inference", "serve", "--port", "0", env=env)
    stack.callback(process.close)
    served = Served(process)
    stack.callback(served.close)
    return served


def _ratio(case: Case, trees: Trees, number: int) -> float:
    """This tree's time by the other's; an even pair begins with this one. Answers have to be there."""
    ms = {}
    for which in (0, 1) if number % 2 == 0 else (1, 0):
        answer = trees[which].ask({**case.line(), "times": case.repeats})
        if "ms" not in answer:
            raise SystemExit(f"{case.name}: {answer}")
        ms[which] = statistics.median(answer["ms"])
    return ms[0] / ms[1]


def interval(ratios: list[float]) -> dict[str, float]:
    """Median, and the narrowest pair of order statistics that covers it in at least `COVERED` of samples."""
    n, ordered = len(ratios), sorted(ratios)
    outside, below = 0.0, 0
    while True:
        outside += 2 * math.comb(n, below) / 2**n
        if outside > 1 - COVERED:
            break
        below += 1
    low = max(0, below - 1)
    ends = {"median": statistics.median(ordered), "from": ordered[low], "to": ordered[n - 1 - low]}
    return {name: round(value, 4) for name, value in ends.items()}


if __name__ == "__main__":
    main()
