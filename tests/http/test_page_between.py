"""The page, where something stands between: a key, a model that loads, a full or slow server, refusals, hang-ups."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from served import SECRET, Serve, Served, Wrapped, on_a_port, small_settings, until

from neuronpedia_inference.errors import NotReady, Overloaded
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.app import create_app
from tests.http.browser import STEER, Visit, kept_by, tokens_of, visiting


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
