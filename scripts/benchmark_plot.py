"""The plot of the comparison, as SVG written by hand: time relative to plain Hugging Face, case by case.

It has a light card of its own, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from math import ceil
from typing import Any

NAMES = {
    "plain": "plain Hugging Face",
    "in_process": "in process",
    "http": "over HTTP",
    "peer": "interp-engine",
}
COLOURS = {"in_process": "#0969da", "http": "#1a7f37", "peer": "#bc4c00"}
TEXT, QUIET, LINE, GRID, CARD = "#1f2328", "#59636e", "#1f2328", "#d1d9e0", "#ffffff"
WIDTH, LEFT, RIGHT, TOP = 960, 330, 130, 92
BAR, GAP, FOOT = 14, 16, 24
PROBLEMS = {"not_offered": "not offered", "disagrees": "disagrees", "failed": "failed"}

Result = Mapping[str, Any]


def plot(body: Result) -> str:
    # Without a time of the floor there is nothing to relate to; the table has those cases.
    shown = [case for case in body["cases"] if len(case["results"]) > 1 and "ms" in case["results"]["plain"]]
    names = [name for name in COLOURS if any(name in case["results"] for case in shown)]
    height = TOP + len(shown) * (len(names) * BAR + GAP) + FOOT
    scale = _scale(shown)
    parts = [*_card(height), *_legend(names), *_axis(scale, height)]
    for place, case in enumerate(shown):
        parts += _group(case, names, TOP + place * (len(names) * BAR + GAP), scale)
    return "\n".join([*parts, *_floor_line(scale, height), "</svg>"]) + "\n"


def _scale(shown: list[Result]) -> float:
    """Pixels for a ratio of 1; the axis ends at a whole number."""
    ratios = [result["to_floor"] for case in shown for result in case["results"].values() if "to_floor" in result]
    return (WIDTH - LEFT - RIGHT) / max(2, ceil(max(ratios, default=1)))


def _card(height: int) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">'
    )
    yield "<title>Time relative to plain Hugging Face</title>"
    yield "<desc>Horizontal bars, one per case and contender. Shorter is faster; the line at 1 is the floor.</desc>"
    yield (f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="{CARD}" stroke="{GRID}"/>')
    yield _text(20, 30, "Time relative to plain Hugging Face", size=16, weight=600)
    yield _text(20, 50, "Shorter is faster. In grey: the floor's own time.", colour=QUIET)


def _legend(names: list[str]) -> Iterator[str]:
    for place, name in enumerate(names):
        x = LEFT + 130 * place
        yield f'<rect x="{x}" y="60" width="12" height="12" rx="2" fill="{COLOURS[name]}"/>'
        yield _text(x + 18, 70, NAMES[name])


def _axis(scale: float, height: int) -> Iterator[str]:
    for ratio in range(round((WIDTH - LEFT - RIGHT) / scale) + 1):
        x = LEFT + ratio * scale
        yield f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - FOOT}" stroke="{GRID}"/>'
        yield _text(x, height - 8, f"{ratio}×", colour=QUIET, anchor="middle")


def _floor_line(scale: float, height: int) -> Iterator[str]:
    x = LEFT + scale
    yield (
        f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - FOOT}" stroke="{LINE}" stroke-width="1.5" '
        'stroke-dasharray="4 3"/>'
    )


def _group(case: Result, names: list[str], top: int, scale: float) -> Iterator[str]:
    yield _text(LEFT - 10, top + BAR - 3, case["title"], anchor="end")
    floor = f"floor {_duration(case['results']['plain']['ms'])}"
    yield _text(LEFT - 10, top + 2 * BAR - 1, floor, size=11, colour=QUIET, anchor="end")
    for place, name in enumerate(names):
        yield from _bar(name, case["results"].get(name, {}), top + place * BAR, scale)


def _bar(name: str, result: Result, top: int, scale: float) -> Iterator[str]:
    if "to_floor" not in result:
        words = next((word for key, word in PROBLEMS.items() if key in result), "not measured")
        yield _text(LEFT + 6, top + BAR - 4, words, size=10, colour=COLOURS[name])
        return
    width = result["to_floor"] * scale
    yield f'<rect x="{LEFT}" y="{top + 1}" width="{width:.1f}" height="{BAR - 2}" rx="2" fill="{COLOURS[name]}"/>'
    label = f"{result['to_floor']:.2f}× · {_duration(result['ms'])}"
    # Beside the floor's dashed line, not under it.
    yield _text(LEFT + max(width, scale) + 6, top + BAR - 3, label, size=11)


def _duration(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _text(
    x: float, y: float, text: str, *, size: int = 12, colour: str = TEXT, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
