"""Persona axes over a real port: messages of a chat against plain Hugging Face, steered chats, and axes by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from served import MODEL, WIDTH, Serve, Wrapped, small_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference.embedded import PERSONA_FOLDER
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.persona import FACTS, TENSORS, persona_of
from neuronpedia_inference.runtime import Runtime

FACTS_HERE = json.loads((PERSONA_FOLDER / FACTS).read_text(encoding="utf-8"))
TENSORS_HERE = load_file(PERSONA_FOLDER / TENSORS)
LAYER, [TITLE] = FACTS_HERE["layer"], FACTS_HERE["titles"]
HOOK = f"blocks.{LAYER}.hook_resid_post"
CHAT = [
    {"role": "system", "content": "Hi."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A pirate!"},
    {"role": "user", "content": "Hi"},
]


def by_hand(chat: list[dict[str, str]]) -> list[float]:
    """The assistant's messages on the axis, by Hugging Face's model and template."""
    net: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def ids(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    with torch.no_grad():
        states = net(torch.tensor([ids(chat)]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    found = []
    for number, message in enumerate(chat):
        if message["role"] == "assistant":
            own = states[len(ids(chat[:number])) : len(ids(chat[: number + 1]))]
            found.append(float((own.mean(0) - TENSORS_HERE["mean"]) @ TENSORS_HERE["axes"][0]))
    return found


def monitored(http: httpx.Client, chat: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    answer = http.post("/v1/persona/monitor", json={"model": MODEL, "conversation": chat, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_messages_lie_where_they_do_in_hugging_face(http: httpx.Client) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "responsibility " * 9}]
    told = monitored(http, chat, layer=LAYER)
    assert told["pc_titles"] == [TITLE]
    assert [turn["snippet"] for turn in told["turns"]] == [chat[2]["content"], chat[4]["content"][:120] + "..."]
    values = [turn["pc_values"][TITLE] for turn in told["turns"]]
    assert values == pytest.approx(by_hand(chat), abs=2e-3 * float(TENSORS_HERE["mean"].norm()))
    assert abs(values[0] - values[1]) > 0.1, "the tolerance can tell them apart"


def asked(**more: Any) -> dict[str, Any]:
    vector = {"steering_vector": TENSORS_HERE["axes"][0].tolist(), "strength": 3.0, "hook": HOOK}
    fields = {"steer_method": "SIMPLE_ADDITIVE", "normalize_steering": False, "types": ["STEERED", "DEFAULT"]}
    fields |= {"strength_multiplier": 1, "temperature": 0, "freq_penalty": 0, "seed": 0, "n_completion_tokens": 5}
    said = {"prompt": CHAT, "vectors": [vector], "steer_special_tokens": True, "is_assistant_axis": True}
    return {"model": MODEL, **fields, **said, **more}


def test_a_steered_chat_tells_where_its_answers_lie(http: httpx.Client) -> None:
    answer = http.post("/v1/steer/completion-chat", json=asked()).json()
    axes = {one["type"]: one for one in answer["assistant_axis"]}
    chats = {one["type"]: one["chat_template"] for one in answer["outputs"]}
    assert list(axes) == ["STEERED", "DEFAULT"]
    for kind, axis in axes.items():
        told = monitored(http, chats[kind])
        assert axis["pc_titles"] == told["pc_titles"]
        assert [turn["snippet"] for turn in axis["turns"]] == [turn["snippet"] for turn in told["turns"]]
        plain = [turn["pc_values"][TITLE] for turn in axis["turns"]]
        assert plain == pytest.approx([turn["pc_values"][TITLE] for turn in told["turns"]], abs=1e-3)
        assert len(plain) == 2
    moved = [turn["pc_values_post_cap"][TITLE] - turn["pc_values"][TITLE] for turn in axes["STEERED"]["turns"]]
    assert moved == pytest.approx([3.0, 3.0], abs=1e-2), "along a unit vector, at the place that is measured"
    assert not any("pc_values_post_cap" in turn for turn in axes["DEFAULT"]["turns"])


def test_a_stream_tells_it_with_its_last_event(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/steer/completion-chat", json=asked(stream=True)) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert [bool(event.get("assistant_axis")) for event in events] == [*[False] * (len(events) - 1), True]
    assert events[-1] == http.post("/v1/steer/completion-chat", json=asked()).json()


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_told_in_the_room_of_what_was_written(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Requests that are written and wait for room would otherwise wait for each other."""
    monkeypatch.setattr(runtime._admission, "bounds", replace(runtime._admission.bounds, requests=1))
    answer = http.post("/v1/steer/completion-chat", json=asked(n_completion_tokens=2, stream=stream))
    assert answer.status_code == 200
    assert answer.text.count('"pc_titles"') == 2
    assert "event: error" not in answer.text


BLANKED = [{"role": "system", "content": ""}, *CHAT[1:]]


@pytest.fixture
def blanking(runtime: Runtime, serve: Serve) -> Iterator[httpx.Client]:
    """Of a server whose axes were fitted without what system messages say."""
    assert runtime.persona is not None
    persona = replace(runtime.persona, blanks_system_message=True)
    with serve(small_settings(), lambda: Wrapped(runtime, persona=persona)).client() as client:
        yield client


def answered_by_hand(chat: list[dict[str, str]], n_new: int) -> tuple[str, str]:
    """The chat as Hugging Face's template has it, and its greedy answer."""
    net: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = net.generate(ids, max_new_tokens=n_new, do_sample=False)[0, ids.shape[1] :]
    return text, tokenizer.decode(written)


@pytest.mark.parametrize("stream", [False, True])
def test_a_leading_system_message_is_left_out_where_the_axes_were_fitted_so(
    blanking: httpx.Client, stream: bool
) -> None:
    if stream:
        with blanking.stream("POST", "/v1/steer/completion-chat", json=asked(stream=True)) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        told = json.loads(lines[-1][6:])
    else:
        told = blanking.post("/v1/steer/completion-chat", json=asked()).json()
    text, written = answered_by_hand(BLANKED, 5)
    assert told["input"] == {"raw": text, "chat_template": BLANKED}
    plain = next(one for one in told["outputs"] if one["type"] == "DEFAULT")
    assert plain["raw"] == text + written
    assert plain["chat_template"][:-1] == BLANKED
    [axis] = [one for one in told["assistant_axis"] if one["type"] == "DEFAULT"]
    values = [turn["pc_values"][TITLE] for turn in axis["turns"]]
    close = 2e-3 * float(TENSORS_HERE["mean"].norm())
    assert values == pytest.approx(by_hand(plain["chat_template"]), abs=close)
    assert abs(values[0] - by_hand(CHAT)[0]) > 2 * close, "what is said to the model would be noticed"


def test_it_is_left_out_of_what_is_monitored_and_of_nothing_else(blanking: httpx.Client) -> None:
    close = 2e-3 * float(TENSORS_HERE["mean"].norm())
    for chat, read in ((CHAT, BLANKED), (CHAT[1:], CHAT[1:]), ([*CHAT[1:3], CHAT[0]], [*CHAT[1:3], CHAT[0]])):
        [turn] = monitored(blanking, chat)["turns"]
        assert turn["pc_values"][TITLE] == pytest.approx(by_hand(read)[0], abs=close)
    told = blanking.post("/v1/steer/completion-chat", json=asked(is_assistant_axis=False)).json()
    assert told["input"] == {"raw": answered_by_hand(CHAT, 1)[0], "chat_template": CHAT}


def test_without_that_word_the_system_message_is_read(http: httpx.Client) -> None:
    told = http.post("/v1/steer/completion-chat", json=asked(n_completion_tokens=1)).json()
    assert told["input"] == {"raw": answered_by_hand(CHAT, 1)[0], "chat_template": CHAT}


def test_an_axis_is_a_vector_by_its_name(http: httpx.Client) -> None:
    def text(vector: Any, amount: float) -> dict[str, Any]:
        edits = [{"do": "floor", "vector": vector, "hook": HOOK, "amount": amount}]
        return http.post("/v1/steer", json={"prompt": CHAT, "edits": edits, "max_new_tokens": 8}).json()

    numbers = TENSORS_HERE["axes"][0].tolist()
    high = float(TENSORS_HERE["mean"] @ TENSORS_HERE["axes"][0]) + 60
    named = text("axis:assistant", high)
    assert named == text(numbers, high)
    assert named["steered"]["text"] != named["default"]["text"]
    assert text("axis:assistant", high - 1000)["steered"]["text"] == named["default"]["text"], "nothing lies below it"


def test_capabilities_name_the_axes(http: httpx.Client) -> None:
    told = http.get("/v1/capabilities").json()
    assert told["persona"]["hook"] == HOOK
    assert told["persona"]["axes"] == [{"name": "assistant", "title": TITLE, "floor": FACTS_HERE["floors"][0]}]
    assert told["endpoints"]["persona_monitor"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer": LAYER + 1}, f"were fitted at layer {LAYER}, not {LAYER + 1}"),
        ({"conversation": []}, "conversation: at least one message is required"),
        ({"conversation": [{"role": "x", "content": "a"}]}, "Unknown role 'x'"),
        ({"conversation": [{"role": "user", "content": "word " * 60}]}, "max is 48"),
    ],
)
def test_what_cannot_be_monitored(http: httpx.Client, changes: dict[str, Any], says: str) -> None:
    answer = http.post("/v1/persona/monitor", json={"model": MODEL, "conversation": CHAT, **changes})
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


def test_an_axis_that_is_not_there(http: httpx.Client) -> None:
    edits = [{"do": "project_out", "vector": "axis:asistant", "hook": HOOK}]
    answer = http.post("/v1/steer", json={"prompt": "a", "edits": edits})
    assert (answer.status_code, "Did you mean 'assistant'?" in answer.json()["error"]) == (400, True)


def test_without_a_persona_nothing_is_told(runtime: Runtime, serve: Serve) -> None:
    with serve(small_settings(), lambda: Wrapped(runtime, persona=None)).client() as client:
        refused = client.post("/v1/persona/monitor", json={"model": MODEL, "conversation": CHAT})
        assert (refused.status_code, "PERSONA_DIR" in refused.json()["error"]) == (400, True)
        answer = client.post("/v1/steer/completion-chat", json=asked(n_completion_tokens=1))
        assert (answer.status_code, "assistant_axis" in answer.json()) == (200, False)


def test_a_folder_by_the_model_s_name_and_what_is_no_persona(tmp_path: Path) -> None:
    def found(folder: Path, d_model: int = WIDTH) -> Any:
        model: Any = SimpleNamespace(id="org/tiny", n_layers=30, d_model=d_model)
        return persona_of(small_settings(persona_dir=folder), model)

    with pytest.raises(StartupError, match="holds neither persona.json nor a folder 'tiny'"):
        found(tmp_path)
    own = tmp_path / "tiny"
    own.mkdir()
    (own / FACTS).write_text(json.dumps({**FACTS_HERE, "is_scaled": True}), encoding="utf-8")
    with pytest.raises(StartupError, match="cannot be read"):
        found(tmp_path)
    save_file(TENSORS_HERE, own / TENSORS)
    for wrong in ({"blanks_system_message": "no"}, {"is_scaled": 1}):
        (own / FACTS).write_text(json.dumps({**FACTS_HERE, **wrong}), encoding="utf-8")
        with pytest.raises(StartupError, match=f"{next(iter(wrong))} is .*, and not true or false"):
            found(tmp_path)
    for said in ({}, {"blanks_system_message": True}):
        (own / FACTS).write_text(json.dumps({**FACTS_HERE, "is_scaled": True, **said}), encoding="utf-8")
        assert found(tmp_path).blanks_system_message is bool(said)
        assert found(tmp_path).describe()["blanks_system_message"] is bool(said), "capabilities say it"
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    centred = state - TENSORS_HERE["mean"]
    expected = float(TENSORS_HERE["axes"][0] @ (centred / centred.norm()))
    for folder in (tmp_path, own):
        assert found(folder).values(np.asarray(state))[TITLE] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(StartupError, match="which are not of a model of 30 layers, 64 wide"):
        found(tmp_path, 64)
