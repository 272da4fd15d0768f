"""A real browser: Chromium as the system has it, driven by playwright, which downloads none; and the page in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "The page is tested in Chromium, which is not here: apt-get install chromium (macOS: brew install chromium)"
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run")
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
WAIT_S = 120.0
"""For what a busy machine does in a second."""
SERIOUS = ("serious", "critical")
ECONOMY = "15-res-4k/1113"
STEER = f"/#steer?prompt=The+most+important+thing+is&f={ECONOMY}%4070&watch={ECONOMY}&n=8"
IMAGES = os.environ.get("PAGE_IMAGES")
"""A folder for what the documentation shows: `make page-images`."""

expect.set_options(timeout=1000 * WAIT_S)


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


# What is on a page


def tokens_of(page: Page, group: str) -> list[str]:
    return page.get_by_role("group", name=re.compile(group)).locator(".token").all_inner_texts()


def values_of(page: Page, group: str) -> list[str]:
    return [
        box.get_attribute("aria-label") or ""
        for box in page.get_by_role("group", name=re.compile(group)).locator(".token").all()
    ]


def is_focused(page: Page, name: str) -> bool:
    return page.evaluate("name => document.activeElement.getAttribute('aria-label') === name", name)


def body_of(request: Request) -> dict[str, Any]:
    return json.loads(request.post_data or "")


def kept_by(page: Page) -> str:
    return page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")


def picture(page: Page, name: str) -> None:
    if IMAGES:
        page.screenshot(path=Path(IMAGES) / f"{name}.png")
