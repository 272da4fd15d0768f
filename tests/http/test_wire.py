"""Routes of the wire that the published client has no method for, over a real port, against plain Hugging Face."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from served import Served
from transformers import AutoTokenizer

from neuronpedia_inference.embedded.weights import model_folder

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is\n the capital?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Hugging Face's own."""
    return AutoTokenizer.from_pretrained(model_folder())


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# Chat templates


@pytest.mark.parametrize("chat", [CHAT[:1], CHAT[1:2], CHAT], ids=["system", "user", "all"])
@pytest.mark.parametrize("ends_open", [True, False])
def test_a_chat_is_rendered_as_hugging_face_does(
    http: httpx.Client, tokenizer: Any, chat: list[dict[str, str]], ends_open: bool
) -> None:
    said = post(http, "/v1/apply-chat-template", messages=chat, add_generation_prompt=ends_open)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ends_open)
    assert said["prompt"] == text
    assert said["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [span["token_id"] for span in said["spans"]] == said["tokens"]
    assert [span["position"] for span in said["spans"]] == list(range(len(said["tokens"])))


def test_every_token_of_a_chat_has_its_message_and_section(http: httpx.Client) -> None:
    spans = post(http, "/v1/apply-chat-template", messages=CHAT, addGenerationPrompt=True)["spans"]

    def text(message: int | None, section: str) -> str:
        return "".join(
            span["tokenStr"] for span in spans if (span["messageIndex"], span["section"]) == (message, section)
        )

    for place, message in enumerate(CHAT):
        assert text(place, "header") == f"<|im_start|>{message['role']}\n"
        assert text(place, "content") == message["content"]
        assert text(place, "footer") == "<|im_end|>\n"
        assert {span["role"] for span in spans if span["messageIndex"] == place} == {message["role"]}
    assert text(None, "header") == "<|im_start|>assistant\n"
    assert {span["role"] for span in spans if span["messageIndex"] is None} == {"assistant"}
    assert {span["channel"] for span in spans} == {None}


def test_hand_written_routes_answer_in_camel_case_and_take_loose_types(http: httpx.Client) -> None:
    said = post(http, "/v1/apply-chat-template", messages=CHAT[:1])
    assert "messageIndex" in said["spans"][0]
    loose = post(http, "/v1/apply-chat-template", messages=CHAT[:1], add_generation_prompt="false")
    assert loose["spans"][-1]["section"] == "footer"


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({}, 422, "invalid_body", "messages: Field required"),
        ({"messages": [{"role": "user"}]}, 422, "invalid_body", "content: Field required"),
        ({"messages": CHAT, "chat_template_kwargs": []}, 422, "invalid_body", "chat_template_kwargs"),
        ({"messages": CHAT * 257}, 400, "limit_exceeded", "messages: 1028 items are too many, the most is 1024"),
        (
            {"messages": [{"role": "x", "content": ""}]},
            400,
            "invalid_request",
            "Failed to apply chat template: Unknown",
        ),
        ({"messages": []}, 400, "invalid_request", "Failed to apply chat template: "),
        (
            {"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            400,
            "invalid_request",
            "chat_template_kwargs: chat_template cannot be chosen here",
        ),
        ({"messages": CHAT * 4}, 400, "limit_exceeded", "Rendered chat too long: "),
    ],
)
def test_chats_that_cannot_be_rendered(
    http: httpx.Client, body: dict[str, Any], status: int, code: str, says: str
) -> None:
    answer = http.post("/v1/apply-chat-template", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert says in answer.json()["error"]


# Health of steering


def test_steer_health_tells_what_the_server_does(http: httpx.Client, server: Served) -> None:
    before = time.time()
    told = http.get("/v1/steer/health").json()
    stats = told["stats"]
    assert before <= stats["timestamp"] <= time.time()
    assert stats["engine_initialized"] is True
    assert stats["model_name"] == http.get("/ready").json()["model"]
    assert stats["model_name"] in told["summary"]
    assert 0 < stats["process_ram_mb"] < stats["system_ram_total_mb"]
    assert 0 < stats["system_ram_percent"] <= 100
    assert stats["gpu_stats"] is None
    assert stats["gpu_cache_usage_percent"] == 0
    assert stats["active_threads"] == len(stats["thread_names"]) > 1
    assert stats["pending_tasks"] >= 1


def test_steer_health_counts_what_is_under_way(http: httpx.Client) -> None:
    """While a stream is open, its generation runs and its memory is admitted; afterwards neither."""
    body = {"prompt": "One two", "max_new_tokens": 40, "stream": True, "features": []}
    with http.stream("POST", "/v1/steer", json=body) as stream:
        next(stream.iter_lines())
        during = http.get("/v1/steer/health").json()["stats"]
    assert during["num_running_requests"] + during["num_swapped_requests"] == 1
    assert during["cpu_cache_usage_percent"] > 0
