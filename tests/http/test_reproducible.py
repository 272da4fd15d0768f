"""The same request has the same bytes alone, in a crowd, and on a server that likes other products."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from commands import command, line_with
from served import SOON_S, SOURCE, TEXT, Served, running, small_settings

from neuronpedia_inference import loading
from neuronpedia_inference.embedded.weights import default_cache_dir
from neuronpedia_inference.engine.linear import TIMED_ROWS, choose_products
from neuronpedia_inference.runtime import Runtime

FEATURE = {"source": SOURCE, "index": 1113, "strength": 60}
CHAT = [{"role": "user", "content": "Name a colour."}]
SHORT: dict[str, Any] = {"max_new_tokens": 6, "n_logprobs": 2}


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    for text in (TEXT, "Once upon a time", "In the year 1900 the city was"):
        yield "/v1/activations", {"prompt": text}
        yield "/v1/activations", {"prompt": [text, "Another one."], "source": SOURCE, "index": 1113}
        yield "/v1/top-k", {"prompt": text, "source": SOURCE}
        yield "/v1/steer", {"prompt": text, "features": [FEATURE], **SHORT}
        yield "/v1/steer", {"prompt": text, "features": [FEATURE], "temperature": 0.9, "seed": 3, **SHORT}
    yield "/v1/steer", {"prompt": CHAT, "features": [], **SHORT}
    yield "/v1/steer", {"prompt": CHAT, "features": [FEATURE], "temperature": 0.7, **SHORT}
    yield "/v1/steer", {"prompt": TEXT, "features": [FEATURE], "stream": True, "deltas": False, **SHORT}
    yield "/v1/steer", {"prompt": TEXT, "features": [FEATURE], "method": "ORTHOGONAL_DECOMP", **SHORT}
    yield "/v1/capture", {"prompt": [TEXT, "A dog ran."], "points": ["blocks.15.hook_resid_post"], "positions": "mean"}
    yield "/v1/contrast", {"a": [TEXT, "A dog ran."], "b": ["It rains in Rome.", "The bank was closed."], "limit": 5}


def ask(http: httpx.Client, path: str, body: dict[str, Any]) -> bytes:
    response = http.post(path, json={**body, "reproducible": True})
    assert response.status_code == 200, response.text
    if body.get("stream"):  # events fold as they are taken; the last holds everything
        return response.text.strip().split("\n\n")[-2].encode()
    return response.content


@pytest.fixture(scope="module")
def other() -> Iterator[Served]:
    """A server whose layers have all chosen another product."""

    def turned(model: Any, _: Any) -> Any:
        layers = {f"{m.out_features}x{m.in_features}" for m in model.modules() if hasattr(m, "in_features")}
        chosen = choose_products(model, {layer: ["turned"] * len(TIMED_ROWS) for layer in layers})
        assert all({product.__name__ for product in products} == {"turned"} for products in chosen.values())
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_choose_products", turned)
        runtime = Runtime.load(small_settings())
    with running(small_settings(), lambda: runtime) as served:
        yield served
    runtime.close()


def test_alone_among_others_and_after_a_restart(server: Served, other: Served) -> None:
    asked = list(requests())
    assert len(asked) == 21
    with server.client() as http, other.client() as elsewhere:
        alone = [ask(http, *one) for one in asked]
        assert len(set(alone)) == 21
        plain = {"prompt": "The crowd asks for something else", "features": [FEATURE], "max_new_tokens": 40}
        with ThreadPoolExecutor(36) as pool:
            crowd = [pool.submit(http.post, "/v1/steer", json={**plain, "seed": n}) for n in range(16)]
            beside = list(pool.map(lambda one: ask(http, *one), asked[:16]))
            assert all(one.result().status_code in (200, 503) for one in crowd)
        assert beside == alone[:16]
        assert [ask(http, *one) for one in reversed(asked)] == alone[::-1]
        assert [ask(elsewhere, *one) for one in asked] == alone


@pytest.mark.long
def test_in_another_process_that_chooses_its_products_anew() -> None:
    """After a real restart, with what was measured at the first start thrown away."""
    asked = list(requests())
    answers = []
    for _ in range(2):
        for kept in default_cache_dir().glob("products-*.json"):
            kept.unlink()
        words = ["serve", "--port", "0", "--sae-sets", "res-4k"]
        with command(words, TOKEN_LIMIT="48", MAX_TOKENS="64", MAX_RESULTS="50") as process:
            url = line_with(process, "Listening on").rpartition(" ")[2]
            line_with(process, "Ready in")
            with httpx.Client(base_url=url, timeout=SOON_S) as http:
                answers.append([ask(http, *one) for one in asked])
    assert answers[0] == answers[1]


def test_what_is_reproducible_is_right(http: httpx.Client) -> None:
    """Up to rounding it is what everybody gets, and it is not taken from what is kept."""
    for path, body in list(requests())[:5]:
        if not body.get("stream"):
            usual = http.post(path, json=body).json()
            assert_close(json.loads(ask(http, path, body)), usual)


def assert_close(found: Any, usual: Any) -> None:
    if isinstance(usual, float):
        assert found == pytest.approx(usual, rel=1e-3, abs=1e-3)
    elif isinstance(usual, dict):
        assert found.keys() == usual.keys()
        for key, value in usual.items():
            assert_close(found[key], value)
    elif isinstance(usual, list):
        assert len(found) == len(usual)
        for one, other in zip(found, usual, strict=True):
            assert_close(one, other)
    else:
        assert found == usual
