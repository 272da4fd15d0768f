"""Results in a terminal, drawn by rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

LEVELS = " ▁▂▃▄▅▆▇█"
# From the colour of the page to a strong orange: how strongly a feature fires.
WARM = ((255, 237, 213), (253, 186, 116), (234, 88, 12))


class Strip:
    """Tokens with a value each: as colour, and as a bar under each token."""

    def __init__(self, tokens: Sequence[str], values: Sequence[float], most: float | None = None) -> None:
        self._pairs = list(zip(tokens, values, strict=True))
        self._most = max(values, default=0.0) if most is None else most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for chunk in _chunks(self._pairs, max(8, options.max_width - 4)):
            upper, lower = Text("  "), Text("  ")
            for token, value in chunk:
                share = max(0.0, value) / (self._most or 1.0)
                shown = visible(token, keep_space=True)
                upper.append(shown, style=on_colour(share) if share > 0 else "")
                lower.append(level(share) * cell_len(shown), style=colour(share))
            yield upper
            if lower.plain.strip():
                yield lower


def _chunks(tokens: Sequence[tuple[str, float]], width: int) -> Iterator[list[tuple[str, float]]]:
    """Tokens in groups that fit on a line."""
    line: list[tuple[str, float]] = []
    used = 0
    for token, value in tokens:
        size = cell_len(visible(token, keep_space=True))
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append((token, value))
        used += size
    if line:
        yield line


class Grid:
    """Tokens across, rows with names down; each cell is a text with a share from 0 to 1: as colour, and as a bar behind
    it. Where it is too narrow for all tokens, one part follows below the other."""

    CELL = 12
    """Characters of a cell at most."""

    def __init__(self, head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
        self._head, self._rows = head, rows
        self._widths = [
            min(max(cell_len(visible(text)) for text in (name, *(row[place][0] for _, row in rows))), self.CELL)
            for place, name in enumerate(head)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name_width = max((cell_len(name) for name, _ in self._rows), default=0)
        for places in self._parts(options.max_width - name_width):
            yield Text.assemble(
                " " * name_width, *(self._cell(place, self._head[place], "bold", " ") for place in places)
            )
            for name, row in self._rows:
                cells = [self._shared(place, *row[place]) for place in places]
                yield Text.assemble((name.rjust(name_width), "dim"), *cells)

    def _parts(self, width: int) -> Iterator[list[int]]:
        part: list[int] = []
        used = 0
        for place, own in enumerate(self._widths):
            if part and used + own + 3 > width:
                yield part
                part, used = [], 0
            part.append(place)
            used += own + 3
        if part:
            yield part

    def _shared(self, place: int, text: str, share: float) -> Text:
        return self._cell(place, text, on_colour(share), level(share))

    def _cell(self, place: int, text: str, style: str, bar: str) -> Text:
        shown = Text(visible(text), style)
        shown.truncate(self._widths[place], overflow="ellipsis", pad=True)
        return Text.assemble("  ", shown, bar)


def table(head: Sequence[str], rows: Sequence[Sequence[str | Text]], *, wide: int = -1) -> Table:
    """wide: place of the column that takes what is left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, name in enumerate(head):
        made.add_column(name, overflow="fold", ratio=1 if place == wide % len(head) else None)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return made


def heading(title: str, note: str = "") -> Text:
    return Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim"))


def group(*parts: RenderableType) -> Group:
    return Group(*parts)


def level(share: float) -> str:
    """A block as high as the share."""
    return LEVELS[round(min(max(share, 0.0), 1.0) * (len(LEVELS) - 1))]


def visible(token: str, *, keep_space: bool = False) -> str:
    """A token on one line, with control characters shown as signs."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(char if char.isprintable() else "�" for char in text)
    return text if keep_space else text.strip() or "␣"


def rgb(share: float) -> str:
    """A colour between the three of WARM."""
    place = min(max(share, 0.0), 1.0) * (len(WARM) - 1)
    below = min(int(place), len(WARM) - 2)
    mixed = [round(a + (b - a) * (place - below)) for a, b in zip(WARM[below], WARM[below + 1], strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def colour(share: float) -> str:
    """As `rgb`, strong enough for letters."""
    return rgb(0.4 + 0.6 * share)


def on_colour(share: float) -> str:
    """Letters on it. By its number, because terminals have a black of their own."""
    return f"#000000 on {rgb(share)}"
