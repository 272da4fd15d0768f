"""The page: texts that are steered, chats, the lens and sweeps, against what the routes answer."""

from __future__ import annotations

import re

import httpx
import pytest
from playwright.sync_api import Route, expect
from served import MODEL

from tests.http.browser import ECONOMY, STEER, Visit, body_of, picture, tokens_of, values_of


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


def test_who_types_a_strength_goes_on_while_the_feature_is_told(visit: Visit) -> None:
    waiting: list[Route] = []
    told = "**/v1/features/15-res-4k/1113?*"

    def hold(route: Route) -> None:
        waiting.append(route)

    visit.page.route(told, hold)
    with visit.page.expect_request(told):
        page = visit.open(STEER)
    page.get_by_label("Strength of 15-res-4k/1113, as a number").select_text()
    page.keyboard.type("1")
    [route] = waiting
    route.continue_()
    strength = page.get_by_label("Strength of economy · sector, industry, tourism, as a number")
    expect(strength).to_be_focused()
    page.keyboard.type("2.5")
    with page.expect_request("**/v1/steer") as sent:
        page.get_by_role("button", name="Write").click()
    assert [one["strength"] for one in body_of(sent.value)["features"]] == [12.5]
    expect(page.locator(".output.steered")).to_have_attribute("aria-busy", "false")


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
