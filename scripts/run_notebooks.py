"""Runs the notebooks that need no account from top to bottom, in this process, and writes what their cells show.

`python scripts/run_notebooks.py` rewrites the outputs in `examples/`. `--pages FOLDER` writes each notebook there as a
page of its own too, as the documentation shows it.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import pprint
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("laptop.ipynb", "research.ipynb")
STYLE = """
:root { color-scheme: light dark; background: light-dark(#fff, #121212); color: light-dark(#111, #eee) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
pre, code { font: 13px/1.5 ui-monospace, monospace }
.code { background: rgba(128, 128, 128, 0.12); border-left: 3px solid #f97316; padding: 0.6rem 0.9rem }
.code { white-space: pre-wrap; overflow-wrap: anywhere }
.shown { overflow-x: auto }
.shown { margin: 0.4rem 0 1.4rem }
.dataframe { border: 0; border-collapse: collapse; font-size: 0.92em }
.dataframe :is(th, td) { border: 0; border-bottom: 1px solid rgba(128, 128, 128, 0.3); padding: 0.25em 0.7em }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin: 2rem 0 0.4rem } p { margin: 0.5rem 0 }
"""
Notebook = dict[str, Any]


def read(name: str) -> Notebook:
    return json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))


def write(name: str, notebook: Notebook) -> None:
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "examples" / name).write_text(text, encoding="utf-8")


def run(notebook: Notebook, space: dict[str, Any]) -> Notebook:
    """The notebook with what its cells show when they run in `space`, in which they leave their names."""
    counts = itertools.count(1)
    return {**notebook, "cells": [_ran(cell, space, counts) for cell in notebook["cells"]]}


def _ran(cell: Mapping[str, Any], space: dict[str, Any], counts: Iterator[int]) -> Mapping[str, Any]:
    if cell["cell_type"] != "code":
        return cell
    count = next(counts)
    return {**cell, "execution_count": count, "outputs": _outputs("".join(cell["source"]), space, count)}


def _outputs(source: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """As a notebook's kernel does: what is printed, and the value of the last line if it is an expression."""
    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    value = None
    with redirect_stdout(io.StringIO()) as said:
        exec(compile(body, "cell", "exec"), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
    outputs: list[dict[str, Any]] = []
    if said.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(said.getvalue())})
    if value is not None:
        data = {name: _lines(text) for name, text in _shown(value).items()}
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def _shown(value: Any) -> Mapping[str, str]:
    plain = {"text/plain": pprint.pformat(value, sort_dicts=False)}
    draw = getattr(value, "_repr_html_", None)
    return plain if draw is None else {"text/html": draw(), **plain}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def page(notebook: Notebook) -> str:
    """A notebook with its outputs as a page that fetches nothing."""
    parts = [_cell(cell) for cell in notebook["cells"]]
    title = escape("".join(notebook["cells"][0]["source"]).partition("\n")[0].lstrip("# "))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>'


def _cell(cell: Mapping[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return "".join(_paragraph(part) for part in source.split("\n\n"))
    return f'<pre class="code">{escape(source)}</pre>' + "".join(map(_output, cell["outputs"]))


def _paragraph(text: str) -> str:
    marks = len(text) - len(text.lstrip("#"))
    tag = f"h{marks}" if marks else "p"
    pieces = escape(text.lstrip("# ")).split("`")
    inner = "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))
    return f"<{tag}>{inner}</{tag}>"


def _output(output: Mapping[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "text/html" not in data:
        return f'<pre class="shown" tabindex="0">{escape("".join(data["text/plain"]))}</pre>'
    shown = "".join(data["text/html"])
    focus = "" if "tabindex" in shown else ' tabindex="0"'
    return f'<div class="shown"{focus}>{shown}</div>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=Path)
    pages: Path | None = parser.parse_args().pages
    for name in NAMES:
        done = run(read(name), {})
        write(name, done)
        if pages is not None:
            (pages / name).with_suffix(".html").write_text(page(done), encoding="utf-8")


if __name__ == "__main__":
    main()
