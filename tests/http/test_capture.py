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
from served import MODEL, SOURCE, TEXT, WIDTH, Serve, Wrapped, small_settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.tensor_files import answer_in

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


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ({"first": 2}, lambda n: [0, 1]),
        ({"last": 2, "phase": "prompt"}, lambda n: [n - 2, n - 1]),
        ({"from": 1, "to": 4, "except": {"positions": [2]}}, lambda n: [1, 3]),
    ],
)
def test_a_selection_is_read_in_every_text(
    http: httpx.Client, selection: dict[str, Any], chosen: Callable[[int], list[int]]
) -> None:
    whole, some = (
        post(http, prompt=[TEXT, OTHER], points=[RESID], positions=positions)["results"]
        for positions in ("all", selection)
    )
    for of_whole, of_some in zip(whole, some, strict=True):
        places = chosen(len(of_whole["tokens"]))
        assert of_some["positions"] == places
        assert close(of_some["states"][RESID], torch.tensor(of_whole["states"][RESID])[places])
    body = {"prompt": TEXT, "points": [RESID], "positions": selection, "format": "safetensors"}
    found = load(http.post("/v1/capture", json=body).content)[RESID]
    assert close(found, torch.tensor(some[0]["states"][RESID]))


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
    assert int(answer.headers["content-length"]) == len(answer.content)
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
        ({"positions": "first"}, 422, "invalid_body", "positions: is one of all, last, mean, or a selection"),
        ({"positions": {"first": 0}}, 422, "invalid_body", "first: "),
        ({"positions": {"frist": 1}}, 422, "invalid_body", "Did you mean 'first'?"),
        ({"positions": {"phase": "generated"}}, 400, "invalid_request", "positions.phase: nothing is generated here"),
        ({"positions": {"ramp": [0, 4]}}, 400, "invalid_request", "positions.ramp: a vector is read or not"),
        ({"positions": {"from": 40}}, 400, "invalid_request", "selects none of the 8 tokens of text 0"),
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


SINGLE = {"model": MODEL, "source": SOURCE, "index": "1113"}
RANKING = {"model": MODEL, "source_set": "res-4k", "selected_sources": [SOURCE], "sort_by_token_indexes": []}
STRONGEST = {**RANKING, "ignore_bos": True, "num_results": 4}
TOPK = {"model": MODEL, "source": SOURCE, "top_k": 3, "ignore_bos": True}


def rows(values: list[Any], key: str) -> Tensor:
    return torch.tensor([one[key] for one in values])


def strongest(told: dict[str, Any], key: str) -> Tensor:
    return torch.tensor([[one[key] for one in at["top_features"]] for at in told["results"]])


def pairs(told: dict[str, Any]) -> list[Any]:
    return list(told["results"][0]["activeFeatures"].values())


AS_TENSORS: dict[str, tuple[dict[str, Any], dict[str, Callable[[dict[str, Any]], Tensor]]]] = {
    "activation/single": (
        {"prompt": TEXT, **SINGLE},
        {"values": lambda told: torch.tensor(told["activation"]["values"])},
    ),
    "activation/single-batch": (
        {"prompts": [TEXT, OTHER], **SINGLE},
        {f"{n}/values": lambda told, n=n: torch.tensor(told["results"][n]["activation"]["values"]) for n in range(2)},
    ),
    "activation/all": ({"prompt": TEXT, **STRONGEST}, {"values": lambda told: rows(told["activations"], "values")}),
    "activation/all-batch": (
        {"prompts": [TEXT, OTHER], **STRONGEST},
        {f"{n}/values": lambda told, n=n: rows(told["results"][n]["activations"], "values") for n in range(2)},
    ),
    "activation/topk-by-token": (
        {"prompt": TEXT, **TOPK},
        {
            "indices": lambda told: strongest(told, "feature_index"),
            "values": lambda told: strongest(told, "activation_value"),
        },
    ),
    "activation/topk-by-token-batch": (
        {"prompts": [TEXT, OTHER], **TOPK},
        {f"{n}/values": lambda told, n=n: strongest(told["results"][n], "activation_value") for n in range(2)},
    ),
    "activation/source": (
        {"prompts": [TEXT], "model": MODEL, "source": SOURCE},
        {
            "0/values": lambda told: torch.tensor([value for one in pairs(told) for _, value in one]),
            "0/positions": lambda told: torch.tensor([place for one in pairs(told) for place, _ in one]),
            "0/indices": lambda told: torch.tensor([int(key) for key in told["results"][0]["activeFeatures"]]),
        },
    ),
    "activation/attention": (
        {"prompt": TEXT, "model": MODEL, "layer": 3, "head": 1},
        {"weights": lambda told: torch.tensor(told["attentionValues"])},
    ),
    "activation/raw": (
        {"prompts": [TEXT, OTHER], "layers": [3, 15], "model": MODEL},
        {
            f"{n}/{RESID}": lambda told, n=n: torch.tensor(told["results"][n]["activations"][1]["values"])
            for n in range(2)
        },
    ),
}
ROUNDED = {"activation/source": 3, "activation/attention": 4, "activation/raw": 4}
"""Decimals of the JSON; tensors have all of them."""


def by_feature(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries in the order of the features, as the JSON has them."""
    if "0/starts" not in found:
        return found
    spans = zip(found["0/starts"].tolist(), found["0/ends"].tolist(), strict=True)
    order = [entry for start, end in spans for entry in range(start, end)]
    return {**found, **{name: found[name][order] for name in ("0/positions", "0/values")}}


@pytest.mark.parametrize("route", AS_TENSORS)
def test_other_answers_are_tensors_too(http: httpx.Client, route: str) -> None:
    body, arrays = AS_TENSORS[route]
    told = http.post(f"/v1/{route}", json=body)
    assert told.headers["content-type"] == "application/json"
    answer = http.post(f"/v1/{route}", json=body, headers={"Accept": SAFETENSORS})
    assert (answer.status_code, answer.headers["content-type"]) == (200, SAFETENSORS), answer.text
    assert answer.content == http.post(f"/v1/{route}", json={**body, "format": "safetensors"}).content
    found = by_feature(load(answer.content))
    assert found.keys() >= arrays.keys()
    for name, expected in arrays.items():
        wanted = expected(told.json())
        assert wanted.numel()
        if route in ROUNDED and wanted.is_floating_point():
            torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=0.51 * 10 ** -ROUNDED[route])
        else:
            torch.testing.assert_close(found[name].to(wanted.dtype), wanted, rtol=0, atol=0)
    about = answer_in(answer.content)
    assert about.keys() == told.json().keys()
    strings = {"tokens", "tokenStrings"}
    for key in strings & about.keys():
        assert about[key] == told.json()[key]


LISTS: dict[str, dict[str, Any]] = {
    "activation/single-batch": SINGLE,
    "activation/all-batch": STRONGEST,
    "activation/topk-by-token-batch": TOPK,
    "activation/source": {"model": MODEL, "source": SOURCE},
    "activation/raw": {"layers": [3]},
    "capture": {"points": [RESID]},
}


@pytest.mark.parametrize("route", LISTS)
def test_texts_of_a_list_are_numbered_also_where_there_is_one(http: httpx.Client, route: str) -> None:
    """So that whoever reads the names need not count the texts."""
    named = "prompt" if route == "capture" else "prompts"
    for texts in ([TEXT], [TEXT, OTHER]):
        answer = http.post(f"/v1/{route}", json={**LISTS[route], named: texts, "format": "safetensors"})
        assert {name.partition("/")[0] for name in load(answer.content)} == {str(n) for n in range(len(texts))}


def test_tensors_of_no_features_are_empty(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/activation/all", json={"prompt": TEXT, **STRONGEST, "num_results": 0, "format": "safetensors"}
    )
    assert load(answer.content)["values"].shape == (0, len(answer_in(answer.content)["tokens"]))
