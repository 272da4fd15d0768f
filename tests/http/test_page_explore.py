"""The page: a text, what fires on it, and the card of a feature."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.http.browser import ECONOMY, Visit, is_focused, tokens_of, values_of

ROOT = Path(__file__).resolve().parents[2]


def test_it_opens_with_an_example_that_is_answered(visit: Visit, http: httpx.Client) -> None:
    page = visit.open()
    visit.rested()
    expect(page.get_by_role("heading", name="economy · sector, industry, tourism")).to_be_visible()
    text = page.get_by_label("Text", exact=True).input_value()
    answer = http.post("/v1/activations", json={"prompt": text, "source": "15-res-4k", "index": 1113}).json()[
        "results"
    ][0]
    told = values_of(page, "The text, coloured by economy")
    assert tokens_of(page, "The text")[1:] == answer["tokens"][1:]
    for label, value in list(zip(told, answer["features"][0]["values"], strict=True))[1:]:
        assert float(label.rpartition(", ")[2]) == pytest.approx(value, abs=0.05)
    assert page.locator(".features li").count() == 12
    assert page.get_by_role("complementary").get_by_role("link").count() == 3
    assert f"feature={ECONOMY.replace('/', '%2F')}" in page.url


def test_what_is_typed_is_read_and_a_link_to_it_shows_the_same(visit: Visit) -> None:
    page = visit.open()
    visit.rested()
    page.get_by_label("Text", exact=True).fill("<img src=x onerror=alert(1)> & the river\nran.")
    page.get_by_label("First").select_option("activation")
    page.get_by_role("button", name="Read").click()
    visit.until("document.querySelectorAll('.strip .token').length > 12")
    visit.rested()
    assert "<img" in "".join(tokens_of(page, "The text"))
    assert page.locator("#view img").count() == 0, "text stays text"
    first = page.locator(".features .feature-name").first.inner_text()
    address = page.evaluate("location.hash")
    page.goto("about:blank")
    page.goto(visit.url + "/" + address)
    visit.rested()
    assert page.locator(".features .feature-name").first.inner_text() == first
    assert page.get_by_label("Text", exact=True).input_value().startswith("<img src=x")


def test_features_are_found_by_words_and_by_their_neighbours(visit: Visit) -> None:
    page = visit.open()
    visit.rested()
    page.get_by_label("Find features by words").fill("moon orbit")
    page.get_by_label("Find features by words").press("Enter")
    page.get_by_role("button", name=re.compile("moon · lunar")).first.click()
    expect(page.get_by_role("heading", name=re.compile("moon · lunar"))).to_be_visible()
    visit.rested()
    expect(page.locator(".legend").first).to_contain_text("moon")
    page.locator(".neighbours button").first.click()
    expect(page.get_by_role("heading", name=re.compile("moon · lunar"))).to_be_hidden()
    page.get_by_label("Find features by words").fill("zyzzyva")
    page.get_by_role("button", name="Find").click()
    expect(page.get_by_text("No feature has “zyzzyva”")).to_be_visible()


def test_the_keyboard_goes_from_token_to_token(visit: Visit, http: httpx.Client) -> None:
    page = visit.open()
    visit.rested()
    page.locator(".reading .token").first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("End", -1), ("ArrowLeft", -2), ("Home", 0)):
        page.keyboard.press(key)
        assert is_focused(page, values_of(page, "The text")[place])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout")).to_contain_text("economy")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=re.compile("What fires on “economy”"))).to_be_visible()
    text = page.get_by_label("Text", exact=True).input_value()
    answer = http.post("/v1/top-k", json={"prompt": text, "source": "15-res-4k", "top_k": 1}).json()["results"][0]
    strongest = answer["positions"][2]["top_features"][0]
    expect(page.locator(".features .feature-where").first).to_have_text(f"15-res-4k/{strongest['feature_index']}")
    page.get_by_role("button", name="the whole text").click()
    expect(page.get_by_role("heading", name="What fires here")).to_be_visible()


def test_the_code_that_is_copied_runs(visit: Visit) -> None:
    page = visit.open()
    visit.rested()
    page.get_by_label("Text", exact=True).fill("Who are you?")
    page.get_by_role("button", name="Read").click()
    page.get_by_role("button", name="Read").wait_for()
    visit.rested()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    index = page.locator(".card-head code").first.inner_text().rpartition("/")[2]
    for way, said in (("Python", f"index={index}"), ("OpenAI", "\n")):  # what a steered chat says is drawn
        page.get_by_role("tab", name=way).click()
        code = page.get_by_role("tabpanel").inner_text()
        assert index in code
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout, ran.stderr
    page.get_by_role("tab", name="curl").click()
    assert f"{visit.url}/v1/steer" in page.get_by_role("tabpanel").inner_text()
