"""Receipts against plain Hugging Face with hooks written by hand, and against files hashed as a whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from served import SOURCE, Served
from typer.testing import CliRunner

from neuronpedia_inference import embedded
from neuronpedia_inference.cli import app, main
from neuronpedia_inference.embedded.weights import default_cache_dir, model_folder
from neuronpedia_inference.exits import DIFFERS, FAILED
from neuronpedia_inference.runtime import Runtime

PROMPT = "The most important thing is"
HOOK = "blocks.15.hook_resid_post"
OTHER = "20-res-4k"
VECTOR = [((7 * n) % 13 - 6) / 5 for n in range(576)]
STEER: dict[str, Any] = {
    "prompt": PROMPT,
    "features": [{"source": SOURCE, "index": 1113, "strength": 35}],
    "vectors": [{"hook": "blocks.5.hook_resid_post", "vector": VECTOR, "strength": 0.5}],
    "edits": [
        {"do": "clamp", "feature": f"{OTHER}/686", "amount": 1.2, "unit": "of_max", "on": {"phase": "generated"}},
        {"do": "add", "feature": "10-res-4k/1608", "amount": 0.2, "unit": "dose"},
    ],
    "max_new_tokens": 5,
    "receipt": True,
    "reproducible": True,
}
# Sums over 576 numbers in float32, taken in another order, once behind cached keys; terms are as large as the norm.
ROUNDING = 1e-4


def answer(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/steer", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def steered(http: httpx.Client) -> dict[str, Any]:
    return answer(http, **STEER)


@pytest.fixture(scope="module")
def receipt(steered: dict[str, Any]) -> dict[str, Any]:
    return steered["receipt"]


def tensors(source: str) -> dict[str, torch.Tensor]:
    """By hand: decoder rows at unit length, and everything else in the old units."""
    stored = load_file(embedded.sae_dir(source) / "sae_weights.safetensors")
    found = {name: tensor.float() for name, tensor in stored.items()}
    norms = found["W_dec"].norm(dim=-1)
    found["W_dec"] = found["W_dec"] / norms[:, None]
    found["W_enc"] = found["W_enc"] * norms
    found["b_enc"], found["threshold"] = found["b_enc"] * norms, found["threshold"] * norms
    return found


def digest(numbers: torch.Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_every_number_of_a_feature_has_its_digest(receipt: dict[str, Any]) -> None:
    told = {(one["source"], one["index"]): one for one in receipt["features"]}
    assert list(told) == [(SOURCE, 1113), (OTHER, 686), ("10-res-4k", 1608)]
    for (source, index), one in told.items():
        weights = tensors(source)
        assert one["norm"] == pytest.approx(1, abs=1e-6)
        assert one["sha256"]["decoder_row"] == digest(weights["W_dec"][index])
        assert one["sha256"]["decoder_row"] != digest(weights["W_dec"][index + 1])
    assert list(told[SOURCE, 1113]["sha256"]) == ["decoder_row"], "its encoder is not used"
    weights, clamped = tensors(OTHER), told[OTHER, 686]["sha256"]
    assert clamped["encoder_column"] == digest(weights["W_enc"][:, 686])
    assert clamped["bias"] == digest(weights["b_enc"][686])
    assert clamped["threshold"] == digest(weights["threshold"][686])


def test_edits_are_told_as_they_are_applied(receipt: dict[str, Any]) -> None:
    feature, vector, clamp, dose = receipt["edits"]
    assert [one["field"] for one in receipt["edits"]] == ["features.0", "vectors.0", "edits.0", "edits.1"]
    assert [one["do"] for one in receipt["edits"]] == ["add", "add", "clamp", "add"]
    assert (feature["source"], feature["index"], feature["point"], feature["amount"]) == (SOURCE, 1113, HOOK, 35)
    assert (vector["source"], vector["index"], vector["amount"]) == (None, None, 0.5)
    assert vector["norm"] == pytest.approx(float(torch.tensor(VECTOR).norm()), rel=1e-6)
    assert vector["vector_sha256"] == digest(torch.tensor(VECTOR))
    largest = float(embedded.source_annotations(OTHER).maximum[686])
    assert (clamp["unit"], clamp["amount"]) == ("absolute", pytest.approx(1.2 * largest))
    assert (dose["unit"], dose["amount"]) == ("dose", 0.2)


def places(model: Any, ids: list[int], adds: bool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of one forward pass without a cache: what came behind the blocks that are edited, and what went on."""
    n_prompt, seen = 6, {}
    weights = {layer: tensors(f"{layer}-res-4k") for layer in (10, 15, 20)}

    def edited(layer: int, h: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(len(h))[:, None]
        if layer == 5:
            return h + 0.5 * torch.tensor(VECTOR)
        if layer == 10:
            return torch.where(inside > 0, h + 0.2 * h.norm(dim=-1, keepdim=True) * weights[10]["W_dec"][1608], h)
        if layer == 15:
            return h + 35 * weights[15]["W_dec"][1113]
        change = 1.2 * float(embedded.source_annotations(OTHER).maximum[686]) - activation(h)
        return torch.where(inside >= n_prompt, h + change[:, None] * weights[20]["W_dec"][686], h)

    def hook(layer: int) -> Any:
        def change(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            after = edited(layer, output[0]) if adds else output[0]
            seen[layer] = (output[0], after)
            return after[None]

        return model.model.layers[layer].register_forward_hook(change)

    handles = [hook(layer) for layer in (5, 10, 15, 20)]
    model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def activation(h: torch.Tensor) -> torch.Tensor:
    weights = tensors(OTHER)
    before = (h - weights["b_dec"]) @ weights["W_enc"][:, 686] + weights["b_enc"][686]
    return torch.where(before > weights["threshold"][686], before.relu(), 0.0)


@contextmanager
def hugging_face(runtime: Runtime) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder())
    with torch.inference_mode():
        yield model


def test_what_each_edit_did_is_what_plain_hugging_face_has(receipt: dict[str, Any], runtime: Runtime) -> None:
    """At the first and last token where it acted; a pass without the edits has other numbers."""
    ids = receipt["prompt_ids"] + receipt["steered"]["token_ids"]
    tokens = receipt["prompt_tokens"] + receipt["steered"]["tokens"]
    with hugging_face(runtime) as model:
        seen, plain = places(model, ids, adds=True), places(model, ids, adds=False)
    directions = [
        (15, tensors(SOURCE)["W_dec"][1113]),
        (5, torch.tensor(VECTOR) / torch.tensor(VECTOR).norm()),
        (20, tensors(OTHER)["W_dec"][686]),
        (10, tensors("10-res-4k")["W_dec"][1608]),
    ]
    for one, (layer, along), first in zip(receipt["edits"], directions, (0, 0, 6, 1), strict=True):
        assert one["acted"] is True
        assert (one["first"]["position"], one["last"]["position"]) == (first, len(ids) - 1)
        before, after = seen[layer]
        for moment in (one["first"], one["last"]):
            at = moment["position"]
            assert moment["token"] == tokens[at]
            size = float(before[at].norm())
            assert moment["before"] == pytest.approx(float(before[at] @ along), abs=ROUNDING * size)
            assert moment["after"] == pytest.approx(float(after[at] @ along), abs=ROUNDING * size)
            moved = abs(float((after[at] - before[at]) @ along))
            assert moment["dose"] == pytest.approx(moved / size, rel=ROUNDING, abs=ROUNDING)
            assert moved > 10 * ROUNDING * size or at == 0
            untouched = plain[layer][1][at] @ along
            assert abs(moment["after"] - float(untouched)) > ROUNDING * size or at == 0
            if layer == 20:
                assert moment["activation_before"] == pytest.approx(float(activation(before)[at]), abs=ROUNDING * size)
                assert moment["activation_after"] == pytest.approx(float(activation(after)[at]), abs=ROUNDING * size)
            else:
                assert moment["activation_before"] is moment["activation_after"] is None


def test_an_edit_that_changes_nothing_has_not_acted(http: httpx.Client) -> None:
    edits = [
        {"do": "add", "feature": f"{SOURCE}/1113", "amount": 0},
        {"do": "cap", "vector": VECTOR, "hook": "blocks.3.hook_resid_post", "amount": 1e5},
        {"do": "add", "feature": f"{OTHER}/686", "amount": 5, "on": {"phase": "prompt", "positions": [2, 3]}},
        {"do": "add", "feature": "10-res-4k/42", "amount": 9, "when": {"feature": "10-res-4k/1608", "above": 1e6}},
    ]
    told = answer(http, prompt=PROMPT, edits=edits, max_new_tokens=2, compare=False, receipt=True)["receipt"]["edits"]
    assert [one["acted"] for one in told] == [False, False, True, False]
    assert told[0]["first"] is told[0]["last"] is None
    assert (told[2]["first"]["position"], told[2]["last"]["position"]) == (2, 3)


def test_edits_that_cannot_be_told_apart_are_not(http: httpx.Client) -> None:
    """A condition decides, and another edit moves the same place: nothing is claimed of the first."""
    edits = [
        {"do": "add", "feature": f"{SOURCE}/42", "amount": 9, "when": {"feature": "10-res-4k/1608", "above": 1e6}},
        {"do": "add", "feature": f"{SOURCE}/42", "amount": 9},
    ]
    told = answer(http, prompt=PROMPT, edits=edits, max_new_tokens=2, compare=False, receipt=True)["receipt"]
    assert [one["acted"] for one in told["edits"]] == [None, True]
    assert told["edits"][0]["first"] is None
    read = {(one["source"], one["index"]): set(one["sha256"]) for one in told["features"]}
    assert "threshold" in read["10-res-4k", 1608], "what a condition looks at is used"
    assert told["edits"][1]["first"]["position"] == 0


def test_asking_for_a_receipt_changes_no_token(http: httpx.Client, steered: dict[str, Any]) -> None:
    without = answer(http, **{**STEER, "receipt": False})
    assert without["receipt"] is None
    for side in ("steered", "default"):
        assert without[side] == steered[side]
        assert steered["receipt"][side]["tokens"] == steered[side]["tokens"]
        assert steered["receipt"][side]["finish_reason"] == steered[side]["finish_reason"]
    assert steered["steered"]["tokens"] != steered["default"]["tokens"]


def test_streams_end_with_it(http: httpx.Client, receipt: dict[str, Any]) -> None:
    for deltas in (False, True):
        body = {**STEER, "stream": True, "deltas": deltas}
        with http.stream("POST", "/v1/steer", json=body) as streamed:
            lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line.startswith("data: {")]
        events = [json.loads(line) for line in lines]
        assert [event["receipt"] is None for event in events] == [True] * (len(events) - 1) + [False]
        for part in ("edits", "features", "steered", "default", "prompt_ids"):
            assert events[-1]["receipt"][part] == receipt[part]


def test_the_model_and_saes_that_were_read_whole_are_known_by_their_files(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "features": [], "compare": False, "max_new_tokens": 1, "receipt": True}
    body |= {"watch": [{"source": SOURCE, "top_k": 2}]}
    ends = time.monotonic() + 300
    told = answer(http, **body)["receipt"]
    while "pending" in (told["model"]["status"], told["sources"][0]["status"]) and time.monotonic() < ends:
        told = answer(http, **body)["receipt"]
    folder, sae = model_folder(), embedded.sae_dir(SOURCE) / "sae_weights.safetensors"
    expected = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert {one["name"]: one["sha256"] for one in told["model"]["files"]} == expected
    printed = "".join(f"{expected[name]}  {name}\n" for name in sorted(expected))
    assert told["model"]["sha256"] == hashlib.sha256(printed.encode()).hexdigest()
    [source] = told["sources"]
    [file] = source["files"]
    assert (source["source"], file["bytes"]) == (SOURCE, sae.stat().st_size)
    assert file["sha256"] == hashlib.sha256(sae.read_bytes()).hexdigest()
    assert told["edits"] == told["features"] == []


def test_it_says_what_else_the_text_depended_on(receipt: dict[str, Any], runtime: Runtime) -> None:
    import transformers

    import neuronpedia_inference

    assert receipt["versions"] == {
        "neuronpedia-inference": neuronpedia_inference.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert (receipt["operation"], receipt["device"], receipt["dtype"]) == ("steer", "cpu", "float32")
    assert receipt["reproducible"] is True
    assert receipt["products"] == {}, "reproducible answers take torch's own"
    assert receipt["sampling"]["seed"] == 16
    assert receipt["request"] == STEER
    assert receipt["prompt_tokens"] == ["<|im_start|>", "The", " most", " important", " thing", " is"]


def test_products_are_named_where_they_were_chosen(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "features": [], "compare": False, "max_new_tokens": 1, "receipt": True}
    told = answer(http, **body)["receipt"]
    assert told["reproducible"] is False
    assert "576x1536" in told["products"]
    assert {name for names in told["products"].values() for name in names} <= {"linear", "turned", "onednn"}


def test_no_path_and_no_machine_is_in_it_and_no_log_has_the_prompt(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "A sentence of which no log may know"
    with caplog.at_level(logging.DEBUG):
        told = json.dumps(answer(http, **{**STEER, "prompt": secret, "max_new_tokens": 2})["receipt"])
    for one in (
        str(model_folder()),
        str(default_cache_dir()),
        str(embedded.SAES_DIR),
        os.getcwd(),
        socket.gethostname(),
    ):
        assert one not in told
    assert "sentence of which" in told
    assert "sentence of which" not in caplog.text
    assert json.loads(told)["features"][0]["sha256"]["decoder_row"] not in caplog.text


def test_a_server_replays_it(
    server: Served, receipt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, over HTTP."""
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(receipt), encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", str(file), "--url", server.url])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "no difference"
    changed = {**receipt, "request": {**receipt["request"], "prompt": "The least important thing is"}}
    file.write_text(json.dumps(changed), encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", str(file), "--url", server.url])
    assert done.exit_code == DIFFERS
    assert done.stdout.splitlines()[-1].startswith("prompt, token 2: ' most' in the receipt, ' least' now")
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["neuronpedia-inference", "replay", str(file), "--url", server.url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == FAILED


def test_what_would_be_too_much_is_refused(
    http: httpx.Client, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four places, of which one reads an activation: 2 × (4 + 4 + 1) numbers at each of 6 + 5 positions."""
    monkeypatch.setattr(runtime, "settings", runtime.settings.model_copy(update={"max_result_values": 197}))
    refused = http.post("/v1/steer", json={**STEER, "compare": False})
    assert refused.status_code == 400
    assert "receipt: up to 11 tokens have 198 numbers in all, the most in one answer is 197" in refused.json()["error"]
    assert "MAX_RESULT_VALUES" in refused.json()["error"]
    monkeypatch.setattr(runtime, "settings", runtime.settings.model_copy(update={"max_result_values": 198}))
    assert answer(http, **{**STEER, "compare": False})["receipt"]["default"] is None
