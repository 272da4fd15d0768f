"""OpenAI's routes by its published client: every call is parsed, and says what our own routes say of the same."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from served import MODEL, SECRET, SOON_S, SOURCE, Serve, Served, Wrapped, small_settings

from neuronpedia_inference.client.replays import body_of, compared, receipt_in
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.exits import FAILED
from neuronpedia_inference.operations.openai.asking import check_variants
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.variants import Variant
from tests.rounding import same_choices

FEATURE = {"source": SOURCE, "index": 1113, "strength": 72}
"""Rounding decides no token of the steered chat and text: each is 0.04 or more ahead of the second, in logs."""
STEERED = {"features": [FEATURE]}
CHAT: list[Any] = [{"role": "user", "content": "Tell me about cats."}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 8}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "The most important thing is", "temperature": 0, "max_tokens": 8}
IDS = [504, 768, 1070, 2775, 314]
"""Of TEXT's prompt."""


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def said(http: httpx.Client) -> dict[str, str]:
    """What our own route says to the chat, steered and not."""
    body = {"prompt": CHAT, "features": [FEATURE], "max_new_tokens": 8}
    answer = http.post("/v1/steer", json=body).json()
    assert answer["steered"]["text"] != answer["default"]["text"]
    return {"steered": answer["steered"]["text"], "plain": answer["default"]["text"]}


def content(answer: Any) -> str:
    return answer.choices[0].message.content


def reproducible(asked: dict[str, Any]) -> dict[str, Any]:
    """Asked so that the answer is the same to the letter, whatever it shares the model with."""
    return {**asked, "extra_body": {**asked.get("extra_body", {}), "reproducible": True}}


# Chats


def test_a_chat_says_what_our_own_route_says(client: openai.OpenAI, said: dict[str, str]) -> None:
    """By top-level keys, and by the name of a variant; without either it is the plain model."""
    plain = client.chat.completions.create(**GREEDY)
    steered = client.chat.completions.create(**GREEDY, extra_body=STEERED)
    variant = client.chat.completions.create(**{**GREEDY, "model": f"{MODEL}+economy"})
    assert content(plain) == said["plain"]
    assert content(steered) == content(variant) == said["steered"]
    assert (plain.model, variant.model) == (MODEL, f"{MODEL}+economy")
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens, plain.usage.total_tokens) == (35, 8, 43)
    assert plain.choices[0].finish_reason == "length"
    assert plain.choices[0].message.role == "assistant"


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "steered": {"extra_body": STEERED},
    "drawn": {"temperature": 0.8, "top_p": 0.9, "seed": 5},
    "several": {"n": 3, "temperature": 1.2, "seed": 5},
    "penalised": {"frequency_penalty": -2, "presence_penalty": -2},
    "biased": {"logit_bias": {"11096": -100}},
    "stopped": {"stop": ["intelligent"]},
    "probable": {"logprobs": True, "top_logprobs": 3},
    "probable alone": {"logprobs": True},
    "watched": {
        "extra_body": {**STEERED, "watch": [{"source": SOURCE, "index": 1113}, {"source": SOURCE, "top_k": 2}]}
    },
    "ruled": {"extra_body": {**STEERED, "rules": [{"when": {"feature": f"{SOURCE}/1113", "below": 1e6}}]}},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me about cats."}]}]},
    "prefilled": {
        "messages": [*CHAT, {"role": "assistant", "content": "Cats are"}],
        "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
    },
    "ignored": {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "response_format": {"type": "text"},
    },
}
"""Beside GREEDY."""


@pytest.mark.parametrize("name", CALLS)
def test_streams_hold_what_is_answered_at_once(client: openai.OpenAI, name: str) -> None:
    """In order: who speaks, what is said, why it ended, and the tokens in an event of their own."""
    asked = reproducible({**GREEDY, **CALLS[name]})
    whole = client.chat.completions.create(**asked)
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert len({chunk.id for chunk in chunks}) == 1
    *told, counted = chunks
    assert counted.usage == whole.usage
    assert counted.choices == []
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in told)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in told if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        logprobs = [token for one in mine if one.logprobs for token in one.logprobs.content or ()]
        if choice.logprobs is None:
            assert logprobs == []
        else:
            assert [one.token for one in logprobs] == [one.token for one in choice.logprobs.content or ()]
        told_of = [one.model_extra["interpretability"] for one in mine if one.model_extra]
        assert watched(told_of) == watched([choice.model_extra["interpretability"]] if choice.model_extra else [])


def watched(told: list[Any]) -> list[str]:
    """The tokens whose values are told."""
    return [token for one in told if "watch" in one for token in one["watch"]["tokens"]]


def test_calls_do_what_they_say(client: openai.OpenAI, http: httpx.Client, said: dict[str, str]) -> None:
    answers = {name: client.chat.completions.create(**{**GREEDY, **asked}) for name, asked in CALLS.items()}
    for same in ("greedy", "parts", "ignored", "probable"):
        assert content(answers[same]) == said["plain"], same
    assert content(answers["stopped"]) == said["plain"].partition("intelligent")[0] != said["plain"]
    assert answers["stopped"].choices[0].finish_reason == "stop"
    assert said["plain"] == "Cats are" + content(answers["prefilled"])[: len(said["plain"]) - len("Cats are")]
    for changed in ("penalised", "biased"):
        assert content(answers[changed]) != said["plain"], changed
    ruled = answers["ruled"].choices[0]
    assert ruled.finish_reason == "stop"
    assert (ruled.model_extra or {})["interpretability"]["stopped_by"]["rule"] == 0
    body = {"prompt": CHAT, "max_new_tokens": 8, "n_logprobs": 3, "compare": False}
    ours = http.post("/v1/steer", json=body).json()["steered"]["logprobs"]
    logprobs = answers["probable"].choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for one, other in zip(logprobs.content, ours, strict=True):
        assert one.token == other["token"] == bytes(one.bytes or ()).decode()
        assert one.logprob == pytest.approx(other["logprob"], abs=1e-4)
        assert [each.token for each in one.top_logprobs] == [each["token"] for each in other["top_logprobs"]]
    values = (answers["watched"].choices[0].model_extra or {})["interpretability"]["watch"]
    assert len(values["tokens"]) == 35 + 8
    assert max(values["values"][0]["after"]) > 10


def test_each_of_several_answers_has_the_seed_that_follows(client: openai.OpenAI) -> None:
    several = client.chat.completions.create(**reproducible({**GREEDY, **CALLS["several"]}))
    assert len({choice.message.content for choice in several.choices}) == 3
    for place, choice in enumerate(several.choices):
        alone = client.chat.completions.create(**reproducible({**GREEDY, "temperature": 1.2, "seed": 5 + place}))
        assert content(alone) == choice.message.content
    unseeded = [content(client.chat.completions.create(**{**GREEDY, "temperature": 2})) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.long
def test_two_hundred_streams_at_once_are_what_each_is_alone(runtime: Runtime, serve: Serve) -> None:
    """Ten chats with steerings and seeds of their own, each twenty times over sixteen rows: the greedy ones up to
    rounding, the drawn ones, which are reproducible, to the letter."""
    words = ["cats", "rain", "bread", "money", "music", "trees", "chess", "the sea", "trains", "sleep"]
    asked: list[dict[str, Any]] = [
        {
            **GREEDY,
            "messages": [{"role": "user", "content": f"Tell me about {word}."}],
            "max_tokens": 4 + place % 3,
            "temperature": 0.7 * (place % 2),
            "seed": place,
            **{"logprobs": True, "top_logprobs": 2},
            "extra_body": {"features": [{**FEATURE, "strength": 14 * place}], "reproducible": bool(place % 2)},
        }
        for place, word in enumerate(words)
    ]

    async def said(client: openai.AsyncOpenAI, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The tokens, with their log-probabilities."""
        choices = [one.choices[0] async for one in await client.chat.completions.create(**body, stream=True)]
        return [token.model_dump() for one in choices if one.logprobs for token in one.logprobs.content or ()]

    async def ask(url: str) -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=200, timeout=SOON_S) as client:
            alone = [await said(client, body) for body in asked]
            together = await asyncio.gather(*(said(client, body) for body in asked * 20))
            return alone, together

    alone, together = asyncio.run(ask(serve(small_settings(), lambda: runtime).url))
    assert len({"".join(token["token"] for token in tokens) for tokens in alone}) == len(words)
    for place, tokens in enumerate(together):
        body, expected = asked[place % 10], alone[place % 10]
        assert tokens == expected if body["temperature"] else same_choices(tokens, expected)


def test_coroutines_and_streams_of_them(server: Served, said: dict[str, str]) -> None:
    async def ask() -> tuple[str, str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(**GREEDY, extra_body=STEERED)
            streamed = await client.chat.completions.create(**GREEDY, extra_body=STEERED, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in streamed]
            return content(whole), "".join(pieces), [model.id async for model in client.models.list()]

    assert asyncio.run(ask()) == (said["steered"], said["steered"], [MODEL, f"{MODEL}+economy"])


# Texts


def test_texts_go_on_from_texts_and_from_token_ids(client: openai.OpenAI, http: httpx.Client) -> None:
    one = client.completions.create(**TEXT, extra_body=STEERED)
    ids = client.completions.create(**{**TEXT, "prompt": IDS}, extra_body=STEERED)
    several = client.completions.create(**{**TEXT, "prompt": [TEXT["prompt"], "A dog"]}, n=2, extra_body=STEERED)
    lists = client.completions.create(**{**TEXT, "prompt": [IDS, IDS[:2]]}, extra_body=STEERED)
    plain = client.completions.create(**TEXT)
    text = one.choices[0].text
    assert text == ids.choices[0].text == several.choices[0].text == several.choices[1].text == lists.choices[0].text
    assert plain.choices[0].text != text
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (len(IDS) + 2, 32)
    echoed = client.completions.create(**TEXT, echo=True, logprobs=None, extra_body=STEERED)
    assert echoed.choices[0].text == TEXT["prompt"] + text


def test_streams_of_texts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**TEXT, "prompt": [TEXT["prompt"], "A dog"], "logprobs": 2, "n": 2, "seed": 1}
    whole = client.completions.create(**asked)
    options: Any = {"include_usage": True}
    *told, counted = client.completions.create(**asked, stream=True, stream_options=options)
    assert counted.usage == whole.usage
    for choice in whole.choices:
        mine = [event.choices[0] for event in told if event.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert [one.finish_reason for one in mine][-1] == choice.finish_reason == "length"
        assert choice.logprobs is not None
        offsets = [place for one in mine if one.logprobs for place in one.logprobs.text_offset or ()]
        assert offsets == choice.logprobs.text_offset
        tokens = choice.logprobs.tokens or []
        assert [choice.text[place:].startswith(token) for place, token in zip(offsets, tokens, strict=True)] == [
            True
        ] * 8
        for token, logprob, top in zip(
            tokens, choice.logprobs.token_logprobs or (), choice.logprobs.top_logprobs or (), strict=True
        ):
            assert top[token] == logprob == max(top.values()), "greedy"


def test_echoed_prompts_are_as_likely_as_our_own_route_finds_them(client: openai.OpenAI, http: httpx.Client) -> None:
    """Steered and not, with nothing generated behind and with a token, which harnesses cut off."""
    found: list[Any] = []
    for steering in ({}, STEERED):
        body = {"prompt": IDS[:1], "continuations": [IDS[1:]], "n_logprobs": 2, **steering}
        ours = http.post("/v1/score", json=body).json()["results"][0]
        asked: dict[str, Any] = {**TEXT, "prompt": [IDS, IDS[:1]], "echo": True, "logprobs": 2, "extra_body": steering}
        for n in (0, 1):
            answer = client.completions.create(**{**asked, "max_tokens": n})
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2 * n
            one, other = (choice.logprobs for choice in answer.choices)
            assert one is not None
            assert other is not None
            logprobs = one.token_logprobs or []
            assert (logprobs[0], len(logprobs), len(other.tokens or [])) == (None, len(IDS) + n, 1 + n)
            assert logprobs[1 : len(IDS)] == pytest.approx(ours["logprobs"], abs=1e-3)
            found.append(logprobs[1 : len(IDS)])
            for token, logprob, top in zip(one.tokens or [], logprobs, one.top_logprobs or [], strict=True):
                assert logprob is None or top[token] == logprob <= max(top.values())
            shown = answer.choices[0].text
            pairs = zip(one.text_offset or [], one.tokens or [], strict=True)
            assert all(shown[at:].startswith(token) for at, token in pairs)
    assert found[0] != pytest.approx(found[-1], abs=0.1)


# Models and errors


def test_texts_are_judged_as_our_own_route_judges_them(client: openai.OpenAI, http: httpx.Client) -> None:
    asked = {"prompt": CHAT, "features": [FEATURE], "max_new_tokens": 8, "judge": True, "compare": False}
    own = http.post("/v1/steer", json=asked).json()["steered"]["judge"]
    extra = {**STEERED, "judge": True}
    whole = client.chat.completions.create(**GREEDY, n=2, extra_body=extra)
    events = list(client.chat.completions.create(**GREEDY, n=2, stream=True, extra_body=extra))
    streamed = [one for event in events for one in event.choices if getattr(one, "interpretability", None)]
    for found in (whole.choices, streamed):
        assert [one.index for one in found] == [0, 1]
        for one in found:
            judge: Any = getattr(one, "interpretability", None)
            assert judge["judge"]["dose"] == pytest.approx(own["dose"], rel=1e-3)
            assert judge["judge"]["logprob_per_token"] == pytest.approx(own["logprob_per_token"], rel=1e-3)
    text = client.completions.create(**TEXT, extra_body=extra)
    of_text: Any = getattr(text.choices[0], "interpretability", None)
    assert of_text["judge"]["dose"][0] > 0.1
    plain = client.completions.create(**TEXT, extra_body={"judge": True})
    of_plain: Any = getattr(plain.choices[0], "interpretability", None)
    assert of_plain["judge"]["dose"] == []


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", GREEDY), ("/v1/completions", {**TEXT, "temperature": 0.8})]
)
def test_a_receipt_can_be_run_again(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    asked = {**body, **STEERED, "receipt": True, "seed": 7, "reproducible": True}
    answer = http.post(path, json=asked).json()
    receipt = receipt_in(answer)
    assert receipt["edits"][0]["acted"] is True
    again = receipt_in(http.post(path, json=body_of(receipt)).json())
    assert compared(receipt, again).is_same
    other = body_of(receipt) | {"features": [{**FEATURE, "strength": 60}]}
    assert not compared(receipt, receipt_in(http.post(path, json=other).json())).is_same
    with http.stream("POST", path, json={**asked, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    last = json.loads(lines[-1])
    assert last["choices"] == []
    assert compared(receipt, receipt_in(last)).is_same


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 2}, "n is 2"),
        ({"prompt": ["a", "b"]}, "there are 2 prompts"),
        ({"max_tokens": 0, "echo": True}, "writes none"),
    ],
)
def test_a_receipt_is_of_one_text(http: httpx.Client, change: dict[str, Any], why: str) -> None:
    answer = http.post("/v1/completions", json={**TEXT, **change, "receipt": True})
    assert answer.status_code in (400, 422)
    assert why in answer.json()["error"]["message"]


def test_models_are_the_served_one_and_its_variants(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, f"{MODEL}+economy"]
    variant = client.models.retrieve(f"{MODEL}+economy")
    assert (variant.model_extra or {})["steering"] == STEERED
    assert not client.models.retrieve(MODEL).model_extra
    with pytest.raises(openai.NotFoundError, match="smollm2-135m-instruct[+]economy"):
        client.models.retrieve(f"{MODEL}+econmy")


@pytest.mark.parametrize(
    ("steering", "why"),
    [
        ({"features": [{**FEATURE, "index": 9999}]}, "Feature index 9999 is out of range"),
        ({"features": [{**FEATURE, "source": "99-res-4k"}]}, "99-res-4k"),
        ({**STEERED, "max_dose": {"value": 0.01, "then": "refuse"}}, "max_dose: add may write"),
    ],
)
def test_a_variant_that_cannot_be_honoured_is_named(runtime: Runtime, steering: dict[str, Any], why: str) -> None:
    good = runtime.variants["economy"]
    bad = Variant("bad", Steering.model_validate(steering), steering)
    asyncio.run(check_variants(runtime))
    with pytest.raises(StartupError, match=f"^VARIANTS: bad: .*{re.escape(why)}"):
        asyncio.run(check_variants(cast("Runtime", Wrapped(runtime, variants={"economy": good, "bad": bad}))))


def test_a_server_with_such_a_variant_ends_in_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({"features": [{**FEATURE, "index": 9999}]}))
    command = [sys.executable, "-m", "neuronpedia_inference", "serve", "--port", "0"]
    environment = {**os.environ, "VARIANTS": str(tmp_path), "SAE_SETS": "res-4k", "NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SOON_S, check=False)
    assert done.returncode == FAILED
    assert "VARIANTS: bad: features.0: Feature index 9999 is out of range" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_variant_and_edits_of_the_request_act_together(client: openai.OpenAI) -> None:
    other = {"source": SOURCE, "index": 42, "strength": 60}
    both = client.chat.completions.create(**GREEDY, extra_body={"features": [FEATURE, other]})
    varied = client.chat.completions.create(**{**GREEDY, "model": f"{MODEL}+economy"}, extra_body={"features": [other]})
    assert content(varied) == content(both)


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "gpt-4o"}, openai.NotFoundError, "Unknown model 'gpt-4o'"),
    ({"model": f"{MODEL}+nothing"}, openai.NotFoundError, "economy"),
    (
        {"extra_body": {"audio": {"voice": "x"}, "modalities": ["audio"]}},
        openai.BadRequestError,
        "'audio', 'modalities'",
    ),
    ({"extra_body": {"feature": [FEATURE]}}, openai.BadRequestError, "Did you mean 'features'"),
    ({"extra_body": {"features": [{**FEATURE, "index": 4096}]}}, openai.BadRequestError, "out of range"),
    ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
    ({"max_tokens": 60}, openai.BadRequestError, "No room to generate"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, openai.BadRequestError, "differ"),
    ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "elf", "content": "hi"}]}, openai.BadRequestError, "Unknown role 'elf'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        openai.BadRequestError,
        "messages.0.content",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "template does not read it"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format.type"),
    ({"logit_bias": {"49152": 1}}, openai.BadRequestError, "there is no token 49152"),
    ({"logit_bias": {"x": 1}}, openai.BadRequestError, "keys are token ids"),
    ({"stop": ["a", "b", "c", "d", "e"]}, openai.BadRequestError, "stop: 5 items are too many, the most is 4"),
    ({"top_logprobs": 2}, openai.BadRequestError, "goes with logprobs"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "goes with stream"),
    ({"n": 17}, openai.BadRequestError, "less than or equal to 16"),
    ({"temperature": 1, "extra_body": {"reproducible": True}}, openai.BadRequestError, "needs a seed"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, openai.BadRequestError, "tokenize"),
]


@pytest.mark.parametrize(("asked", "kind", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_done_is_refused_in_openai_s_words(
    client: openai.OpenAI, asked: dict[str, Any], kind: type[openai.APIStatusError], says: str
) -> None:
    for stream in (False, True):
        if stream and "stream_options" in asked:
            continue
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**{**GREEDY, **asked}, stream=stream)
        body: Any = refused.value.body
        assert says in body["message"]
        assert body.keys() == {"message", "type", "param", "code"}


def test_the_secret_is_the_api_key(locked_server: Served) -> None:
    base = f"{locked_server.url}/v1"
    with (
        openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    key = SECRET.encode().decode("latin-1")  # the client sends latin-1
    with httpx.Client(headers={b"Authorization": b"Bearer " + SECRET.encode()}) as bare:
        assert bare.get(f"{base}/models").json()["data"][0]["id"] == MODEL, key


def test_events_end_in_done_and_other_routes_keep_their_errors(http: httpx.Client) -> None:
    lines = http.post("/v1/chat/completions", json={**GREEDY, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert isinstance(http.post("/v1/steer", json={"prompt": ""}).json()["error"], str)
    assert http.post("/v1/completions", json={"prompt": ""}).json()["error"]["code"] == "invalid_request"
