"""Files that are on this machine are found without asking the hub; half of them are not enough."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from neuronpedia_inference import downloads
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.settings import Settings

NAME = "tests/model"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of a repository in the hub client's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--tests--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("f" * 40)
    folder = repo / "snapshots" / ("f" * 40)
    folder.mkdir(parents=True)
    return folder


def settings(name: str = NAME) -> Settings:
    return Settings.read(model_id=name, sae_sets=())


def test_a_model_in_the_cache(snapshot: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert downloads.found(settings()) is None
        (snapshot / name).write_text("{}")
    assert downloads.found(settings()) == snapshot
    assert downloads.fetch(settings()) == snapshot


def test_every_part_of_the_weights_is_needed(snapshot: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model-1.safetensors"):
        (snapshot / name).write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / downloads.INDEX).write_text(json.dumps(index))
    assert downloads.found(settings()) is None
    (snapshot / "model-2.safetensors").symlink_to(snapshot / "blob-that-is-gone")
    assert downloads.found(settings()) is None
    (snapshot / "blob-that-is-gone").touch()
    assert downloads.found(settings()) == snapshot
    (snapshot / downloads.INDEX).write_text("{")
    assert downloads.found(settings()) is None


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert downloads.found(settings(str(tmp_path))) == tmp_path


def test_what_is_not_there_and_cannot_be_had_is_one_line(snapshot: Path) -> None:
    with pytest.raises(StartupError, match=r"^Cannot download the model 'tests/other': [^\n]+$"):
        downloads.fetch(settings("tests/other"))
