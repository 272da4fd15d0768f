"""A real browser: Chromium as the system has it, driven by playwright, which downloads none."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "The page is tested in Chromium, which is not here: apt-get install chromium (macOS: brew install chromium)"
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run")
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
WAIT_S = 120.0
"""For what a busy machine does in a second."""
SERIOUS = ("serious", "critical")


def path_of_chromium() -> str:
    """Without one the tests fail where CI is set, and are skipped elsewhere; both say how to install it."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail(INSTALL, pytrace=False)
    if found is None:
        pytest.skip(INSTALL)
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    path = path_of_chromium()
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path, args=[*QUIET, NOWHERE])
        yield opened
        opened.close()


@dataclass
class Visit:
    """A page of its own, with nothing kept of others, that writes down what it asks for and what it complains of."""

    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(1000 * WAIT_S)
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)

    def _note(self, request: Request) -> None:
        self.asked.append(request.url)

    def _hear(self, message: Any) -> None:
        # Chromium reports every 4xx and 5xx so; what the page makes of them is what the tests look at.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def open(self, address: str = "/") -> Page:
        self.page.goto(self.url + address)
        return self.page

    def until(self, script: str) -> None:
        """Wait until it is true. Asked from outside, because the page's policy lets nothing evaluate texts in it."""
        deadline = time.monotonic() + WAIT_S
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def rested(self) -> None:
        """Nothing is under way."""
        self.until("!document.querySelector('[aria-busy=true]') && document.querySelector('#view > *')")

    def violations(self) -> list[str]:
        """What axe finds serious. For visits that were opened with `bypass_csp`."""
        self.page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        return [
            f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:200]}"
            for one in found
            if one["impact"] in SERIOUS
            for node in one["nodes"]
        ]


@contextmanager
def visiting(opened: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A visit that asks nobody but `url` and complains of nothing."""
    context = opened.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    visit = Visit(context.new_page(), url)
    yield visit
    context.close()
    assert [one for one in visit.asked if not one.startswith((f"{url}/", "data:"))] == []
    assert visit.complaints == []
