"""Routes of the wire that the published client has no method for, over a real port, against plain Hugging Face."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
import torch
from served import MODEL, TEXT, WIDTH, Serve, Served, Wrapped, small_settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.runtime import Runtime

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


@pytest.fixture(scope="module")
def net() -> Any:
    """Hugging Face's own model, whose attention makes its pattern."""
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32, attn_implementation="eager")


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


# Attention


def test_where_a_head_looks_is_hugging_face_s_pattern(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>" + TEXT)["input_ids"]
    n = len(ids)
    with torch.no_grad():
        patterns = net(torch.tensor([ids]), output_attentions=True).attentions
    for layer, head in ((0, 0), (3, 1), (29, 8)):
        found = post(http, "/v1/activation/attention", prompt=TEXT, model=MODEL, layer=layer, head=head)
        pattern = patterns[layer][0, head]
        expected = {}
        for query, row in enumerate(pattern):
            for key in row.topk(min(8, n)).indices.tolist():
                if row[key] >= 0.005:
                    expected[query * n + key] = float(row[key])
        assert found["seqLen"] == n
        assert found["tokens"] == [tokenizer.decode([i]) for i in ids]
        assert found["attentionIndices"] == sorted(expected)
        assert found["attentionValues"] == pytest.approx([expected[i] for i in sorted(expected)], abs=1.5e-4)
        assert found["maxActivation"] == pytest.approx(float(pattern[1:, 1:].max()), abs=1.5e-4)
        assert len(found["attentionIndices"]) > n


def test_a_single_token_looks_nowhere(http: httpx.Client) -> None:
    found = post(http, "/v1/activation/attention", prompt="", model=MODEL, layer="3", head=1.0)
    assert (found["seqLen"], found["attentionIndices"], found["attentionValues"]) == (1, [], [])
    assert found["maxActivation"] == 0


# Raw activations


def behind(net: Any, ids: list[int], layer: int) -> Tensor:
    """[pos, d_model]: what a block of Hugging Face's model puts out."""
    seen: list[Tensor] = []
    handle = net.model.layers[layer].register_forward_hook(
        lambda _m, _a, out: seen.append((out if isinstance(out, Tensor) else out[0])[0].clone())
    )
    with torch.no_grad():
        net(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_raw_activations_are_those_behind_the_blocks(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    prompts = [TEXT, "Salt", TEXT + " and more"]
    found = post(http, "/v1/activation/raw", prompts=prompts, layers=[29, 0, 15, 15], hook_point="residual_stream")
    assert {key: found[key] for key in ("hook_point", "type", "dtype", "device")} == {
        "hook_point": "residual_stream",
        "type": "final_output_token",
        "dtype": "float32",
        "device": "cpu",
    }
    for prompt, result in zip(prompts, found["results"], strict=True):
        ids = tokenizer("<|im_start|>" + prompt)["input_ids"]
        assert result["token_ids"] == ids
        assert result["token_strings"] == [tokenizer.decode([i]) for i in ids]
        assert [one["layer"] for one in result["activations"]] == [0, 15, 29]
        for one in result["activations"]:
            expected = behind(net, ids, one["layer"])[-1]
            assert one["token_indices"] == [len(ids) - 1]
            [values] = one["values"]
            assert torch.tensor(values) == pytest.approx(expected, abs=1e-4 * float(expected.abs().max()))


def test_all_layers_are_read_where_none_is_named(http: httpx.Client) -> None:
    for layers in ({}, {"layers": None}, {"layers": []}):
        [result] = post(http, "/v1/activation/raw", prompts=["Salt"], **layers)["results"]
        assert [one["layer"] for one in result["activations"]] == list(range(30))
        assert "tokenStrings" in result
        assert all(len(one["values"][0]) == WIDTH for one in result["activations"])


ATTENTION = ("/v1/activation/attention", {"prompt": TEXT, "model": MODEL, "layer": 3, "head": 1})
RAW = ("/v1/activation/raw", {"prompts": [TEXT], "model": MODEL})


@pytest.mark.parametrize(
    ("route", "changes", "status", "code", "says"),
    [
        (ATTENTION, {"layer": 30}, 400, "invalid_request", "Invalid layer: 30. Must be in [0, 30)."),
        (ATTENTION, {"layer": -1}, 400, "invalid_request", "Invalid layer: -1. Must be in [0, 30)."),
        (ATTENTION, {"head": 9}, 400, "invalid_request", "Invalid head: 9. Must be in [0, 9)."),
        (ATTENTION, {"head": None}, 422, "invalid_body", "head: "),
        (ATTENTION, {"layer": 1.5}, 422, "invalid_body", "layer: "),
        (ATTENTION, {"prompt": "word " * 200}, 400, "limit_exceeded", "Text too long: "),
        (ATTENTION, {"prompt": "\x00"}, 400, "invalid_request", "NUL"),
        (RAW, {"prompts": []}, 400, "invalid_request", "At least one prompt is required"),
        (RAW, {"prompts": ["a"] * 17}, 400, "limit_exceeded", "Batch size 17 exceeds maximum of 16"),
        (RAW, {"prompts": "a"}, 422, "invalid_body", "prompts: "),
        (RAW, {"prompts": ["word " * 200]}, 400, "limit_exceeded", "Text too long: "),
        (RAW, {"layers": [3, 30, -2]}, 400, "invalid_request", "layers: 30, -2 out of range, the model has 30 layers"),
        (RAW, {"hook_point": "mlp"}, 422, "invalid_body", "hook_point: "),
        (RAW, {"type": "all"}, 422, "invalid_body", "type: "),
    ],
)
def test_what_cannot_be_read_is_refused(
    http: httpx.Client, route: tuple[str, dict[str, Any]], changes: dict[str, Any], status: int, code: str, says: str
) -> None:
    answer = http.post(route[0], json={**route[1], **changes})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert says in answer.json()["error"]


def test_an_answer_with_too_many_numbers_is_refused_before_it_is_computed(runtime: Runtime, serve: Serve) -> None:
    small = small_settings(max_result_values=2 * 2 * WIDTH)
    with serve(small, lambda: Wrapped(runtime, settings=small)).client() as client:
        whole = client.post(RAW[0], json={"prompts": [TEXT, "Salt"], "layers": [1, 2]})
        assert whole.status_code == 200
        refused = client.post(RAW[0], json={"prompts": [TEXT, "Salt", "a"], "layers": [1, 2]})
    assert (refused.status_code, refused.json()["code"]) == (400, "limit_exceeded")
    assert "2 layers of 3 prompts are 3456 numbers, the most in one answer is 2304" in refused.json()["error"]
