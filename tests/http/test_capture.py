"""Vectors that pass inside the model, over a real port as JSON and as tensors, against plain Hugging Face hooks."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from served import TEXT, WIDTH, Serve, Wrapped, small_settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.runtime import Runtime

RESID, MLP, HEADS = "blocks.15.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.7.attn.hook_z"
OTHER = "Two planets met."
SAFETENSORS = "application/x-safetensors"


@pytest.fixture(scope="module")
def net() -> Any:
    """Hugging Face's own model."""
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def read(net: Any, ids: list[int]) -> dict[str, Tensor]:
    """[pos, width] at the three points, by hooks by hand."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, out: Any = None) -> None:
            value = args[0] if out is None else out
            seen[name] = (value if isinstance(value, Tensor) else value[0])[0].clone()

        return hook

    layers = net.model.layers
    handles = [
        layers[15].register_forward_hook(keep(RESID)),
        layers[3].mlp.register_forward_hook(keep(MLP)),
        layers[7].self_attn.o_proj.register_forward_pre_hook(keep(HEADS)),
    ]
    with torch.no_grad():
        net(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/capture", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def close(found: Any, expected: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(found), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("positions", ["all", "last", "mean"])
def test_what_is_captured_is_what_passes_in_hugging_face(
    http: httpx.Client, net: Any, tokenizer: Any, positions: str
) -> None:
    texts = [TEXT, OTHER]
    said = post(http, prompt=texts, points=[RESID, MLP, HEADS], positions=positions)
    assert (said["positions"], said["dtype"], len(said["results"])) == (positions, "float32", 2)
    for text, result in zip(texts, said["results"], strict=True):
        ids = tokenizer("<|im_start|>" + text)["input_ids"]
        assert (result["token_ids"], result["has_bos"]) == (ids, True)
        assert result["tokens"] == [tokenizer.decode([i]) for i in ids]
        assert result["is_special"] == [True, *[False] * (len(ids) - 1)]
        seen = read(net, ids)
        assert list(result["states"]) == [RESID, MLP, HEADS]
        for point, hidden in seen.items():
            wanted = {"all": hidden, "last": hidden[-1:], "mean": hidden[1:].mean(0, keepdim=True)}[positions]
            assert close(result["states"][point], wanted)
            assert not close(result["states"][point], wanted + 1e-3 * wanted.abs().max())  # the tolerance can tell


def test_a_chat_is_read_as_the_model_reads_it(http: httpx.Client, net: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    [result] = post(http, prompt=chat, points=[RESID], positions="last")["results"]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert result["token_ids"] == ids
    assert close(result["states"][RESID], read(net, ids)[RESID][-1:])


@pytest.mark.parametrize("asked", ["field", "header"])
@pytest.mark.parametrize("prompt", [TEXT, [TEXT, OTHER]], ids=["one", "several"])
def test_tensors_are_the_numbers_of_the_json(http: httpx.Client, prompt: Any, asked: str) -> None:
    body = {"prompt": prompt, "points": [RESID, HEADS]}
    plain = post(http, **body)
    wish: dict[str, Any] = {"json": {**body, "format": "safetensors"}} if asked == "field" else {"json": body}
    answer = http.post("/v1/capture", headers={"Accept": SAFETENSORS} if asked == "header" else {}, **wish)
    assert (answer.status_code, answer.headers["content-type"]) == (200, SAFETENSORS)
    found = load(answer.content)
    expected = {
        (f"{place}/" if isinstance(prompt, list) else "") + point: torch.tensor(rows)
        for place, result in enumerate(plain["results"])
        for point, rows in result["states"].items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])
    (length,) = struct.unpack("<Q", answer.content[:8])
    about = json.loads(json.loads(answer.content[8 : 8 + length])["__metadata__"]["answer"])
    assert about == {**plain, "results": [{**one, "states": {}} for one in plain["results"]]}


def test_json_is_given_where_both_are_accepted_or_the_body_says_so(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "points": [RESID], "positions": "last"}
    for accept, more in ((f"{SAFETENSORS}, application/json", {}), (SAFETENSORS, {"format": "json"})):
        answer = http.post("/v1/capture", headers={"Accept": accept}, json={**body, **more})
        assert answer.json()["results"]


def test_numbers_of_sixteen_bits_are_those_of_float32_rounded(http: httpx.Client) -> None:
    body = {"prompt": TEXT, "points": [MLP], "format": "safetensors"}
    whole, short = (
        load(http.post("/v1/capture", json={**body, "dtype": dtype}).content)[MLP] for dtype in ("float32", "float16")
    )
    assert short.dtype == torch.float16
    assert torch.equal(short, whole.half())


def test_a_mean_difference_is_a_vector_that_steers(http: httpx.Client) -> None:
    sets = (["The moon and the stars.", "A planet in orbit."], ["Bake the bread.", "Salt the soup."])
    means = [
        torch.tensor(
            [one["states"][RESID][0] for one in post(http, prompt=texts, points=[RESID], positions="mean")["results"]]
        )
        for texts in sets
    ]
    vector = (means[0].mean(0) - means[1].mean(0)).tolist()

    def text(strength: float) -> str:
        steering = [{"vector": vector, "strength": strength, "hook": RESID}]
        body = {"prompt": "My friend told me about", "vectors": steering, "max_new_tokens": 12, "temperature": 0}
        return http.post("/v1/steer", json=body).json()["steered"]["text"]

    assert text(3) != text(0) != text(-3) != text(3)


BODY = {"prompt": TEXT, "points": [RESID]}


@pytest.mark.parametrize(
    ("changes", "status", "code", "says"),
    [
        ({"points": []}, 422, "invalid_body", "points: "),
        ({"points": ["blocks.99.hook_resid_post"]}, 400, "unknown_hook", "the model has layers 0 to 29"),
        ({"points": ["hello"]}, 400, "unknown_hook", "expected the form blocks.<layer>.<place>"),
        ({"points": ["blocks.1.attn.hook_pattern"]}, 400, "unknown_hook", "Places in a block: "),
        ({"points": [RESID] * 4097}, 400, "limit_exceeded", "points: 4097 items are too many, the most is 4096"),
        ({"positions": "first"}, 422, "invalid_body", "positions: "),
        ({"dtype": "int8"}, 422, "invalid_body", "dtype: "),
        ({"format": "npz"}, 422, "invalid_body", "format: "),
        ({"layers": [1]}, 422, "invalid_body", "there is no field 'layers'"),
        ({"prompt": ""}, 400, "invalid_request", "the text is empty"),
        ({"prompt": ["a", ""]}, 400, "invalid_request", "the text is empty"),
        ({"prompt": []}, 400, "invalid_request", "at least one text is required"),
        ({"prompt": ["a"] * 17}, 400, "limit_exceeded", "17 texts are too many, the most is 16"),
        ({"prompt": 5}, 422, "invalid_body", "prompt"),
        ({"prompt": "word " * 200}, 400, "limit_exceeded", "Text too long: "),
        ({"prompt": [{"role": "x", "content": "a"}]}, 400, "invalid_request", "Unknown role 'x'"),
        ({"prompt": "<|im_start|>", "positions": "mean"}, 400, "invalid_request", "no tokens beside special ones"),
    ],
)
@pytest.mark.parametrize("format_", [None, "safetensors"])
def test_what_cannot_be_captured(
    http: httpx.Client, changes: dict[str, Any], status: int, code: str, says: str, format_: str | None
) -> None:
    answer = http.post("/v1/capture", json={**BODY, "format": format_, **changes})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert says in answer.json()["error"]


def test_answers_are_bounded_and_tensors_may_be_larger(runtime: Runtime, serve: Serve) -> None:
    small = small_settings(max_result_values=WIDTH * 4)
    with serve(small, lambda: Wrapped(runtime, settings=small)).client() as client:

        def asked(n_points: int, **more: Any) -> httpx.Response:
            points = [f"blocks.{layer}.hook_resid_post" for layer in range(n_points)]
            return client.post("/v1/capture", json={"prompt": TEXT, "points": points, "positions": "last", **more})

        assert asked(4).status_code == asked(16, format="safetensors").status_code == 200
        for refused in (asked(5), asked(17, format="safetensors")):
            assert refused.json()["code"] == "limit_exceeded"
            assert "MAX_RESULT_VALUES" in refused.json()["error"]
        assert f"are {5 * WIDTH} numbers, the most in one answer is {4 * WIDTH}" in asked(5).json()["error"]
