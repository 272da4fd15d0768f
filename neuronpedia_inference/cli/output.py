"""What the commands print: tables, tab-separated where piped, JSON, single lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 100


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH)


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    console().print(made)


def facts(values: Mapping[str, str]) -> None:
    """A name and its value on each line; long values go on below themselves. Empty ones are left out."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in values.items():
        if value:
            made.add_row(Text(name, style="bold"), Text(value))
    console().print(made)


def tab_separated(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """For other programs: a head, then a line for each row."""
    for row in (columns, *rows):
        print("\t".join(" ".join(cell.split()) for cell in row))


def is_piped() -> bool:
    """Whether a program reads what is printed."""
    return not sys.stdout.isatty()


def print_json(value: Any, *, one_line: bool = False) -> None:
    indent = 2 if sys.stdout.isatty() and not one_line else None
    says_all = sys.stdout.encoding.lower().startswith("utf")
    print(json.dumps(value, indent=indent, ensure_ascii=not says_all), flush=True)


def line(text: str) -> None:
    print(text, flush=True)


def note(message: str) -> None:
    """For people; what programs read stays as it is."""
    print(f"neuronpedia-inference: {message}", file=sys.stderr)


def fail(message: str, code: int) -> NoReturn:
    print(f"neuronpedia-inference: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
