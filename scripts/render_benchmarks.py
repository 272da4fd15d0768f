"""`docs/benchmarks.md` and its plot, from `benchmarks/results/`. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_plot import NAMES, plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
SINGLE = ("lens", "tensors")
"""Benchmarks of one thing each, whose results lie beside it."""
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "benchmarks.svg"
NOTE = "<!-- Written by scripts/render_docs.py from benchmarks/results/; measure and run it again. -->"
PROBLEMS = {"not_offered": "not offered", "disagrees": "disagrees", "failed": "failed"}
NONE = "–"

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Result = Mapping[str, Any]

INTRODUCTION = """\
The same work on the same weights: the embedded model, 135 million parameters in float32, with its three SAEs of 4096
features. Each contender is a process of its own with one thread, and while one works the others wait. In every round
another begins. A first round, which is not timed, warms up and compares: values must be within a thousandth of the
largest one that plain Hugging Face finds, greedy texts must be equal. Who does something else gets no time. Every round
asks the same, so this project keeps nothing of prompts here (`REUSE_MEMORY_GIB=0`): it would answer from that.

```sh
python -m benchmarks.compare
```"""

SINGLE_INTRODUCTION = """\
Each beside what it cannot do without, as ratios within its own run: the lens beside a forward pass and the products of
every block's state with the unembedding, with no softmax and no choice of tokens; a file of tensors, from the end of
the forward pass to its last byte, beside copying as many bytes over a socket; its peak memory beside its size."""

HOW = """\
- **plain Hugging Face** is the floor: `transformers` with hooks written by hand for each case, forward passes that end
  at the last layer needed, padded batches where requests come together, token ids prepared beforehand. It is what one
  would write for one case, and it serves nobody.
- **in process** is this project as a library: `operations.answer` on a loaded `Runtime`, from the text to the finished
  answer.
- **over HTTP** is `neuronpedia-inference serve` on the same machine, asked by a client in another process. The time is
  the client's. Streams are measured here only.
- **interp-engine** is a library for the same purpose, on its eager backend, because its others need a GPU, and with the
  quicker of its two kinds of attention. It gets token ids, as the floor does. It has no SAEs: what it captures goes
  through the floor's formula, inside its time. STEERED and DEFAULT are two generations there."""


def documents(table: Table) -> Iterator[tuple[Path, str]]:
    """Path and text of both, where there is a result. `table` makes Markdown of a head and rows."""
    if RESULTS.exists():
        body = json.loads(RESULTS.read_text(encoding="utf-8"))
        files = {name: RESULTS.with_name(f"{name}.json") for name in SINGLE}
        single = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
        yield DOCUMENT, f"{page(body, table)}\n{single_page(single, table)}\n"
        yield PLOT, plot(body)


def page(body: Result, table: Table) -> str:
    names = _contenders(body)
    parts = [
        f"# Benchmarks\n\n{NOTE}",
        INTRODUCTION,
        _conditions(body),
        f"![Time of each contender, relative to plain Hugging Face]({PLOT.name})",
        "## Times\n\nMedians in milliseconds, and how many times the floor's they are. Less is better.",
        table(("case", "how the floor does it", *map(_name, names)), [_times(case, names) for case in body["cases"]]),
        "## Spread\n\nThe shortest and the longest time in milliseconds, and how often it was taken.",
        table(("case", *map(_name, names)), [_spread(case, names) for case in body["cases"]]),
        f"## Who is compared\n\n{HOW}\n\n{_versions(body, table)}",
        _problems(body),
        "## Promises\n\nWhat the project wants to keep, as ratios within this run.",
        table(("promise", "door", "measured", "bound", "kept", "plain"), [_promise(one) for one in body["acceptance"]]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def single_page(results: Mapping[str, Result], table: Table) -> str:
    """results: by the names in SINGLE."""
    head = ("promise", "measured", "bound", "kept", "command", "when")
    return f"## Promises of one thing each\n\n{SINGLE_INTRODUCTION}\n\n{table(head, _single(results))}"


def _single(results: Mapping[str, Result]) -> list[list[str]]:
    lens, tensors = results["lens"], results["tensors"]
    promises = [
        ("lens", f"Logit lens behind all blocks, {lens['tokens']} tokens", lens["over_needed"]["lens"]["ratio"], 1.6),
        ("tensors", "Every layer of 500 tokens as a file, time", tensors["answered_over_copied"], 2),
        ("tensors", "Every layer of 500 tokens as a file, peak memory", tensors["peak_over_answer_at_most"], 2.5),
    ]
    return [
        [
            what,
            _number(value),
            f"at most {bound:g}",
            "yes" if value <= bound else "**no**",
            f"`python -m benchmarks.{name}`",
            _when(results[name]["machine"]),
        ]
        for name, what, value, bound in promises
    ]


def _when(machine: Result) -> str:
    busy = machine["others_busy_cores"]
    return machine["date"] + ("" if busy is None else f", {busy:.2f} cores busy with others")


def _contenders(body: Result) -> list[str]:
    measured = {name for case in body["cases"] for name in case["results"]}
    return [name for name in NAMES if name in measured]


def _name(contender: str) -> str:
    return NAMES[contender]


def _conditions(body: Result) -> str:
    machine, rounds = body["machine"], body["rounds"]
    busy = machine["others_busy_cores"]
    others = "" if busy is None else f"; other programs kept {busy:.2f} cores busy on average"
    return (
        f"Measured on {machine['date']} in {machine['minutes']:.0f} minutes, {rounds} timed "
        f"round{'' if rounds == 1 else 's'}. {machine['cores']} cores ({machine['cpu']}, {machine['system']}); load "
        f"average {machine['load_before']:.2f} before and {machine['load_after']:.2f} after{others}."
        + (f" interp-engine was {body['peer_left_out']}." if body["peer_left_out"] else "")
    )


def _times(case: Result, names: Sequence[str]) -> list[str]:
    return [case["title"], case["floor"], *(_time(case["results"].get(name)) for name in names)]


def _time(result: Result | None) -> str:
    if result is None:
        return NONE
    if "ms" not in result:
        return _problem(result)[0]
    ratio = result.get("to_floor")
    return f"{milliseconds(result['ms'])}" + ("" if ratio is None else f" · {ratio:.2f}×")


def _spread(case: Result, names: Sequence[str]) -> list[str]:
    return [case["title"], *(_range(case["results"].get(name)) for name in names)]


def _range(result: Result | None) -> str:
    if result is None or "ms" not in result:
        return NONE
    return f"{milliseconds(result['min_ms'])} to {milliseconds(result['max_ms'])}, {result['samples']}"


def milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _problem(result: Result) -> tuple[str, str]:
    """The word in the table, and the reason."""
    return next((word, result[key]) for key, word in PROBLEMS.items() if key in result)


def _problems(body: Result) -> str:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case in body["cases"]:
        for name, result in case["results"].items():
            if "ms" not in result:
                reasons.setdefault((_name(name), *_problem(result)), []).append(case["title"])
    lines = [
        f"- **{name}**, {word}: {reason} ({'; '.join(titles)})" for (name, word, reason), titles in reasons.items()
    ]
    return "## Without a time\n\n" + "\n".join(lines) if lines else ""


def _versions(body: Result, table: Table) -> str:
    return table(
        ("contender", "versions"),
        [(_name(one), ", ".join(f"{k} {v}" for k, v in found.items())) for one, found in body["versions"].items()],
    )


def _promise(line: Result) -> list[str]:
    bound = f"{line['relation']} {line['bound']:g}"
    kept = "yes" if line["met"] else "**no**"
    return [line["what"], _name(line["contender"]), _number(line["value"]), bound, kept, _number(line["plain"])]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"
