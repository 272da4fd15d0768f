"""How strong? Effect against cost for the documented features of the embedded model, over strengths and kinds of edit.

    python examples/steering_study.py run FOLDER        # the texts, a line each; goes on where it was left
    python examples/steering_study.py sum FOLDER        # their numbers by kind and strength -> steering_study.json
    python examples/steering_study.py draw              # docs/steering.svg and the tables of docs/steering.md

effect  share of a text's words that are of the feature's subject, by the lists below
cost    nats per token by which the unsteered model finds the text less likely than its own behind the same prompt;
        Hugging Face's own forward pass in float32
repeats share of a text's runs of three tokens that it has had before

Texts are greedy. Everything runs on a CPU without network.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "steering_study.json"
DOCS = HERE.parent / "docs"

NEW_TOKENS = 24
PROMPTS = ("I think that", "The most important thing is", "Yesterday I")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Of the median norm of what passes."""
OF_MAX = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Of the largest activation that is known of the feature."""
AT_ONCE = 24
"""Texts that the service writes together."""

SUBJECTS = {
    "20-res-4k/2657": "scholar stud author histor research theor scien argu literat academ publish evidence professor",
    "15-res-4k/1113": "econom sector industr touris export import trad agricultur growth market product manufactur gdp",
    "20-res-4k/686": "petrol gas coal resource oil mineral mining mine energy fuel reserve crude",
    "15-res-4k/2103": "autis asd delay pregnan disorder gene child syndrome birth disease patient risk infan medic",
    "15-res-4k/3166": "fine exquisit master skill art craft intricat delicat design elegan beauti quality techni",
    "10-res-4k/3240": "circ clockwise square triang angle rotat shape side degree diamet radius spher axis geomet curv",
    "10-res-4k/1608": "moon lunar solar orbit sun earth planet space star satellit gravit eclips mars astro",
    "20-res-4k/1626": "goal aim objective ultimate purpose target achiev success striv mission accomplish",
}
"""Beginnings of words, by feature: those of its label, and others of the same subject."""


@dataclass(frozen=True)
class Kind:
    """One way to steer by a feature."""

    name: str
    strengths: Sequence[float]
    unit: str
    edit: Mapping[str, Any]
    """Without feature and amount."""
    scale: str
    """What an amount of 1 is: `norm`, `max`, or `one`."""


KINDS = (
    Kind("add", SHARES, "of the norm", {"do": "add"}, "norm"),
    Kind("add, generated tokens", SHARES, "of the norm", {"do": "add", "on": {"phase": "generated"}}, "norm"),
    Kind("dose", SHARES, "of the norm", {"do": "add", "unit": "dose"}, "one"),
    Kind("clamp", OF_MAX, "of the largest activation", {"do": "clamp", "unit": "of_max"}, "one"),
)


@dataclass(frozen=True)
class Case:
    """One text to write."""

    feature: str
    kind: Kind | None
    """None for what the model writes by itself."""
    strength: float
    prompt: str

    @property
    def key(self) -> str:
        kind = "plain" if self.kind is None else self.kind.name
        return "|".join((self.feature, kind, f"{self.strength:g}", self.prompt))

    def body(self, norms: Mapping[str, float]) -> dict[str, Any]:
        """As `POST /v1/steer` takes it. norms: what passes, by source."""
        asked = {"prompt": self.prompt, "max_new_tokens": NEW_TOKENS, "compare": False}
        if self.kind is None:
            return {**asked, "edits": []}
        unit = norms[self.feature.partition("/")[0]] if self.kind.scale == "norm" else 1.0
        return {**asked, "edits": [{**self.kind.edit, "feature": self.feature, "amount": self.strength * unit}]}


def cases() -> Iterator[Case]:
    """What is compared with first."""
    yield from (Case("", None, 0.0, prompt) for prompt in PROMPTS)
    for kind in KINDS:
        for strength in kind.strengths:
            yield from (Case(feature, kind, strength, prompt) for feature in SUBJECTS for prompt in PROMPTS)


# Writing


def run(folder: Path) -> None:
    """Write the texts that are not there yet, and judge them."""
    import neuronpedia_inference as ni

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "texts.jsonl"
    known = {line["key"] for line in _lines(file)}
    service, judge = ni.load(), Judge()
    norms = {source: _median_norm(service, source) for source in dict.fromkeys(f.partition("/")[0] for f in SUBJECTS)}
    (folder / "norms.json").write_text(json.dumps(norms), encoding="utf-8")
    waiting = [case for case in cases() if case.key not in known]
    with ThreadPoolExecutor(AT_ONCE) as threads, file.open("a", encoding="utf-8") as out:
        for first in range(0, len(waiting), AT_ONCE):
            some = waiting[first : first + AT_ONCE]
            texts = list(threads.map(lambda case: _written(service, case, norms), some))
            for case, text in zip(some, texts, strict=True):
                out.write(json.dumps({"key": case.key, "text": text, **judge(case.prompt, text)}) + "\n")
            out.flush()
            print(f"{len(known) + first + len(some)} texts", flush=True)
    service.close()


def _written(service: Any, case: Case, norms: Mapping[str, float]) -> str:
    body = case.body(norms)
    return service.steer(body.pop("prompt"), **body).steered.text


def _median_norm(service: Any, source: str) -> float:
    """Of what passes where the source reads, at the tokens that the model writes by itself."""
    hook = f"blocks.{source.partition('-')[0]}.hook_resid_post"
    norms: list[float] = []
    for prompt in PROMPTS:
        steered = service.steer(prompt, max_new_tokens=NEW_TOKENS, compare=False, watch=[{"hook": hook}]).steered
        vectors = steered.watch.values[0].after[-NEW_TOKENS:]
        norms += [sum(x * x for x in vector) ** 0.5 for vector in vectors]
    return median(norms)


class Judge:
    """The embedded model in Hugging Face's hands, unsteered."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from neuronpedia_inference.embedded.weights import model_folder

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_folder()).eval()

    def __call__(self, prompt: str, text: str) -> dict[str, float]:
        """Mean log-probability per token of `text` behind `prompt`, and how much of it repeats."""
        import torch

        before = [self.tokenizer.bos_token_id, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        new = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not new:
            return {"logprob": 0.0, "repeats": 0.0}
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*before, *new]]), use_cache=False).logits[0, len(before) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])
        runs = [tuple(new[n : n + 3]) for n in range(len(new) - 2)]
        return {"logprob": float(logprobs.mean()), "repeats": 1 - len(set(runs)) / len(runs) if runs else 0.0}


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


# Numbers


def effect(text: str, feature: str) -> float:
    """Share of the words that are of the feature's subject."""
    words = re.findall(r"[a-z]+", text.lower())
    beginnings = tuple(SUBJECTS[feature].split())
    return sum(word.startswith(beginnings) for word in words) / max(1, len(words))


def summed(folder: Path) -> dict[str, Any]:
    """By kind and strength: means over features, prompts and draws; and of every feature by itself."""
    found = {line["key"]: line for line in _lines(folder / "texts.jsonl")}
    plain = {case.prompt: found[case.key] for case in cases() if case.kind is None}
    rows: dict[tuple[str, float, str], list[tuple[float, float, float]]] = defaultdict(list)
    for case in cases():
        if case.kind is not None and case.key in found:
            line = found[case.key]
            cost = plain[case.prompt]["logprob"] - line["logprob"]
            rows[case.kind.name, case.strength, case.feature].append(
                (effect(line["text"], case.feature), cost, line["repeats"])
            )
    baseline = {f: mean(effect(one["text"], f) for one in plain.values()) for f in SUBJECTS}
    return {
        "norms": json.loads((folder / "norms.json").read_text(encoding="utf-8")),
        "n_texts": len(found),
        "plain": {
            "effect": mean(baseline.values()),
            "repeats": mean(one["repeats"] for one in plain.values()),
        },
        "kinds": [
            {
                "kind": kind.name,
                "unit": kind.unit,
                "strengths": [_at(kind, strength, rows) for strength in kind.strengths],
            }
            for kind in KINDS
        ],
    }


def _at(kind: Kind, strength: float, rows: Mapping[tuple[str, float, str], Any]) -> dict[str, Any]:
    of = {feature: rows[kind.name, strength, feature] for feature in SUBJECTS}
    every = [one for some in of.values() for one in some]
    return {"strength": strength, **_means(every), "features": {feature: _means(some) for feature, some in of.items()}}


def _means(some: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    effects, costs, repeats = zip(*some, strict=True)
    return {"effect": round(mean(effects), 4), "cost": round(mean(costs), 3), "repeats": round(mean(repeats), 4)}


# Drawing

WIDTH, HEIGHT, LEFT, TOP, PANEL, GAP = 960, 470, 62, 100, 400, 76
COLOURS = ("#0969da", "#57606a", "#1a7f37", "#bc4c00")
TEXT, QUIET, GRID, CARD = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
MOST, MOST_COST = 0.25, 2.5
"""Ends of the axes."""


def svg(body: Mapping[str, Any]) -> str:
    """Two panels, a curve over strengths for every kind: of the subject against cost, and repeats against cost."""
    kinds = {kind["kind"]: kind["strengths"] for kind in body["kinds"]}
    right = LEFT + PANEL + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">',
        "<title>Effect of steering against its cost</title>",
        "<desc>Curves over strengths. On the left, higher is more of the subject; on the right, higher is more "
        "repetition; further left is likelier to the unsteered model.</desc>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{CARD}" stroke="{GRID}"/>',
        _text(20, 30, "What steering brings in, and what it costs", size=16, weight=600),
        _text(20, 50, "Against nats per token lost; means of eight features. Numbers at points: strengths.", QUIET),
        *_panel(LEFT, "share of words of the subject"),
        *_panel(right, "share of runs of three tokens that repeat"),
    ]
    for number, (colour, (name, at)) in enumerate(zip(COLOURS, kinds.items(), strict=True)):
        parts.append(_text(LEFT + 180 * number, 74, name, colour, weight=600))
        for left, value in ((LEFT, "effect"), (right, "repeats")):
            parts += _curve(left, [(one["cost"], one[value], one["strength"]) for one in at], colour, name, number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, title: str) -> Iterator[str]:
    bottom = HEIGHT - 44
    yield _text(left, TOP - 2, title, QUIET)
    for percent in range(0, round(MOST * 100) + 1, 5):
        y = _y(percent / 100)
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}" stroke="{GRID}"/>'
        yield _text(left - 8, y + 4, f"{percent} %", QUIET, anchor="end")
    for half in range(round(MOST_COST * 2) + 1):
        x = _x(left, half / 2)
        yield f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="{QUIET}"/>'
        yield _text(x, bottom + 18, f"{half / 2:g}", QUIET, anchor="middle")
    yield _text(left + PANEL, bottom + 34, "nats per token", QUIET, anchor="end")


def _x(left: float, cost: float) -> float:
    return left + PANEL * min(max(cost, 0.0), MOST_COST) / MOST_COST


def _y(share: float) -> float:
    return HEIGHT - 44 - (HEIGHT - 44 - TOP - 10) * min(share, MOST) / MOST


def _curve(
    left: float, points: Sequence[tuple[float, float, float]], colour: str, name: str, number: int
) -> Iterator[str]:
    """Strengths of the first and the last kind stand above it, of the others below."""
    places = [(_x(left, cost), _y(share), strength) for cost, share, strength in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"><title>{name}</title></polyline>'
    dx, dy = ((6, -6), (6, 14), (-4, 16), (-10, -8))[number]
    for x, y, strength in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{name}, {strength:g}</title></circle>'
        if strength >= 0.3 and x > left + PANEL / 8:
            yield _text(x + dx, y + dy, f"{strength:g}", colour, size=10)


def _text(
    x: float, y: float, text: str, colour: str = TEXT, *, size: int = 12, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{text}</text>'
    )


def tables(body: Mapping[str, Any]) -> dict[str, str]:
    """By name, as docs/steering.md holds them between its markers."""
    head = (
        "| edit | strength | of the subject | cost, nats per token | repeats |\n| --- | ---: | ---: | ---: | ---: |\n"
    )
    rows = [
        f"| {kind['kind']} | {one['strength']:g} {kind['unit']} | {_percent(one['effect'])} | {one['cost']:.2f} | "
        f"{_percent(one['repeats'])} |\n"
        for kind in body["kinds"]
        for one in kind["strengths"]
    ]
    dose = next(kind["strengths"] for kind in body["kinds"] if kind["kind"] == "dose")
    names = (
        "| feature |" + "".join(f" {one['strength']:g} |" for one in dose) + "\n| --- |" + " ---: |" * len(dose) + "\n"
    )
    each = [
        f"| `{feature}` |"
        + "".join(
            f" {_percent(o['features'][feature]['effect'])}, {o['features'][feature]['cost']:.1f} |" for o in dose
        )
        + "\n"
        for feature in SUBJECTS
    ]
    return {"kinds": head + "".join(rows), "features": names + "".join(each)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def drawn(body: Mapping[str, Any], page: str) -> str:
    """docs/steering.md with its tables as they are now."""
    for name, table in tables(body).items():
        between = re.compile(rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        page = between.sub(lambda found, table=table: found[1] + table + found[2], page)
    return page


def draw() -> None:
    """Write picture and tables from the results."""
    body = json.loads(RESULTS.read_text(encoding="utf-8"))
    (DOCS / "steering.svg").write_text(svg(body), encoding="utf-8")
    page = DOCS / "steering.md"
    page.write_text(drawn(body, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How strong? Effect against cost of steering.")
    parser.add_argument("what", choices=("run", "sum", "draw"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("study"))
    given = parser.parse_args()
    if given.what == "run":
        run(given.folder)
    elif given.what == "sum":
        RESULTS.write_text(json.dumps(summed(given.folder), indent=1) + "\n", encoding="utf-8")
    else:
        draw()
