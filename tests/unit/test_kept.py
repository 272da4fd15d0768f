"""What one start keeps for the next: there whole, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuronpedia_inference import kept


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "a.json"
    assert kept.read(file) is None
    for value in ({"a": [1, None, "é"]}, []):
        kept.write(file, value)
        assert kept.read(file) == value
    assert [one.name for one in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("broken", [b"{", b"\xff\xfe", b"", b"[" * 100_000])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "a.json").write_bytes(broken)
    assert kept.read(tmp_path / "a.json") is None


def test_a_folder_that_cannot_be_written_to_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept.write(tmp_path / "file" / "a.json", 1)
    assert kept.read(tmp_path / "file" / "a.json") is None
