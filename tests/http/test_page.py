"""The page in a real browser, on a real port."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect
from served import MODEL, SECRET, Serve, Served, Wrapped, on_a_port, small_settings, until

from neuronpedia_inference.errors import NotReady, Overloaded
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.app import create_app
from tests.http.browser import WAIT_S, Visit, browser, path_of_chromium, visiting

expect.set_options(timeout=1000 * WAIT_S)
ECONOMY = "15-res-4k/1113"
STEER = f"/#steer?prompt=The+most+important+thing+is&f={ECONOMY}%4070&watch={ECONOMY}&n=8"
ROOT = Path(__file__).resolve().parents[2]
IMAGES = os.environ.get("PAGE_IMAGES")
"""A folder for what the documentation shows: `make page-images`."""
Visiting = Callable[..., AbstractContextManager[Visit]]


def test_without_a_browser_ci_fails_and_a_laptop_hears_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        path_of_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        path_of_chromium()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium: Browser, server: Served) -> Iterator[Visit]:
    with visiting(chromium, server.url) as visit:
        yield visit


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


# Explore


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
    for way, said in (("Python", f"index={index}"), ("OpenAI", " ")):
        page.get_by_role("tab", name=way).click()
        code = page.get_by_role("tabpanel").inner_text()
        assert index in code
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert said in ran.stdout, ran.stderr
    page.get_by_role("tab", name="curl").click()
    assert f"{visit.url}/v1/steer" in page.get_by_role("tabpanel").inner_text()


# Steer and chat


def test_plain_and_steered_come_side_by_side_with_the_watched_feature(visit: Visit, http: httpx.Client) -> None:
    page = visit.open(STEER.replace("n=8", "n=24"))
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".output.steered")).to_have_attribute("aria-busy", "false")
    feature = {"source": "15-res-4k", "index": 1113}
    body = {
        "prompt": "The most important thing is",
        "features": [{**feature, "strength": 70}],
        "max_new_tokens": 24,
        "watch": [feature],
    }
    answer = http.post("/v1/steer", json={**body, "watch": [feature]}).json()
    for name, title in (("steered", "Steered"), ("default", "Plain")):
        watched = answer[name]["watch"]
        values = watched["values"][0]["before"] or watched["values"][0]["after"]
        assert "".join(tokens_of(page, title)).endswith(answer[name]["text"].replace("\n", "⏎"))
        told = values_of(page, title)
        assert len(told) == len(values)
        for label, value in list(zip(told, values, strict=True))[1:]:
            assert float(label.rpartition(", ")[2]) == pytest.approx(value, abs=0.05)
    assert answer["steered"]["text"] != answer["default"]["text"]
    picture(page, "steer")


def test_sliders_and_further_features_go_into_the_request_and_the_address(visit: Visit) -> None:
    page = visit.open(STEER)
    page.get_by_label("Strength of economy · sector, industry, tourism", exact=True).fill("-20")
    assert page.get_by_label("Strength of economy · sector, industry, tourism, as a number").input_value() == "-20"
    page.get_by_label("Add a feature").fill("20-res-4k/686")
    page.get_by_label("Add a feature").press("Enter")
    page.get_by_role("button", name=re.compile("petroleum")).click()
    expect(page.locator(".steers li")).to_have_count(2)
    page.get_by_label(re.compile("Strength of petroleum.*as a number")).fill("12.5")
    with page.expect_request("**/v1/steer") as sent:
        page.get_by_role("button", name="Write").click()
    assert body_of(sent.value)["features"] == [
        {"source": "15-res-4k", "index": 1113, "strength": -20},
        {"source": "20-res-4k", "index": 686, "strength": 12.5},
    ]
    assert "%40-20" in page.url
    assert "686%4012.5" in page.url
    expect(page.locator(".output.steered")).to_have_attribute("aria-busy", "false")
    page.get_by_role("button", name=re.compile("Remove petroleum")).click()
    page.get_by_role("button", name=re.compile("Remove economy")).click()
    with page.expect_request("**/v1/steer") as sent:
        page.get_by_role("button", name="Write").click()
    assert not body_of(sent.value)["compare"], "what is not steered has nothing to be compared with"
    expect(page.locator(".output")).to_have_count(1)
    expect(page.locator(".output")).to_have_attribute("aria-busy", "false")


def test_a_chat_goes_on_with_what_the_steered_model_said(visit: Visit) -> None:
    page = visit.open(f"/#chat?f={ECONOMY}%4045&say=Who+are+you%3F")
    page.get_by_label("Tokens").fill("12")
    page.get_by_label("Say").press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    visit.until("document.querySelector('.message.plain .prose')?.textContent.length > 8")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    said = page.locator(".message.steered .prose").inner_text()
    assert said != page.locator(".message.plain .prose").inner_text()
    picture(page, "chat")
    page.get_by_label("Say").fill("And then?")
    with page.expect_request("**/v1/steer") as sent:
        page.get_by_role("button", name="Send").click()
    assert body_of(sent.value)["prompt"] == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And then?"},
    ]
    expect(page.locator(".field", has=page.get_by_label("Say")).locator(".problem")).to_contain_text("max is 48")


def test_views_are_those_that_are_served(visit: Visit, http: httpx.Client) -> None:
    page = visit.open()
    visit.rested()
    served = http.get("/v1/capabilities").json()["endpoints"]
    names = ["Explore", "Steer", "Chat"]
    names += ["Lens"] if served["lens_logit"] else []
    names += ["Sweep"] if served.get("sweep") else []
    assert page.get_by_role("navigation").get_by_role("link").all_inner_texts() == names


def test_the_lens_shows_what_comes_next_behind_each_block(visit: Visit, http: httpx.Client) -> None:
    page = visit.open("/#lens?text=The+capital+of+France+is")
    expect(page.locator(".grid tbody tr")).to_have_count(15)
    body = {"model": MODEL, "type": ["LOGIT_LENS"], "prompt": "The capital of France is", "top_n": 3, "stream": False}
    answer = http.post("/v1/lens/prompt", json=body).json()
    last = page.locator(".grid tbody tr").first
    expected = [token["results"][0] for token in answer["tokens"]]
    told = last.locator("td").all_inner_texts()
    for box, said in zip(told, expected, strict=True):
        word, _, share = box.replace("\n", "").rpartition(", ")
        assert word == said["top_tokens"][-1][0].replace("\n", "⏎")
        assert float(share.removesuffix(" %")) == pytest.approx(100 * said["top_probs"][-1][0], abs=0.6)
    picture(page, "lens")


def test_a_sweep_shows_its_texts_and_what_is_suggested(visit: Visit, http: httpx.Client) -> None:
    page = visit.open(f"/#sweep?prompt=The+most+important+thing+is&feature={ECONOMY}&strengths=70,-10")
    page.get_by_role("button", name="Sweep").click()
    expect(page.get_by_role("status").filter(has_text="uggested")).to_be_visible()
    feature = {"source": "15-res-4k", "index": 1113}
    body = {
        "prompt": "The most important thing is",
        "features": [feature],
        "strengths": [-10, 70],
        "max_new_tokens": 20,
    }
    answer = http.post("/v1/sweep", json=body).json()
    told = page.locator(".sweep-table tbody .prose").all_inner_texts()
    texts = [cell["text"] for cell in (*answer["default"], *answer["cells"])]
    assert told == [text.strip().replace("\n", "⏎") for text in texts]
    [best] = answer["suggested"]["strengths"]
    assert page.locator(".suggested .badge").count() == (best is not None)
    picture(page, "sweep")


# What stands between


def test_a_key_is_asked_for_and_kept_nowhere(chromium: Browser, locked_server: Served) -> None:
    with visiting(chromium, locked_server.url) as visit:
        page = visit.open()
        page.get_by_label("This server asks for its key.").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_label("That key is not this server’s.").fill("mein-schlüssel")
        page.get_by_label("That key is not this server’s.").press("Enter")
        page.get_by_label("That key is not this server’s.").fill(SECRET)
        page.get_by_role("button", name="Use it").click()
        visit.rested()
        expect(page.get_by_role("heading", name=re.compile("economy"))).to_be_visible()
        assert SECRET not in kept_by(page) + page.content()
        page.reload()
        expect(page.get_by_label("This server asks for its key.")).to_be_visible()


def test_while_the_model_loads_the_page_says_what_loads(chromium: Browser, runtime: Runtime, serve: Serve) -> None:
    step = ["Loading the weights"]

    def loading() -> Any:
        if step:
            raise NotReady(f"The model is still loading ({step[0]}). Try again in a few seconds.")
        return runtime

    with visiting(chromium, serve(small_settings(), loading).url) as visit:
        page = visit.open()
        expect(page.get_by_role("status").filter(has_text="The model is loading: Loading the weights")).to_be_visible()
        step[0] = "SAE 2 of 3"
        expect(page.locator("#gate")).to_contain_text("SAE 2 of 3")
        step.clear()
        expect(page.get_by_role("heading", name=re.compile("economy"))).to_be_visible()
        expect(page.locator("#gate")).to_be_hidden()


def test_a_full_server_is_asked_again_when_it_said(chromium: Browser, runtime: Runtime, serve: Serve) -> None:
    refusals = [1]

    async def ask(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            refusals.pop()
            raise Overloaded("32 requests are being answered already, the most that this server admits.")
        return await runtime.ask(*args, **kwargs)

    with visiting(chromium, serve(small_settings(), lambda: Wrapped(runtime, ask=ask)).url) as visit:
        page = visit.open()
        expect(page.locator("#gate")).to_contain_text("32 requests are being answered already")
        expect(page.locator("#gate .count")).to_have_text(re.compile(r"\d+"))
        expect(page.get_by_role("heading", name=re.compile("economy"))).to_be_visible()
        refusals.append(1)
        page.get_by_role("button", name="Read").click()
        page.get_by_role("button", name="Ask now").click()
        expect(page.locator("#gate")).to_be_hidden()


def test_a_newer_question_takes_the_place_of_one_that_is_slow(
    chromium: Browser, runtime: Runtime, serve: Serve
) -> None:
    held = threading.Event()

    async def ask(*args: Any, **kwargs: Any) -> Any:
        while not held.is_set():
            await asyncio.sleep(0.01)
        return await runtime.ask(*args, **kwargs)

    with visiting(chromium, serve(small_settings(), lambda: Wrapped(runtime, ask=ask)).url) as visit:
        page = visit.open()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.get_by_label("Text", exact=True).fill("The river ran.")
        page.get_by_label("First").select_option("activation")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        held.set()
        visit.rested()
        assert tokens_of(page, "The text")[1:] == ["The", " river", " ran", "."]


@pytest.mark.parametrize(
    ("label", "value", "says"),
    [
        ("Prompt", "", "The text is empty"),
        ("Tokens", "40000", "budget (prompt + completion)"),
        ("Tokens", "2.5", "valid integer"),
        ("Temperature", "-1", "greater than or equal to 0"),
        ("Seed", "", "Input should be"),
    ],
)
def test_a_refusal_stands_at_its_field(visit: Visit, label: str, value: str, says: str) -> None:
    page = visit.open(STEER)
    control = page.get_by_label(label, exact=True)
    control.fill(value)
    page.get_by_role("button", name="Write").click()
    problem = page.locator(".field", has=control).locator(".problem")
    expect(problem).to_contain_text(says)
    expect(control).to_have_attribute("aria-invalid", "true")
    assert control.get_attribute("aria-describedby") == problem.get_attribute("id")
    expect(page.get_by_role("button", name="Write")).to_be_visible()


def test_what_takes_long_can_be_stopped_and_stops_there_too(visit: Visit, runtime: Runtime) -> None:
    page = visit.open(STEER.replace("n=8", "n=50"))
    page.get_by_role("button", name="Write").click()
    visit.until("document.querySelectorAll('.output.steered .token').length > 8")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".output.steered .state")).to_contain_text("stopped")
    until(lambda: runtime.describe()["running"] == 0)
    assert page.locator(".output.steered .token:not(.prompt)").count() < 50


def test_a_connection_that_is_cut_is_told_and_the_text_stays(chromium: Browser, runtime: Runtime) -> None:
    with (
        on_a_port(create_app(small_settings(), lambda: runtime), 60.0) as (server, url),
        visiting(chromium, url) as visit,
    ):
        page = visit.open(STEER.replace("n=8", "n=50"))
        page.get_by_role("button", name="Write").click()
        visit.until("document.querySelectorAll('.output.steered .token').length > 8")
        for connection in list(server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        expect(page.get_by_role("alert").first).to_contain_text("The connection ended")
        assert page.locator(".output.steered .token").count() > 8
        page.context.set_offline(True)
        page.get_by_role("button", name="Write").click()
        expect(page.get_by_role("alert").first).to_contain_text("cannot be reached")


# For everybody


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


def test_the_reference_sends_its_examples_with_a_key_of_this_page(chromium: Browser, locked_server: Served) -> None:
    with visiting(chromium, locked_server.url) as visit:
        page = visit.open("/docs")
        expect(page.get_by_role("button", name="Authorize")).to_be_visible()
        assert page.locator(".opblock-tag").evaluate_all("all => all.map(one => one.dataset.tag)")[:2] == [
            "Start here",
            "Neuronpedia",
        ]
        page.get_by_role("button", name="Authorize").click()
        page.get_by_role("textbox").first.fill("key-of-ascii")
        page.get_by_role("button", name="Apply credentials").first.click()
        page.get_by_role("button", name="Close").last.click()
        page.get_by_role("button", name="/v1/top-k").first.click()
        with page.expect_response("**/v1/top-k") as answered:
            page.get_by_role("button", name="Execute").click()
        assert answered.value.request.headers["x-secret-key"] == "key-of-ascii"
        assert answered.value.status == 401
        assert "key-of-ascii" not in kept_by(page)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_the_reference_is_readable_and_fires(chromium: Browser, server: Served, scheme: str) -> None:
    with visiting(chromium, server.url, bypass_csp=True, color_scheme=scheme) as visit:
        page = visit.open("/docs")
        page.get_by_role("button", name="/v1/top-k").first.click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table tbody .response-col_status").first).to_contain_text("200")
        assert visit.violations() == []


def test_the_reference_speaks_of_what_is_served(chromium: Browser, runtime: Runtime, serve: Serve) -> None:
    """Examples that fire on a server that holds another model."""
    about = {
        **runtime.describe(),
        "model": "another-model",
        "sources": ["7-res-jb"],
        "sae_sets": ["res-jb"],
        "d_model": 3,
    }
    other = serve(small_settings(), lambda: Wrapped(runtime, describe=lambda: about))
    with visiting(chromium, other.url) as visit:
        page = visit.open("/docs")
        page.get_by_role("button", name="/v1/top-k").first.click()
        expect(page.get_by_label("Request body")).to_have_value(re.compile("7-res-jb"))
        assert MODEL not in page.get_by_label("Request body").input_value()
