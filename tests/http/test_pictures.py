"""What notebooks and commands look like: in the light and in the dark, on a wide screen and on a phone."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from commands import on_a_terminal, without_colours
from playwright.sync_api import Browser, Page
from rich.console import Console
from rich.text import Text
from served import SOURCE, Served

from tests.http.browser import ECONOMY, IMAGES, visiting

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COLUMNS = 96
PROGRESS_ENDS = "\x1b[?25h"
"""The cursor is shown again."""
TERMINAL = {"COLORTERM": "truecolor", "TERM": "xterm-256color"}
TEXT = "The judge told the court that the army had burned the old church."
PROMPT = "The most important thing is"
FONT = re.compile(r"@font-face\s*{.*?}", re.DOTALL)
"""In rich's frame: its fonts come from elsewhere."""
COMMANDS = {
    "features": ("features", TEXT, "--source", SOURCE, "--limit", "5", "--rank-by", "relative"),
    "steer": ("steer", PROMPT, "-a", f"{ECONOMY}@70", "--watch", ECONOMY, "--tokens", "24"),
    "sweep": ("sweep", PROMPT, ECONOMY, "--strengths", "20,45,70,110", "--tokens", "16"),
}

SECTIONS = {
    "laptop": ("Turn it up", "Which features separate two kinds of text?"),
    "research": ("A direction of your own", "Many texts"),
}
"""What is pictured of each: from one heading to another."""


def page_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a notebook with its outputs as a page."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import run_notebooks

    path = folder / f"{name}.html"
    path.write_text(run_notebooks.page(run_notebooks.read(f"{name}.ipynb")), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1060), ("dark", 400)])
@pytest.mark.parametrize("name", ["laptop", "research"])
def test_a_notebook_is_readable(
    chromium: Browser, name: str, scheme: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"width": width, "height": 1200}
    address = page_of(name, tmp_path, monkeypatch)
    with visiting(chromium, address.rpartition("/")[0], color_scheme=scheme, viewport=size) as visit:
        page = visit.open(f"/{name}.html")
        assert visit.violations() == []
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        if IMAGES and scheme == "light":
            picture_of_sections(page, name, width)


def picture_of_sections(page: Page, name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": page.evaluate("document.scrollingElement.scrollHeight")})
    boxes = [page.get_by_role("heading", name=heading).bounding_box() for heading in SECTIONS[name]]
    top, end = (box["y"] - 16 for box in boxes if box is not None)
    clip: Any = {"x": 0, "y": top, "width": width, "height": end - top}
    page.screenshot(path=Path(str(IMAGES)) / f"notebook-{name}.png", clip=clip)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_looks_well_in_a_terminal(chromium: Browser, server: Served, name: str) -> None:
    shown = on_a_terminal(
        *COMMANDS[name], "--url", server.url, width=COLUMNS, COLORTERM="truecolor", TERM="xterm-256color"
    )
    assert all(len(line) <= COLUMNS for line in without_colours(shown).splitlines())
    assert "econom" in without_colours(shown) or name == "features"
    if IMAGES:
        draw(chromium, name, shown)


@pytest.mark.long
def test_the_demo_looks_well_in_a_terminal(chromium: Browser) -> None:
    shown = on_a_terminal("demo", width=COLUMNS, **TERMINAL)
    assert all(len(line) <= COLUMNS for line in without_colours(shown).splitlines())
    if IMAGES:
        draw(chromium, "demo", shown)


def draw(chromium: Browser, name: str, shown: str) -> None:
    """What a terminal of COLUMNS has shown, as a picture."""
    told = shown.rpartition(PROGRESS_ENDS)[2]
    lines = "\n".join(line.rpartition("\r")[2].rstrip() for line in told.splitlines()).strip("\n")
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(lines))
    svg = FONT.sub("", console.export_svg(title=f"neuronpedia-inference {name}"))
    page = chromium.new_page(viewport={"width": 1060, "height": 100})
    page.set_content(f"<body style='margin:0'><style>svg {{ display: block; width: 100vw }}</style>{svg}</body>")
    page.screenshot(path=Path(str(IMAGES)) / f"terminal-{name}.png", full_page=True)
    page.close()
