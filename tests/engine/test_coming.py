"""Configured SAEs that are not here: a start waits for one of them at the most, and no set is served in part."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from neuronpedia_inference import downloads
from neuronpedia_inference.checks import verify
from neuronpedia_inference.checks.questions import NOT_HERE
from neuronpedia_inference.errors import InferenceError, SourceComing, StartupError
from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.operations.rendering import json_pieces
from neuronpedia_inference.questions import OneFeature
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.settings import Settings
from tests import models
from tests.engine.stores import SOON
from tests.engine.test_hub import seeded_sae
from tests.engine.test_newcomers import until
from tests.modal.local_modal.hub import a_hub
from tests.unit.test_downloads import use_hub

LAYERS = (0, 1, 2)
SETS = tuple(f"{layer}-t=hf://me/saes/{layer}" for layer in LAYERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("gpt2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With three SAEs, of which this machine has none; their repository."""
    repository = tmp_path / "repository"
    for layer in LAYERS:
        seeded_sae(layer).save_model(repository / str(layer))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with a_hub({"me/saes": repository}) as (address, _):
        use_hub(monkeypatch, address)
        yield repository


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Layers 1 and 2 come once it is set."""
    gate, fetch = threading.Event(), downloads.fetch_sae

    def gated(spec: SourceSpec) -> None:
        assert spec.name == "0-t" or gate.wait(SOON)
        fetch(spec)

    monkeypatch.setattr(downloads, "fetch_sae", gated)
    yield gate
    gate.set()


def settings(model: Path) -> Settings:
    return Settings.read(model_id=str(model), sae_sets=SETS, device="cpu", max_tokens=400, token_limit=200)


def values(runtime: Runtime, name: str) -> torch.Tensor:
    """[feature, pos] of some features."""
    prompt, source = runtime.tokenize("Hello, hub!", "once"), runtime.shelf.source(name)
    asked = [OneFeature([prompt], source, index) for index in range(6)]
    return torch.stack([torch.as_tensor(asyncio.run(runtime.ask(one))[0].values) for one in asked])


def answered(runtime: Runtime, operation: str, **fields: object) -> bytes:
    """As JSON."""
    one = next(one for one in OPERATIONS if one.name == operation)

    async def answer() -> bytes:
        reply = await one.run(one.request.model_validate(fields), runtime)
        return b"".join(json_pieces(reply, "snake", omit_null=True))

    return asyncio.run(answer())


def test_others_are_served_meanwhile_and_no_set_in_part(hub: Path, gate: threading.Event, model: Path) -> None:
    lines: list[str] = []
    runtime = Runtime.load(settings(model), lines.append)
    said = "\n".join(lines)
    assert "3 SAEs are not on this machine: 0.00 GiB to download\nDownloading 0-t\n2 SAEs are downloaded while" in said
    assert [source.name for source in runtime.shelf.sources] == ["0-t"]
    assert runtime.shelf.coming == ("1-t", "2-t")
    assert runtime.describe()["sources_coming"] == ["1-t", "2-t"]
    before = values(runtime, "0-t")
    asks = {"prompt": "Hello, hub!"}
    for fields in ({"source": "1-t"}, {"source_set": "t"}, {}):
        with pytest.raises(
            SourceComing, match=r"Source '1-t' is being fetched, 0\.00 GiB|Source '1-t' is being fetched"
        ):
            answered(runtime, "activations", **asks, **fields)
    answered(runtime, "activations", **asks, source="0-t", source_set="t")
    with pytest.raises(SourceComing):
        answered(runtime, "steer", **asks, max_new_tokens=2, features=[{"index": 3, "strength": 1.0}])
    checks = {check.name: check for check in asyncio.run(verify(runtime)).checks}
    assert [checks[f"features of {name}"].skipped for name in ("1-t", "2-t")] == [NOT_HERE, NOT_HERE]
    gate.set()
    until(lambda: not runtime.shelf.coming)
    assert [source.name for source in runtime.shelf.sources] == ["0-t", "1-t", "2-t"]
    whole = Runtime.load(settings(model))
    for name in ("0-t", "1-t", "2-t"):
        assert torch.equal(values(runtime, name), values(whole, name))
        assert values(whole, name).abs().max() > 0
    assert torch.equal(values(whole, "0-t"), before)
    of_all = answered(runtime, "activations", **asks)
    assert of_all == answered(whole, "activations", **asks)
    assert all(f'"{name}"'.encode() in of_all for name in ("0-t", "1-t", "2-t"))
    whole.close()
    runtime.close()


def test_one_that_does_not_come_is_said_to_who_asks_for_it(
    hub: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = downloads.fetch_sae

    def broken(spec: SourceSpec) -> None:
        if spec.name == "2-t":
            raise StartupError("Cannot download SAE '2-t': no route")
        fetch(spec)

    monkeypatch.setattr(downloads, "fetch_sae", broken)
    runtime = Runtime.load(settings(model))
    until(lambda: runtime.shelf.coming == ("2-t",))
    found: list[InferenceError] = []

    def has_failed() -> bool:
        with pytest.raises(SourceComing) as caught:
            runtime.shelf.source("2-t")
        found.append(caught.value)
        return "could not be fetched" in caught.value.message

    until(has_failed)
    assert values(runtime, "1-t").abs().max() > 0
    runtime.close()


def test_a_start_fails_where_none_can_be_had(hub: Path, model: Path) -> None:
    (hub / "2" / "sae_weights.safetensors").unlink()
    with pytest.raises(StartupError, match=r"SAE '2-t': 'me/saes' lists no '2/sae_weights.safetensors'"):
        Runtime.load(settings(model))
