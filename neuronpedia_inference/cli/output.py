"""What the commands print: tables, tab-separated where piped, JSON, single lines."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

PIPED_WIDTH = 100
PLAIN_SIGNS = "plain_signs"
"""An error handler of streams: for what they have no sign for, one that is like it, else an escape."""
_LIKE = str.maketrans("▁▂▃▄▅▆▇█░·…—–−“”‘’⏎⇥␣�", ".:-=+*%#.-.---\"\"''|>_?")


def open_streams() -> None:
    """A closed stream swallows what is written to it; one that has not every sign gets those that it has."""
    codecs.register_error(PLAIN_SIGNS, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        else:
            stream.reconfigure(errors=PLAIN_SIGNS)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError), error
    like = error.object[error.start : error.end].translate(_LIKE)
    return like.encode("ascii", "backslashreplace").decode("ascii"), error.end


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH)


def working(step: str) -> Status:
    """A sign of life on standard error, while something is waited for; nothing where nobody sees it."""
    errors = console(stderr=True)
    return errors.status(step, spinner="dots" if errors.encoding.startswith("utf") else "line")


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
