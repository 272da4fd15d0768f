"""The client over a real port and in this process: the same objects, the same errors; and the README's example."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from served import MODEL, SECRET, SOURCE, Serve, Served, Wrapped, small_settings

import neuronpedia_inference as ni
from neuronpedia_inference import embedded
from neuronpedia_inference.client import AsyncClient, Client
from neuronpedia_inference.client.in_process import AsyncInProcess, InProcess
from neuronpedia_inference.errors import (
    InvalidRequest,
    LimitExceeded,
    NotReady,
    Overloaded,
    Unauthorized,
    Unavailable,
    UnknownSource,
)
from neuronpedia_inference.runtime import Runtime
from tests.rounding import differences

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = "The judge told the court that the law was clear."
ECONOMY = ni.FeatureName(SOURCE, 1113)
PROMPT = "The most important thing is"
ROUNDED = 1.01e-4
"""Probabilities are told with 4 decimals; sums in another order move them by far less than one of these."""


class Shared(Wrapped):
    """The runtime of all tests, which one client must not end."""

    def close(self) -> None:
        """It goes on."""


@pytest.fixture(scope="module")
def over_http(server: Served) -> Iterator[Client]:
    with ni.connect(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def in_process(runtime: Runtime) -> Iterator[Client]:
    shared: Any = Shared(runtime)
    with Client(InProcess(shared)) as client:
        yield client


ASKS: dict[str, Callable[[Any], Any]] = {
    "features": lambda m: m.features(TEXT, SOURCE, num_results=3),
    "features of several": lambda m: m.features([TEXT, "A cat."], SOURCE, num_results=2),
    "top_k": lambda m: m.top_k(TEXT, SOURCE, top_k=2),
    "search": lambda m: m.search("moon orbit", limit=3),
    "feature": lambda m: m.feature(ECONOMY, limit=3),
    "feature of an address": lambda m: m.feature(f"https://www.neuronpedia.org/{embedded.MODEL_ID}/{SOURCE}/1113"),
    "contrast": lambda m: m.contrast([TEXT], ["Bake the bread."], limit=2),
    "steer": lambda m: m.steer(PROMPT, ECONOMY @ 70, max_new_tokens=6),
    "watch": lambda m: m.steer(PROMPT, ECONOMY @ 70, watch=[ECONOMY, {"source": SOURCE, "top_k": 2}], max_new_tokens=4),
    "edits": lambda m: m.steer(PROMPT, ECONOMY.clamp(60).on(phase="generated"), watch=[ECONOMY], max_new_tokens=4),
    "steer a chat": lambda m: m.steer([{"role": "user", "content": "Hi"}], ECONOMY @ 70, max_new_tokens=3),
    "sweep": lambda m: m.sweep(PROMPT, ECONOMY, [20, 70], max_new_tokens=4),
    "sweep of steerings": lambda m: m.sweep([PROMPT], [ECONOMY.clamp(1), ECONOMY], [30, 60], max_new_tokens=3),
    "lens": lambda m: m.lens(PROMPT, layers=[10, 20], top_n=3, num_completion_tokens=2, temperature=0),
    "lens of a chat": lambda m: m.lens([{"role": "user", "content": "Hi"}], ["JACOBIAN_LENS", "LOGIT_LENS"], top_n=1),
    "score": lambda m: m.score(PROMPT, [" love.", " money"], ECONOMY @ 60),
}


def apart(one: Any, other: Any) -> list[str]:
    """Where two results differ by more than rounding."""
    return differences(*([json.loads(result.to_json()) for result in as_list(each)] for each in (one, other)))


def as_list(result: Any) -> list[Any]:
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize("name", ASKS)
def test_all_ways_give_the_same_objects(over_http: Client, in_process: Client, server: Served, name: str) -> None:
    ask = ASKS[name]
    expected = ask(in_process)
    assert apart(ask(over_http), expected) == []

    async def both(runtime: Any) -> list[Any]:
        async with ni.async_connect(server.url) as over, AsyncClient(AsyncInProcess(runtime)) as inside:
            return [await ask(over), await ask(inside)]

    shared = in_process._transport._runtime  # pyright: ignore
    for found in asyncio.run(both(shared)):
        assert type(found) is type(expected)
        assert apart(found, expected) == []


def test_steering_has_an_effect_that_is_not_there_without_it(over_http: Client) -> None:
    steered = over_http.steer(PROMPT, ECONOMY @ 70, max_new_tokens=12)
    plain = over_http.steer(PROMPT, max_new_tokens=12)
    assert steered.default is not None
    assert plain.default is not None
    assert "econom" in steered.steered.text
    assert plain.steered.text == plain.default.text == steered.default.text
    assert "econom" not in plain.steered.text


def test_a_clamped_feature_has_its_number_and_one_that_is_not_reached_has_its_own(over_http: Client) -> None:
    clamped = over_http.steer(PROMPT, ECONOMY.clamp(60).on(phase="generated"), watch=[ECONOMY], max_new_tokens=6)
    never = ECONOMY.clamp(60).on(phase="generated").when(ECONOMY > 1e5)
    unreached = over_http.steer(PROMPT, never, watch=[ECONOMY], max_new_tokens=6)
    assert unreached.default is not None
    assert unreached.steered.text == unreached.default.text, "nothing held, so nothing was done"
    assert clamped.steered.watch is not None
    [read] = clamped.steered.watch.values
    assert read.before is not None
    assert read.after is not None
    n_prompt = len(clamped.steered.watch.tokens) - len(clamped.steered.tokens)
    assert read.after[:n_prompt] == read.before[:n_prompt], "the prompt is as it was"
    assert min(read.after[n_prompt:]) > 20 > max(read.before[n_prompt:])


def test_a_lens_gives_what_the_route_gives(over_http: Client, http: httpx.Client) -> None:
    grid = over_http.lens(PROMPT, ["LOGIT_LENS", "JACOBIAN_LENS"], top_n=2, num_completion_tokens=2, temperature=0)
    body = {"model": MODEL, "type": ["LOGIT_LENS", "JACOBIAN_LENS"], "prompt": PROMPT, "top_n": 2}
    body |= {"num_completion_tokens": 2, "temperature": 0, "stream": False}
    answer = http.post("/v1/lens/prompt", json=body).json()
    assert [one.token for one in grid] == [one["token"] for one in answer["tokens"]]
    assert [one.is_generated for one in grid][-3:] == [False, True, True]
    assert grid.completion == "".join(one.token for one in grid if one.is_generated)
    assert grid.layers["LOGIT_LENS"] == tuple(range(30))
    assert grid.has_bos
    assert not over_http.lens(PROMPT, layers=[3], prepend_bos=False).has_bos
    assert not over_http.lens([{"role": "user", "content": "Hi"}], layers=[3]).has_bos, "the template wrote it"
    for place, lens in enumerate(grid.layers):
        wanted = [one["results"][place]["top_probs"] for one in answer["tokens"]]
        assert grid.numpy(lens) == pytest.approx(np.array(wanted), abs=ROUNDED)
    said = grid[-3].results[0].top_tokens[-1][0]
    assert said == grid[-2].token, "behind the last block is what it then writes"


def test_a_lens_is_asked_of_the_served_model_by_its_name(serve: Serve, runtime: Runtime) -> None:
    strict = small_settings(strict_model=True)
    with ni.connect(serve(strict, lambda: Wrapped(runtime, settings=strict)).url) as client:
        assert len(client.lens("A cat", layers=[3])) == 3
        with pytest.raises(InvalidRequest, match="This server serves"):
            client._transport.ask("lens_prompt", {"model": "another", "type": ["LOGIT_LENS"], "prompt": "A cat"})  # pyright: ignore


def test_a_stream_ends_with_the_whole(over_http: Client, in_process: Client, server: Served) -> None:
    whole = over_http.steer(PROMPT, ECONOMY @ 70, max_new_tokens=6)
    for client in (over_http, in_process):
        events = list(client.stream(PROMPT, ECONOMY @ 70, max_new_tokens=6))
        assert events[-1] == whole
        assert all(whole.steered.text.startswith(event.steered.text) for event in events)

    async def last() -> Any:
        async with ni.async_connect(server.url) as client:
            return [event async for event in client.stream(PROMPT, ECONOMY @ 70, max_new_tokens=6)][-1]

    assert asyncio.run(last()) == whole


def test_a_chat_keeps_its_turns(over_http: Client, in_process: Client) -> None:
    for client in (over_http, in_process):
        chat = client.chat(ECONOMY @ 40, max_new_tokens=3)
        first, second = chat("Hello"), chat("And then?")
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
        assert chat.messages[2]["content"] == "And then?"
        assert second.prompt.startswith("user: Hello")
        assert first != second


def test_a_corpus_is_gone_on_with_where_it_was_left(over_http: Client, server: Served, tmp_path: Path) -> None:
    texts = [f"The judge heard case {n}." for n in range(6)]
    long = "long " * 30  # alone within TOKEN_LIMIT, not among four
    texts = [*texts, long, "", "A cat."]
    told: list[int] = []
    assert over_http.corpus(texts[:3], tmp_path / "all.jsonl", source=SOURCE, num_results=2) == 3
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"text": "cut o')
    n_new = over_http.corpus(texts, tmp_path / "all.jsonl", source=SOURCE, num_results=2, say=told.append)
    assert n_new == 6
    assert told == [7, 9]
    found = list(ni.read_corpus(tmp_path / "all.jsonl"))
    assert [text for text, _ in found] == texts
    assert isinstance(found[7][1], InvalidRequest)
    assert "empty" in str(found[7][1])
    for place in (0, 3, 6, 8):
        alone = over_http.features(texts[place], SOURCE, num_results=2)
        read: Any = found[place][1]
        assert apart(read, alone) == []

    async def again() -> int:
        async with ni.async_connect(server.url) as client:
            return await client.corpus([*texts, "One more."], tmp_path / "all.jsonl", source=SOURCE, num_results=2)

    assert asyncio.run(again()) == 1
    with pytest.raises(ValueError, match="has another text in line 1"):
        over_http.corpus(["Something else."], tmp_path / "all.jsonl")


def test_a_corpus_stops_at_what_is_no_text_s_fault(over_http: Client, tmp_path: Path) -> None:
    with ni.connect("http://127.0.0.1:1") as nobody, pytest.raises(Unavailable):
        nobody.corpus(["a"], tmp_path / "none.jsonl")
    assert (tmp_path / "none.jsonl").read_text() == ""
    with pytest.raises(UnknownSource):
        over_http.corpus(["A cat.", "A dog."], tmp_path / "none.jsonl", source="99-res-4k")
    assert (tmp_path / "none.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda m: m.features(TEXT, "99-res-4k"), UnknownSource),
        (lambda m: m.features("x " * 500, SOURCE), LimitExceeded),
        (lambda m: m.feature(SOURCE, 99999), InvalidRequest),
        (lambda m: list(m.stream(PROMPT, ECONOMY @ 70, max_new_tokens=5000)), LimitExceeded),
        (lambda m: m.steer(PROMPT, ECONOMY @ 70, max_tokens=5), InvalidRequest),
    ],
)
def test_errors_are_those_of_the_service(
    over_http: Client, in_process: Client, ask: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as inside:
        ask(in_process)
    with pytest.raises(kind) as outside:
        ask(over_http)
    assert type(outside.value) is type(inside.value)
    assert str(outside.value) == str(inside.value)
    request_id = outside.value.request_id  # pyright: ignore
    assert re.fullmatch(r"[0-9a-f-]{8,}", request_id)


def test_the_secret_goes_along(locked_server: Served) -> None:
    with ni.connect(locked_server.url, SECRET) as client:
        assert SOURCE in client.sources
        assert SECRET not in repr(client)
    with ni.connect(locked_server.url) as client, pytest.raises(Unauthorized):
        client.search("moon")


def test_a_server_that_is_not_ready_is_asked_again(serve: Serve, runtime: Runtime) -> None:
    asked = threading.Event()

    def later() -> Any:
        if not asked.is_set():
            asked.set()
            full = Overloaded("full")
            raise full
        return runtime

    served = serve(small_settings(), later)
    with ni.connect(served.url) as client:
        assert client.search("moon", limit=1).features
    assert asked.is_set()


def test_patience_ends(serve: Serve) -> None:
    def never() -> Any:
        raise NotReady("still loading")

    served = serve(small_settings(), never)
    with ni.connect(served.url, patience_s=0) as client, pytest.raises(NotReady, match="still loading"):
        client.search("moon")


def test_a_client_that_is_closed_says_so(runtime: Runtime) -> None:
    shared: Any = Shared(runtime)
    client = Client(InProcess(shared))
    client.close()
    with pytest.raises(InvalidRequest, match="this client is closed"):
        client.search("moon")


def test_nobody_there_is_told() -> None:
    with (
        ni.connect("http://127.0.0.1:1") as client,
        pytest.raises(Unavailable, match=r"No answer from http://127\.0\.0\.1:1"),
    ):
        client.search("moon")


# The README


def readme_example() -> str:
    """The block of the README that begins with the client."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "import neuronpedia_inference as ni" in block)


def ran(client: Client) -> dict[str, Any]:
    """What the example assigns, with this client in the place of the one that it makes."""
    given = SimpleNamespace(**{name: getattr(ni, name) for name in ni.__all__})
    given.load = lambda: client
    space: dict[str, Any] = {"ni": given}
    exec(readme_example().replace("import neuronpedia_inference as ni\n", ""), space)
    return {name: value for name, value in space.items() if isinstance(value, ni.Result | ni.Steering)}


def test_the_readme_s_example_gives_the_same_objects_on_every_way(
    over_http: Client, in_process: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = ran(in_process)
    said = capsys.readouterr().out
    outside = ran(over_http)
    assert outside.keys() == inside.keys()
    assert all(apart(outside[name], inside[name]) == [] for name in inside)
    assert capsys.readouterr().out == said
    assert len(inside) >= 4
    assert inside["both"].steered.text != inside["both"].default.text
