"""Receipts run again: nothing differs where nothing was changed, and whatever was is found and named."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neuronpedia_inference.cli import app
from neuronpedia_inference.client.in_process import InProcess
from neuronpedia_inference.client.replays import compared
from neuronpedia_inference.client.session import Client
from neuronpedia_inference.digests import Stamp
from neuronpedia_inference.exits import DIFFERS, FAILED
from neuronpedia_inference.provenance import Provenance
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models

from .test_verify import write_sae

SAE, GATED = "1-res-tiny", "0-gated-tiny"
VECTOR = [((5 * n) % 7 - 3) / 4 for n in range(32)]
BASE: dict[str, Any] = {"prompt": "the cat sat on", "max_new_tokens": 6, "receipt": True, "reproducible": True}
STEERED: dict[str, Any] = {
    **BASE,
    "features": [{"source": SAE, "index": 5, "strength": 4}],
    "edits": [
        {"do": "clamp", "feature": f"{SAE}/7", "amount": 6},
        {"do": "add", "vector": VECTOR, "hook": "blocks.0.hook_resid_post", "amount": 0.4, "unit": "dose"},
    ],
}
SAMPLED = {"temperature": 1.0, "compare": False}
WAYS: list[dict[str, Any]] = [
    STEERED,
    BASE,
    {"vectors": [{"hook": "blocks.1.hook_resid_mid", "vector": VECTOR, "strength": 3}], "n_logprobs": 2},
    {"features": [{"source": SAE, "index": 1, "strength": 3}], "method": "ORTHOGONAL_DECOMP"},
    {"features": [{"source": SAE, "index": 2, "strength": -3}], "strength_multiplier": 1.5},
    {"edits": [{"do": "scale", "feature": f"{GATED}/3", "amount": 2}], "watch": [{"source": SAE, "top_k": 2}]},
    {"edits": [{"do": "ablate", "feature": f"{SAE}/3"}], "watch": [{"source": GATED, "index": 4}]},
    {"edits": [{"do": "swap", "feature": f"{SAE}/3", "with": f"{SAE}/4"}]},
    {"edits": [{"do": "project_out", "vector": VECTOR, "hook": "blocks.1.hook_resid_pre"}]},
    {"edits": [{"do": "at_least", "feature": f"{SAE}/9", "amount": 3, "on": {"phase": "generated", "first": 3}}]},
    {"edits": [{"do": "add", "feature": f"{SAE}/9", "amount": 3, "when": {"feature": f"{GATED}/1", "above": 0}}]},
    {"rules": [{"when": {"feature": f"{SAE}/8", "above": 0.0}, "do": "stop"}]},
    {"prompt": "cat"},
    *({**SAMPLED, "seed": seed, "features": [{"source": SAE, "index": seed, "strength": 2}]} for seed in range(7)),
]


@contextmanager
def served(folder: Path) -> Iterator[tuple[Client, Runtime]]:
    """A model and SAEs that lie in a folder."""
    settings = Settings.read(model_id=str(folder / "model"), local_sae_dir=folder / "saes", num_threads=1)
    runtime = Runtime.load(settings)
    with Client(InProcess(runtime)) as client:
        yield client, runtime


def made(folder: Path) -> Path:
    models.save("llama", folder / "model")
    write_sae(folder / "saes" / SAE, "jumprelu", "blocks.1.hook_resid_post")
    write_sae(folder / "saes" / GATED, "gated", "blocks.0.hook_resid_pre")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("replays"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with served(folder) as (client, _):
        yield client


@pytest.fixture(scope="module")
def receipt(client: Client) -> dict[str, Any]:
    return receipt_of(client, STEERED)


def receipt_of(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    """Once nothing of it is pending."""
    fields = {**BASE, **body}
    prompt = fields.pop("prompt")
    while True:
        found = client.steer(prompt, **fields).receipt
        assert found is not None
        if "pending" not in (found["model"]["status"], *(one["status"] for one in found["sources"])):
            return found


def test_twenty_receipts_are_the_same_again_in_another_process_s_memory(folder: Path, client: Client) -> None:
    """Loaded anew: what is kept of prompts and weights is not that of the first time."""
    assert len(WAYS) == 20
    receipts = [json.loads(json.dumps(receipt_of(client, way))) for way in WAYS]
    assert len({json.dumps(one["steered"]["token_ids"]) for one in receipts}) > 10, "they are different texts"
    assert all(edit["acted"] for edit in receipts[0]["edits"])
    with served(folder) as (again, _):
        replays = [again.replay(one) for one in receipts]
    for replay in replays:
        assert (str(replay), replay.is_same, replay.is_comparable) == ("no difference", True, True)


def test_a_changed_strength_is_named(client: Client, receipt: dict[str, Any]) -> None:
    changed = deepcopy(receipt)
    changed["request"]["features"][0]["strength"] = 5
    replay = client.replay(changed)
    assert replay.differences[0].where == f"edit features.0 (add {SAE}/5 at blocks.1.hook_resid_post), amount"
    assert (replay.differences[0].was, replay.differences[0].now) == (4.0, 5.0)
    assert not replay.is_same
    assert replay.is_comparable


def test_another_strength_that_the_receipt_hides_is_seen_in_what_it_did(
    client: Client, receipt: dict[str, Any]
) -> None:
    """As where a server says one thing and does another."""
    changed = deepcopy(receipt)
    changed["request"]["features"][0]["strength"] = changed["edits"][0]["amount"] = 4.001
    [first, *_] = client.replay(changed).differences
    assert first.where.startswith(("steered, token", "edit features.0"))
    assert not first.went_in


def test_a_dropped_edit_is_named(client: Client, receipt: dict[str, Any]) -> None:
    for number, where in ((0, f"edit edits.0 (clamp {SAE}/7"), (1, "edit edits.1 (add a vector at blocks.0")):
        changed = deepcopy(receipt)
        del changed["request"]["edits"][number]
        replay = client.replay(changed)
        [gone] = [one for one in replay.differences if one.now == "not there"]
        assert gone.where.startswith(where)
        assert (gone.was, gone.went_in) == ("there", True)
    del changed["request"]["features"], changed["request"]["edits"]
    assert sum(one.now == "not there" for one in client.replay(changed).differences) == 3


def test_another_prompt_is_named_at_its_first_token(client: Client, receipt: dict[str, Any]) -> None:
    changed = deepcopy(receipt)
    changed["request"]["prompt"] = "the cat was on"
    first = client.replay(changed).differences[0]
    others = receipt_of(client, {"prompt": "the cat was on"})["prompt_ids"]
    place = next(n for n, both in enumerate(zip(receipt["prompt_ids"], others, strict=False)) if both[0] != both[1])
    assert place > 3
    assert (first.where, first.was) == (f"prompt, token {place}", receipt["prompt_tokens"][place])
    assert str(first).startswith(f"prompt, token {place}: {receipt['prompt_tokens'][place]!r} in the receipt, ")


def test_another_seed_is_named(client: Client) -> None:
    changed = receipt_of(client, {**SAMPLED, "seed": 1})
    changed["request"]["seed"] = 2
    first, second, *_ = client.replay(changed).differences
    assert (first.where, first.was, first.now) == ("sampling, seed", 1, 2)
    assert second.where.startswith("steered, token")


@pytest.mark.parametrize(
    ("name", "part"), [("W_dec", "decoder row"), ("W_enc", "encoder column"), ("threshold", "threshold")]
)
def test_a_changed_number_of_the_sae_is_named(
    folder: Path, receipt: dict[str, Any], tmp_path: Path, name: str, part: str
) -> None:
    """One number of the feature that is clamped; the row of the other feature is as it was."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "saes" / SAE / "sae_weights.safetensors"
    tensors = load_file(file)
    where = {"W_dec": (7, 0), "W_enc": (0, 7), "threshold": (7,)}[name]
    tensors[name][where] *= 1.001
    save_file(tensors, file)
    with served(other) as (client, _):
        replay = client.replay(receipt)
    assert replay.is_comparable
    assert {one.where for one in replay.differences if one.went_in} >= {f"feature {SAE}/7, {part}"}
    assert not any(one.where.startswith(f"feature {SAE}/5") for one in replay.differences)


SWEPT: dict[str, Any] = {
    "prompt": ["the cat sat on", "a dog"],
    "edits": [
        {"do": "add", "feature": f"{SAE}/5", "amount": 1},
        {"do": "clamp", "feature": f"{SAE}/7", "amount": 1, "on": {"phase": "generated"}},
    ],
    "strengths": [3, 6],
    "seeds": [1, 2],
    "temperature": 1.0,
    "max_new_tokens": 5,
    "receipt": True,
    "reproducible": True,
}


def swept(client: Client, **changes: Any) -> dict[str, Any]:
    """The receipt of a sweep, once nothing of it is pending."""
    body = {**SWEPT, **changes}
    while True:
        found = client._transport.ask("sweep", body)["receipt"]
        if found["model"]["status"] != "pending":
            return json.loads(json.dumps(found))


def test_a_sweep_is_the_same_again_and_whatever_was_changed_is_named(folder: Path, client: Client) -> None:
    receipt = swept(client)
    assert [one["tokens"] for one in receipt["prompts"]] != []
    assert len(receipt["cells"]) == 2 * 2 * (1 + 2 * 2)
    assert len({json.dumps(one["text"]["token_ids"]) for one in receipt["cells"]}) > 10, "they are different texts"
    with served(folder) as (again, _):
        replay = again.replay(receipt)
    assert (str(replay), replay.is_same, replay.is_comparable) == ("no difference", True, True)
    place, cell = next((n, one) for n, one in enumerate(receipt["cells"]) if one["steering"] == 1)
    name = f"prompt 0, steering 1 at 3, seed {cell['seed']}"

    stronger = deepcopy(receipt)
    stronger["request"]["strengths"] = [3, 7]
    differences = client.replay(stronger).differences
    assert (differences[0].where, differences[0].was, differences[0].now) == (
        "prompt 0, steering 0 at 6, seed 1, strength",
        6,
        7,
    )
    assert {one.where for one in differences} >= {
        f"prompt 1, steering 1 at 6, seed 2, edit edits.1 (clamp {SAE}/7 at blocks.1.hook_resid_post), amount"
    }

    other = deepcopy(receipt)
    other["request"]["prompt"][1] = "a cat"
    [first, *_] = client.replay(other).differences
    assert first.where.startswith("prompt 1, token ")
    assert first.went_in

    dropped = deepcopy(receipt)
    del dropped["request"]["edits"][1]
    gone = [one for one in client.replay(dropped).differences if one.now == "not there"]
    assert {one.where for one in gone} >= {f"the {name} text", "the prompt 1, steering 1 at 6, seed 2 text"}
    assert len(gone) == 8

    written = deepcopy(receipt)
    text = written["cells"][place]["text"]
    text["token_ids"][2], text["tokens"][2] = text["token_ids"][2] + 1, "another"
    [only] = client.replay(written).differences
    assert (only.where, only.was) == (f"{name}, token 2", "another")

    hidden = deepcopy(receipt)
    hidden["cells"][place]["edits"][0]["last"]["after"] *= 1.01
    [only] = client.replay(hidden).differences
    assert only.where.startswith(f"{name}, edit edits.1 (clamp {SAE}/7")
    assert only.where.endswith("after at its last token")


def test_a_changed_row_of_the_sae_is_named_in_a_sweep(folder: Path, client: Client, tmp_path: Path) -> None:
    receipt = swept(client)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "saes" / SAE / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_dec"][7, 0] *= 1.001
    save_file(tensors, file)
    with served(other) as (changed, _):
        replay = changed.replay(receipt)
    assert f"feature {SAE}/7, decoder row" in {one.where for one in replay.differences if one.went_in}
    assert not any(one.where.startswith(f"feature {SAE}/5") for one in replay.differences)


def test_other_weights_of_the_model_are_said(folder: Path, receipt: dict[str, Any], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        tensors[name] = tensor * (3 if "embed" in name else 1)
    save_file(tensors, file, {"format": "pt"})
    with served(other) as (client, _):
        receipt_of(client, BASE)  # its digest is known from here on
        replay = client.replay(receipt)
    assert replay.circumstances
    assert replay.circumstances[0].startswith("weights of model: ")
    assert not replay.is_same
    assert not replay.is_comparable
    assert str(replay).startswith("not the same circumstances: weights of model")


def test_files_that_have_changed_since_the_start_have_no_digest(folder: Path, tmp_path: Path) -> None:
    """What is in memory is not what is on the disk now: nothing is claimed of either."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    model, sae = other / "model" / "model.safetensors", other / "saes" / SAE / "sae_weights.safetensors"
    body = {"watch": [{"source": SAE, "top_k": 1}], "compare": False}
    with served(other) as (client, runtime):
        known = receipt_of(client, body)
        assert known["sources"][0]["status"] == known["model"]["status"] == "known"
        loaded = Stamp.of(model)
        for file in (model, sae):
            os.utime(file, ns=(1, 1))
        changed = receipt_of(client, body)
        assert changed["sources"] == [{"source": SAE, "status": "changed", "files": []}]
        assert changed["model"] == known["model"], "it was hashed as it was loaded"
        later = Provenance(
            runtime.model, runtime.shelf._store, files=[loaded], products={}, folder=tmp_path / "new cache"
        )
        while later.model.status == "pending":
            time.sleep(0.01)
        assert (later.model.status, later.model.files, later.model.sha256) == ("changed", (), None)
        later.close()
        replay = compared(known, changed)
    assert replay.is_same
    assert replay.not_compared == (f"the files of {SAE}: their digest is changed in what runs now",)


def test_the_command_says_it_and_ends_accordingly(folder: Path, receipt: dict[str, Any], tmp_path: Path) -> None:
    where = ["--model-id", str(folder / "model"), "--set", f"LOCAL_SAE_DIR={folder / 'saes'}", "--set", "NUM_THREADS=1"]
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps({"steered": {}, "receipt": receipt}), encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", str(file), *where])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "no difference")
    changed = deepcopy(receipt)
    changed["steered"]["token_ids"][2] += 1
    changed["steered"]["tokens"][2] = "another"
    file.write_text(json.dumps(changed), encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", str(file), "--json", *where])
    assert done.exit_code == DIFFERS
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["differences"][0]["where"] == "steered, token 2"
    assert told["differences"][0]["was"] == "another"
    assert FAILED not in (0, DIFFERS)
