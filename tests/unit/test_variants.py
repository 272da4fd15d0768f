"""Variants of the served model: what is wrong with a file ends the start in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.schemas.steering import Steering
from neuronpedia_inference.variants import read_variants

ECONOMY = {"features": [{"source": "15-res-4k", "index": 1113, "strength": 70}]}


def test_a_file_is_a_variant_by_its_name_and_a_folder_is_all_of_its_files(tmp_path: Path) -> None:
    for name in ("economy", "moon-2"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ECONOMY))
    (tmp_path / "notes.txt").write_text("not one")
    both, one = read_variants(tmp_path), read_variants(tmp_path / "economy.json")
    assert list(both) == ["economy", "moon-2"]
    assert list(one) == ["economy"]
    assert one["economy"].given == ECONOMY
    assert one["economy"].steering == Steering.model_validate(ECONOMY)
    assert read_variants(None) == {}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("economy.json", "{", "economy.json: "),
        ("economy.json", '{"feature": []}', "economy.json: .*feature"),
        ("economy.json", '{"features": [{"source": "15-res-4k", "index": 1}]}', "features.0.strength: Field required"),
        ("my variant.json", "{}", "'my variant.json' names no variant"),
        ("economy.txt", "{}", "holds 0 .json files; 1 to 256 are served"),
    ],
)
def test_what_cannot_be_one_ends_the_start(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(StartupError, match=f"VARIANTS: .*{why}") as refused:
        read_variants(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no file or folder .*nowhere"):
        read_variants(tmp_path / "nowhere")
