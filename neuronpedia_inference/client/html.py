"""Results as static HTML for notebooks: styles inline, no scripts, no addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

STRIP = "font-family:ui-monospace,monospace;line-height:2;white-space:pre-wrap;word-break:break-word"
TABLE = "border-collapse:collapse;font-size:0.92em"
CELL = "padding:0.25em 0.7em;text-align:left;vertical-align:top;border-bottom:1px solid rgba(128,128,128,0.3)"
FOCUS = 'tabindex="0"'
WARM = (249, 115, 22)
STRONG = 0.6
"""The share from which letters are black, whatever the page's own are: below, light letters are read on the colour over
a dark page, above, black ones are; between the two neither would be, so the colour leaps there."""
SHOWN = {"\n": "⏎", "\t": "⇥"}


def page(*parts: str) -> str:
    """One block, which the keyboard can scroll. The letters of a web address's scheme, which texts may have, are
    written as entities."""
    inner = "".join(parts)
    focus = "" if FOCUS in inner else f" {FOCUS}"
    whole = f'<div style="max-width:72em;overflow-x:auto"{focus}>{inner}</div>'
    return re.sub(
        "http", lambda found: found[0][0] + f"&#{ord(found[0][1])};" + found[0][2:], whole, flags=re.IGNORECASE
    )


def heading(text: str, note: str = "") -> str:
    told = f' <span style="opacity:0.7;font-weight:normal">{escape(note)}</span>' if note else ""
    return f'<p style="margin:0.6em 0 0.2em;font-weight:600">{escape(text)}{told}</p>'


def strip(tokens: Sequence[str], values: Sequence[float], most: float | None = None) -> str:
    """Tokens coloured by a value each; hovering over a token, or reaching it by Tab, tells the value."""
    top = max(values, default=0.0) if most is None else most
    return f'<div style="{STRIP}">{"".join(_token(*pair, top) for pair in zip(tokens, values, strict=True))}</div>'


def _token(token: str, value: float, most: float) -> str:
    share = min(max(value, 0.0) / most, 1.0) if most > 0 else 0.0
    if share == 0:
        return f"<span>{escape(visible(token))}</span>"
    return marked(token, share, f"{token.strip() or repr(token)}: {value:.4g}")


def visible(token: str) -> str:
    """A token on one line: line breaks and tabs as signs."""
    return "".join(SHOWN.get(char, char) for char in token)


def marked(token: str, share: float, said: str) -> str:
    """A token coloured by a share from 0 to 1; `said` is told under the pointer, and to whoever reaches it by Tab."""
    is_strong = share >= STRONG
    alpha = 0.74 + 0.16 * (share - STRONG) / (1 - STRONG) if is_strong else 0.12 + 0.43 * share / STRONG
    style = f"background:rgba({','.join(map(str, WARM))},{alpha:.2f});border-radius:3px"
    style += ";color:#000" if is_strong else ""
    told = escape(said, quote=True)
    return f'<span {FOCUS} title="{told}" aria-label="{told}" style="{style}">{escape(visible(token))}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already: see `text`."""
    top = "".join(f'<th scope="col" style="{CELL}">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td style={_quoted(CELL)}>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table style="{TABLE}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def grid(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table whose rows have names, close together, in the letters of strips. Cells are HTML already."""
    close = f"{STRIP};line-height:1.6;padding:0.1em 0.4em;text-align:left;white-space:pre"
    top = "".join(f'<th scope="col" style="{close}">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row" style="{close}">{escape(name)}</th>'
        f"{''.join(f'<td style={_quoted(close)}>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f'<table style="{TABLE}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def text(value: object) -> str:
    """Plain text as a cell, its line breaks kept."""
    return f'<span style="white-space:pre-wrap">{escape(str(value))}</span>'


def name(value: str) -> str:
    """A name as a cell: it stays whole."""
    return f'<span style="white-space:nowrap">{escape(value)}</span>'


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def columns(parts: Sequence[tuple[str, str]]) -> str:
    """Titled blocks side by side; one below the other where it is narrow. Blocks are HTML already."""
    blocks = "".join(f'<div style="flex:1 1 18em;min-width:0">{heading(title)}{body}</div>' for title, body in parts)
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{blocks}</div>'


def _quoted(value: str) -> str:
    return f'"{value}"'
