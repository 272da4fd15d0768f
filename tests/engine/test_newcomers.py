"""SAEs that requests name and that are not here: fetched from a hub on this machine, within bounds; nobody waits."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from neuronpedia_inference import downloads, newcomers
from neuronpedia_inference.errors import InferenceError, LimitExceeded, SourceComing, StartupError, UnknownSource
from neuronpedia_inference.newcomers import Newcomers
from neuronpedia_inference.saes.catalogue import SourceSpec
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.files import is_here
from neuronpedia_inference.settings import Settings
from tests.engine.stores import SOON
from tests.engine.test_saes_load import build
from tests.modal.local_modal.hub import a_hub
from tests.unit.test_downloads import use_hub

REPO = "jbloom/GPT2-Small-SAEs-Reformatted"
LAYERS = (1, 2, 3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a hub with three SAEs; this machine has none."""
    repository = tmp_path / "repository"
    for layer in LAYERS:
        build("standard", hook=f"blocks.{layer}.hook_resid_pre").save_model(
            repository / f"blocks.{layer}.hook_resid_pre"
        )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with a_hub({REPO: repository}) as (address, asked):
        use_hub(monkeypatch, address)
        yield asked


def made(added: list[SourceSpec], **settings: Any) -> Newcomers:
    def add(spec: SourceSpec) -> None:
        describe(spec, "float32")
        added.append(spec)

    return Newcomers(Settings.read(model_id="gpt2-small", **{"download_on_request": True, **settings}), add)


def ask(name: str, by: Newcomers) -> InferenceError:
    return by.refusal(name, ["1-res-jb"])


def until(true: Callable[[], object]) -> None:
    ends = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def refused(name: str, by: Newcomers) -> InferenceError:
    """What is answered once it has been tried."""
    found: list[InferenceError] = []

    def has_ended() -> bool:
        found.append(ask(name, by))
        return "is being fetched" not in found[-1].message

    until(has_ended)
    return found[-1]


def test_one_that_is_listed_is_fetched_and_added(hub: list[str]) -> None:
    added: list[SourceSpec] = []
    by = made(added)
    error = ask("2-res-jb", by)
    assert isinstance(error, SourceComing)
    assert "Source '2-res-jb' is being fetched" in error.message
    assert (error.status, error.retry_after_s) == (503, 10)
    until(lambda: added)
    assert [spec.name for spec in added] == ["2-res-jb"]
    assert is_here(added[0])
    assert not any("blocks.1." in path for path in hub)
    by.close()


def test_without_the_setting_nothing_is_asked_of_the_hub(hub: list[str]) -> None:
    by = made([], download_on_request=False)
    error = ask("2-res-jb", by)
    assert isinstance(error, UnknownSource)
    assert "SAE_SETS='2-res-jb'" in error.message
    assert "DOWNLOAD_ON_REQUEST=1" in error.message
    assert hub == []
    by.close()


@pytest.mark.parametrize(
    "name", ["2-res-jbb", "hf://me/saes/final", "../../etc", "gpt2-small-res-jb/blocks.2.hook_resid_pre"]
)
def test_only_names_of_the_directory_count(name: str, hub: list[str]) -> None:
    by = made([])
    error = ask(name, by)
    assert isinstance(error, UnknownSource)
    assert f"Unknown source {name!r}" in error.message
    assert hub == []
    by.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"download_file_gib": 1e-6}, r"a file of it has 0\.00 GiB, and DOWNLOAD_FILE_GIB is 1e-06\. Raise it"),
        ({"download_total_gib": 1e-6}, r"would have had 0\.00 GiB fetched in all, and DOWNLOAD_TOTAL_GIB is 1e-06"),
    ],
)
def test_one_that_is_too_large_is_refused_before_a_byte_is_fetched(
    settings: dict[str, Any], message: str, hub: list[str]
) -> None:
    by = made([], **settings)
    error = refused("2-res-jb", by)
    assert isinstance(error, LimitExceeded)
    with pytest.raises(LimitExceeded, match=message):
        raise error
    assert not any("/resolve/" in path for path in hub)
    by.close()


def test_the_bound_for_all_counts_what_came_before(hub: list[str]) -> None:
    added: list[SourceSpec] = []
    by = made(added)
    ask("1-res-jb", by)
    until(lambda: added)
    by._settings = by._settings.model_copy(update={"download_total_gib": 1.5 * by._taken / 2**30})
    assert isinstance(refused("2-res-jb", by), LimitExceeded)
    assert len(added) == 1
    by.close()


def test_a_full_disk_is_not_filled(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=downloads.DISK_LEFT + 100))
    by = made([])
    error = refused("2-res-jb", by)
    assert isinstance(error, SourceComing)
    assert "could not be fetched" in error.message
    assert not any("/resolve/" in path for path in hub)
    with pytest.raises(StartupError, match=r"GiB of SAEs do not fit on the disk of .* HF_HOME names"):
        downloads.fetch_saes([by._listed["2-res-jb"]], lambda line: None)
    by.close()


def test_one_that_cannot_be_fetched_is_tried_again_later(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[SourceSpec] = []
    by = made(added)
    with monkeypatch.context() as broken:
        broken.setattr(downloads, "hub_files", lambda repo: {})
        assert "could not be fetched" in refused("2-res-jb", by).message
    assert "could not be fetched" in ask("2-res-jb", by).message  # and not at once
    monkeypatch.setattr(newcomers, "AGAIN_S", -1.0)
    ask("2-res-jb", by)
    until(lambda: added)
    by.close()


def test_a_slow_one_does_not_hold_up_another(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, fetch = threading.Event(), downloads.fetch_sae

    def gated(spec: SourceSpec) -> None:
        assert spec.name != "1-res-jb" or gate.wait(SOON)
        fetch(spec)

    monkeypatch.setattr(downloads, "fetch_sae", gated)
    added: list[SourceSpec] = []
    by = made(added)
    ask("1-res-jb", by)
    ask("2-res-jb", by)
    until(lambda: added)
    assert [spec.name for spec in added] == ["2-res-jb"]
    assert "is being fetched" in ask("1-res-jb", by).message
    gate.set()
    until(lambda: len(added) == 2)
    by.close()


def test_a_start_says_the_size_first(hub: list[str]) -> None:
    specs = [made([])._listed[f"{layer}-res-jb"] for layer in LAYERS]
    lines: list[str] = []
    assert downloads.fetch_saes(specs, lines.append)
    assert lines[0] == "3 SAEs are not on this machine: 0.00 GiB to download"
    assert lines[1] == "Downloading SAE 1 of 3: 1-res-jb, 0.00 GiB"
    assert all(map(is_here, specs))
    assert not downloads.fetch_saes(specs, lines.append)
    assert len(lines) == 4
