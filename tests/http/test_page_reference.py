"""The reference at /docs in a real browser: authorised, readable, and of what is served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from served import MODEL, Serve, Served, Wrapped, running, small_settings

from neuronpedia_inference.runtime import Runtime
from tests.http.browser import kept_by, visiting
from tests.models import save


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


TOLD = """async () => {
  const { inNamesOf } = await import(new URL("reference/served.js", location.href).href);
  const about = await (await fetch("v1/capabilities")).json();
  return inNamesOf(about, await (await fetch("openapi.json")).json());
}"""
"""The document as /docs shows it."""


def test_its_examples_fire_on_another_model(chromium: Browser, tmp_path: Path) -> None:
    """A small GPT-2 without a chat template, with two SAEs of its own."""
    for layer in (0, 2):
        metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name="tiny")
        sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=4096, metadata=metadata, apply_b_dec_to_input=False))
        sae.save_model(tmp_path / "saes" / f"{layer}-res-tiny")
    settings = small_settings(
        model_id=str(save("gpt2", tmp_path / "model")),
        local_sae_dir=tmp_path / "saes",
        sae_sets="res-tiny",
        token_limit=400,
        max_tokens=500,
    )
    runtime = Runtime.load(settings)
    try:
        with running(settings, lambda: runtime) as served, visiting(chromium, served.url) as visit:
            told = visit.open("/docs").evaluate(TOLD)
            answers = {case: fire(served, *case) for case in cases(told)}
    finally:
        runtime.close()
    assert len(answers) > 20
    assert "\n".join(f"{path} {said}" for (path, *_), said in answers.items() if said) == ""


def cases(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every example of a body: its path, its method, and the body as JSON."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                for example in media.get("examples", {}).values():
                    yield path, method, json.dumps(example["value"])


def fire(served: Served, path: str, method: str, body: str) -> str:
    """What is wrong with the answer; empty where nothing is."""
    with served.client() as client:
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
    return "" if answer.is_success else answer.text[:300]
