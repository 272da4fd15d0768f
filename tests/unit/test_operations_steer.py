"""Steering operations: plans, rows, chats and streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.domain import ChatMessage, Sampling, TokenLogprob, Written
from neuronpedia_inference.edits.plan import BY_METHOD, Direction, Do, Edit, Feature, Plan
from neuronpedia_inference.errors import InvalidRequest, LimitExceeded
from neuronpedia_inference.operations import answer_events, answer_events_json, by_name
from neuronpedia_inference.operations.chat import open_reasoning, read_answer, without_reasoning
from neuronpedia_inference.operations.operation import Events
from neuronpedia_inference.operations.story import logprob_reply
from neuronpedia_inference.schemas.steering import NPSteerMethod

from .test_operations_fake import FakeRuntime, ask, client_reads

FEATURE = {"model": "m", "source": "1-res", "index": 3, "strength": 5}
VECTOR = {"hook": "blocks.1.hook_resid_post", "steering_vector": [1, 0, 0, 0], "strength": -2.5}
HELLO = {"role": "user", "content": "hi"}


def completion(**changes: Any) -> dict[str, Any]:
    body = {
        "prompt": "one two",
        "model": "tiny",
        "steer_method": "SIMPLE_ADDITIVE",
        "normalize_steering": False,
        "types": ["STEERED", "DEFAULT"],
        "features": [FEATURE],
        "n_completion_tokens": 8,
        "temperature": 0,
        "strength_multiplier": 2,
        "freq_penalty": 0,
        "seed": 16.9,
    }
    return {**body, **changes}


def chat(*messages: dict[str, str], **changes: Any) -> dict[str, Any]:
    return completion(prompt=list(messages or [HELLO]), steer_special_tokens=False, **changes)


def events_of(name: str, body: dict[str, Any], runtime: Any) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event async for event in await answer_events(by_name[name], body, runtime)]

    return asyncio.run(collect())


# Plans and rows


def test_a_completion_is_one_generation_with_a_row_per_type():
    runtime = FakeRuntime()
    answer = ask("steer_completion", completion(n_logprobs=2, temperature=0.5, freq_penalty=-1), runtime)
    prompt, plans, sampling, stream = runtime.called("generate")
    assert prompt.strings == ("<s>", "one", " two")
    assert plans == [Plan((Edit(Do.ADD, Feature("1-res", 3), 10.0),)), None]
    assert sampling == Sampling(8, temperature=0.5, freq_penalty=-1.0, seed=16, n_logprobs=2)
    assert stream is False
    assert [(one["type"], one["output"]) for one in answer["outputs"]] == [
        ("STEERED", " steered"),
        ("DEFAULT", " plain"),
    ]
    client_reads("steer_completion", answer)


@pytest.mark.parametrize("types", [["DEFAULT", "STEERED"], ["DEFAULT"], ["STEERED"]])
def test_outputs_follow_the_order_of_types(types: list[str]):
    answer = ask("steer_completion", completion(types=types))
    assert [one["type"] for one in answer["outputs"]] == types


def test_vectors_become_steers():
    runtime = FakeRuntime()
    body = completion(features=None, vectors=[VECTOR], steer_method="PROJECTION_CAP", normalize_steering=True)
    ask("steer_completion", body, runtime)
    direction = Direction("blocks.1.hook_resid_post", [1.0, 0.0, 0.0, 0.0])
    assert runtime.called("generate")[1][0] == Plan((Edit(Do.CAP, direction, -5.0, normalize=True),))


def test_a_features_own_vector_is_ignored():
    runtime = FakeRuntime()
    ask("steer_completion", completion(features=[{**FEATURE, "steering_vector": [9.0]}]), runtime)
    assert runtime.called("generate")[1][0].edits == (Edit(Do.ADD, Feature("1-res", 3), 10.0),)


def test_every_method_has_a_name_on_the_wire():
    assert list(BY_METHOD) == list(NPSteerMethod.__args__)


@pytest.mark.parametrize("given_", [{"features": []}, {"features": None, "vectors": []}])
def test_an_empty_list_steers_nothing(given_: dict[str, Any]):
    runtime = FakeRuntime()
    ask("steer_completion", completion(**given_), runtime)
    assert runtime.called("generate")[1] == [None, None]


@pytest.mark.parametrize("given_", [{"features": None}, {"vectors": [VECTOR]}, {"vectors": []}])
def test_exactly_one_of_features_and_vectors(given_: dict[str, Any]):
    with pytest.raises(InvalidRequest, match="^Invalid request data: exactly one of features or vectors must be"):
        ask("steer_completion", completion(**given_))


def test_a_type_may_be_asked_for_once():
    with pytest.raises(InvalidRequest, match="types"):
        ask("steer_completion", completion(types=["STEERED", "STEERED"]))


def test_strengths_are_bounded():
    with pytest.raises(InvalidRequest, match="features.0.strength: .*1000000; strength_multiplier: .*1000000"):
        ask("steer_completion", completion(strength_multiplier=1e200, features=[{**FEATURE, "strength": 1e200}]))


def test_an_empty_prompt_starts_at_bos_and_is_refused_without_one():
    assert ask("steer_completion", completion(prompt=""))["outputs"]
    with pytest.raises(InvalidRequest, match="^Prompt is empty$"):
        ask("steer_completion", completion(prompt=""), FakeRuntime(has_bos=False))


def test_a_long_prompt_is_refused():
    with pytest.raises(LimitExceeded, match="^Text too long: 32 tokens, max is 20"):
        ask("steer_completion", completion(prompt="a " * 30), FakeRuntime(token_limit=20))


# Log-probabilities and nulls


def test_log_probabilities_come_only_when_asked_for():
    for n_logprobs in (0, None):
        for output in ask("steer_completion", completion(n_logprobs=n_logprobs))["outputs"]:
            assert set(output) == {"type", "output"}
    for output in ask("steer_completion", completion(n_logprobs=2))["outputs"]:
        [entry] = output["logprobs"]
        assert entry["logprob"] == -0.5
        assert entry["top_logprobs"] == [{"token": "t0", "logprob": -100.0}, {"token": "t1", "logprob": -2.0}]


def test_chat_leaves_unset_fields_out():
    answer = ask("steer_completion_chat", chat(is_assistant_axis=True), FakeRuntime(persona=None))
    assert set(answer) == {"outputs", "input"}
    assert set(answer["input"]) == {"raw", "chat_template"}
    assert set(answer["outputs"][0]) == {"raw", "chat_template", "type"}


# Chats


def test_a_chat_is_answered_as_text_and_as_messages():
    runtime = FakeRuntime(completions=[(Written(" yes \n<|im_end|>junk"), Written(""))])
    answer = ask("steer_completion_chat", chat(HELLO), runtime)
    raw = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer["input"] == {"raw": raw, "chat_template": [HELLO]}
    steered, default = answer["outputs"]
    assert steered["raw"] == raw + " yes \n<|im_end|>junk"
    assert steered["chat_template"] == [HELLO, {"role": "assistant", "content": "yes"}]
    assert (default["raw"], default["chat_template"]) == (raw, [HELLO])
    parsed = client_reads("steer_completion_chat", answer)
    assert [one.type for one in parsed.outputs] == ["STEERED", "DEFAULT"]


@pytest.mark.parametrize("steer_special_tokens", [True, False])
def test_special_tokens_of_a_chat_are_steered_when_asked(steer_special_tokens: bool):
    runtime = FakeRuntime()
    ask("steer_completion_chat", {**chat(), "steer_special_tokens": steer_special_tokens}, runtime)
    assert runtime.called("generate")[1][0].skip_special_tokens is not steer_special_tokens


def test_earlier_reasoning_is_rendered_out_but_echoed():
    runtime = FakeRuntime()
    messages = [
        {"role": "user", "content": "<think>mine</think>hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "assistant", "content": "<think>only</think>"},
        HELLO,
    ]
    answer = ask("steer_completion_chat", chat(*messages), runtime)
    assert runtime.called("render_chat") == [
        ChatMessage("user", "<think>mine</think>hi"),
        ChatMessage("assistant", "yes"),
        ChatMessage("user", "hi"),
    ]
    assert answer["input"]["chat_template"] == messages
    assert answer["outputs"][0]["chat_template"][:4] == messages


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "<think>only</think> "}]])
def test_a_chat_without_content_is_refused(messages: list[dict[str, str]]):
    with pytest.raises(InvalidRequest, match="At least one message"):
        ask("steer_completion_chat", {**chat(), "prompt": messages})


def test_reasoning_that_the_template_opened_is_closed_in_the_answer():
    runtime = FakeRuntime(
        template_tail="<|im_start|>assistant\n<think>\n", completions=[(Written("hm\n</think>\n\nyes<|im_end|>"),)]
    )
    answer = ask("steer_completion_chat", chat(types=["DEFAULT"]), runtime)
    assert answer["outputs"][0]["chat_template"][-1]["content"] == "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("generated", "opened", "content"),
    [
        ("plain", "", "plain"),
        ("  \n", "", ""),
        ("<|im_end|>after", "", ""),
        ("a<end_of_turn>b<|im_end|>c", "", "a"),
        ("a<｜end▁of▁sentence｜>", "", "a"),
        ("a<|eot_id|>", "", "a"),
        ("[THINK]hm[/THINK]yes", "", "<think>hm</think>yes"),
        ("hm</seed:think>yes", "<seed:think>", "<think>hm</think>yes"),
        ("a <thought> in passing", "", "a <thought> in passing"),
        ("", "<think>\n", ""),
        ("hm", "<think>\n", "<think>\nhm"),
    ],
)
def test_answers_are_read_from_the_generation(generated: str, opened: str, content: str):
    assert read_answer(generated, opened) == content


@pytest.mark.parametrize(
    ("rendered", "tail"),
    [("<a>\n<think>\n", "<think>\n"), ("x<think>", "<think>"), ("<think></think>\n\n", ""), ("plain", "")],
)
def test_reasoning_left_open_by_a_template(rendered: str, tail: str):
    assert open_reasoning(rendered) == tail


def test_unclosed_and_empty_messages_stay():
    messages = [ChatMessage("assistant", "<think>open"), ChatMessage("assistant", ""), ChatMessage("user", "")]
    assert without_reasoning(messages) == messages


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " "]), max_size=30).map("".join))
def test_stripped_messages_hold_no_closed_block(content: str):
    for message in without_reasoning([ChatMessage("assistant", content)]):
        assert "</think>" not in message.content.partition("<think>")[2]


def test_stripping_is_linear():
    content = "<think>" * 200_000
    assert without_reasoning([ChatMessage("assistant", content)])[0].content == content
    closed = "<think></think>\n" * 200_000 + "end"
    assert without_reasoning([ChatMessage("assistant", closed)])[0].content == "end"


# Streams


def growing(*texts: str) -> list[tuple[Written, ...]]:
    return [(Written(text), Written("")) for text in texts]


@pytest.mark.parametrize("name", ["steer_completion", "steer_completion_chat", "steer"])
def test_events_are_cumulative_and_end_with_the_buffered_answer(name: str):
    runtime = FakeRuntime(completions=growing("a", "b", "c"))
    body = {"steer_completion": completion(), "steer_completion_chat": chat()}.get(
        name, {"prompt": "one", "features": []}
    )
    events = events_of(name, body, runtime)
    assert runtime.called("generate")[3] is True
    assert len(events) == 3
    assert events[-1] == ask(name, body, FakeRuntime(completions=growing("a", "b", "c")))
    if name == "steer_completion":
        assert [[one["output"] for one in event["outputs"]] for event in events] == [
            ["a", ""],
            ["ab", ""],
            ["abc", ""],
        ]


def told(*tokens: str) -> list[tuple[Written, ...]]:
    """Both rows say the same, with a log-probability for each token; they end with the last."""
    steps = []
    for place, token in enumerate(tokens):
        logprob = TokenLogprob(token, -0.5, ((token, -0.5), ("é", float("-inf"))))
        end = "stop" if place == len(tokens) - 1 else None
        steps.append((Written(token, (place,), (logprob,), end),) * 2)
    return steps


def test_the_token_that_stops_a_text_ends_the_wire_s_and_not_our_own():
    """Contract 3.5 for the wire; nothing of it is in any event of ours, and all else is the same."""
    steps = [(Written("a", (1,)),), (Written("b", (2,), (), "stop", ending="<|im_end|>"),)]
    for stream in (False, True):
        shown: dict[str, Any] = {}
        bodies: dict[str, dict[str, Any]] = {
            "steer_completion": completion(types=["STEERED"]),
            "steer_completion_chat": chat(types=["STEERED"]),
            "steer": {"prompt": "one", "features": [], "compare": False},
            "steer of a chat": {"prompt": [HELLO], "features": [], "compare": False},
            "deltas": {"prompt": "one", "features": [], "compare": False, "deltas": True, "stream": True},
        }
        for name, body in bodies.items():
            operation = name if name.startswith("steer_") else "steer"
            if stream or name == "deltas":
                shown[name] = events_of(operation, body, FakeRuntime(completions=steps))
            else:
                shown[name] = [ask(operation, body, FakeRuntime(completions=steps))]
        assert shown["steer_completion"][-1]["outputs"][0]["output"] == "ab<|im_end|>"
        assert shown["steer_completion_chat"][-1]["outputs"][0]["raw"].endswith("ab<|im_end|>")
        for name in ("steer", "steer of a chat"):
            assert shown[name][-1]["steered"]["text"] == "ab"
            assert all("<|im_end|>" not in event["steered"]["text"] for event in shown[name])
            assert shown[name][-1]["steered"]["finish_reason"] == "stop"
        assert shown["steer of a chat"][-1]["steered"]["messages"][-1]["content"] == "ab"
        assert [event["steered"]["text"] for event in shown["deltas"]] == ["a", "b"]


DELTAS = {"prompt": [HELLO], "features": [], "n_logprobs": 2, "deltas": True, "stream": True}


def test_deltas_add_up_to_the_buffered_answer():
    tokens = ("one", ' "two"', " ü<|im_end|>")
    events = events_of("steer", DELTAS, FakeRuntime(completions=told(*tokens)))
    whole = ask("steer", {**DELTAS, "deltas": False, "stream": False}, FakeRuntime(completions=told(*tokens)))
    for side in ("steered", "default"):
        assert "".join(event[side]["text"] for event in events) == whole[side]["text"]
        assert sum((event[side]["logprobs"] for event in events), []) == whole[side]["logprobs"]
        assert [event[side]["text"] for event in events] == list(tokens)
        assert [event[side]["messages"] for event in events[:-1]] == [None, None]
        last = {key: events[-1][side][key] for key in ("messages", "finish_reason")}
        assert last == {key: whole[side][key] for key in last}
        assert last["finish_reason"] == "stop"


def test_deltas_without_a_stream_are_refused():
    with pytest.raises(InvalidRequest, match="deltas: goes with stream"):
        ask("steer", {**DELTAS, "stream": False})


@pytest.mark.parametrize("name", ["steer_completion", "steer_completion_chat", "steer"])
def test_what_was_rendered_is_not_rendered_again(name: str, monkeypatch: pytest.MonkeyPatch):
    """Work for an event is what is new in it: every log-probability is made once, whatever the number of events."""
    made: list[str] = []

    def counted(one: TokenLogprob) -> Any:
        made.append(one.token)
        return logprob_reply(one)

    monkeypatch.setattr("neuronpedia_inference.operations.story.logprob_reply", counted)
    tokens = [f" {n}" for n in range(20)]
    bodies = {"steer_completion": completion(n_logprobs=2), "steer_completion_chat": chat(n_logprobs=2)}
    body = bodies.get(name, {"prompt": "one", "features": [], "n_logprobs": 2})
    runtime = FakeRuntime(completions=told(*tokens))

    async def collect() -> list[bytes]:
        events = await answer_events_json(by_name[name], body, runtime)  # pyright: ignore[reportArgumentType]
        return [event async for event in events]

    texts = asyncio.run(collect())
    assert sorted(made) == sorted([*tokens, *tokens])
    assert [json.loads(text) for text in texts] == events_of(name, body, FakeRuntime(completions=told(*tokens)))


@pytest.mark.parametrize("change", [{"features": None}, {"types": []}, {"n_completion_tokens": 9999}])
def test_a_stream_is_refused_before_it_starts(change: dict[str, Any]):
    body = completion(**change)

    async def start() -> None:
        with pytest.raises(InvalidRequest):
            await answer_events(by_name["steer_completion"], body, FakeRuntime())  # pyright: ignore[reportArgumentType]

    asyncio.run(start())


def test_operations_without_a_stream_say_so():
    async def start() -> None:
        with pytest.raises(InvalidRequest, match="tokenize does not stream"):
            await answer_events(by_name["tokenize"], {}, FakeRuntime())  # pyright: ignore[reportArgumentType]

    asyncio.run(start())


@pytest.mark.parametrize("read", [0, 1])
@pytest.mark.parametrize("name", ["steer_completion", "steer"])
def test_closing_a_stream_early_closes_the_generation(name: str, read: int):
    runtime = FakeRuntime(completions=growing("a", "b"))
    body = completion() if name == "steer_completion" else {"prompt": "one", "features": []}

    async def leave() -> None:
        events = await answer_events(by_name[name], body, runtime)  # pyright: ignore[reportArgumentType]
        assert isinstance(events, Events)
        for _ in range(read):
            await anext(events)
        await events.aclose()

    asyncio.run(leave())
    assert runtime.closed == 1


def test_a_buffered_answer_closes_the_generation():
    runtime = FakeRuntime()
    ask("steer_completion", completion(), runtime)
    assert runtime.closed == 1
