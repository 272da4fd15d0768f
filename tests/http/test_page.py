"""The page for everybody: without a mouse, in the dark, on a phone; and how its tests find their browser."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser
from served import Served

from tests.http.browser import ECONOMY, STEER, path_of_chromium, picture, visiting


def test_without_a_browser_ci_fails_and_a_laptop_hears_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        path_of_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        path_of_chromium()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_axe_finds_nothing_serious_and_nothing_is_cut_off(
    chromium: Browser, server: Served, scheme: str, width: int
) -> None:
    size = {"width": width, "height": 900}
    with visiting(chromium, server.url, bypass_csp=True, color_scheme=scheme, viewport=size) as visit:
        page = visit.open()
        visit.rested()
        for place in ("#explore", STEER[1:] + "&go=1", f"#chat?f={ECONOMY}%4045", "#lens?text=I+am", "#sweep"):
            page.evaluate("place => { location.hash = place }", place)
            visit.rested()
            assert visit.violations() == [], place
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width, place
        page.get_by_role("button", name="Key").click()
        assert visit.violations() == []
        page.evaluate("location.hash = '#explore'")
        page.reload()
        visit.rested()
        picture(page, f"explore-{scheme}-{width}")
