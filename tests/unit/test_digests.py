"""Digests of files against `hashlib` on the whole, and against files that change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuronpedia_inference import digests
from neuronpedia_inference.digests import PIECE_BYTES, FileDigest, FilesChanged, Hasher, Stamp

BODIES = {"small": b"weights", "empty": b"", "large": os.urandom(2 * PIECE_BYTES + 3)}
WAIT_S = 60


@pytest.fixture
def hasher(tmp_path: Path) -> Iterator[Hasher]:
    made = Hasher(tmp_path / "kept")
    yield made
    made.close()


def stamps(folder: Path) -> list[Stamp]:
    for name, body in BODIES.items():
        (folder / name).write_bytes(body)
    return [Stamp.of(folder / name) for name in BODIES]


def test_they_are_those_of_the_whole_files(hasher: Hasher, tmp_path: Path) -> None:
    found = hasher.request(stamps(tmp_path)).result(WAIT_S)
    assert found == tuple(FileDigest(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in BODIES.items())


def test_a_file_is_read_once_while_it_stays_as_it_is(hasher: Hasher, tmp_path: Path) -> None:
    """Kept beside the stamp: another digest put in its place is what is told, so nothing was read."""
    known = stamps(tmp_path)
    hasher.request(known).result(WAIT_S)
    for file in (tmp_path / "kept").iterdir():
        file.write_text('"' + "0" * 64 + '"', encoding="utf-8")
    again = Hasher(tmp_path / "kept")
    assert {one.sha256 for one in again.request(known).result(WAIT_S)} == {"0" * 64}
    again.close()


def test_a_file_that_has_changed_since_is_not_given_another_digest(hasher: Hasher, tmp_path: Path) -> None:
    known = stamps(tmp_path)
    (tmp_path / "small").write_bytes(b"WEIGHTS")
    os.utime(tmp_path / "small", ns=(known[0].changed_ns, known[0].changed_ns))
    with pytest.raises(FilesChanged, match="small has changed"):
        hasher.request(known).result(WAIT_S)
    with pytest.raises(FilesChanged):  # nor is what was kept told of it
        hasher.request(known).result(WAIT_S)
    [now] = hasher.request([Stamp.of(tmp_path / "small")]).result(WAIT_S)
    assert now.sha256 == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_broken_note_is_made_anew(hasher: Hasher, tmp_path: Path) -> None:
    known = stamps(tmp_path)
    before = hasher.request(known).result(WAIT_S)
    for file in (tmp_path / "kept").iterdir():
        file.write_text("{", encoding="utf-8")
    assert hasher.request(known).result(WAIT_S) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads have no priority of their own")
def test_its_thread_gives_way_to_all_others(hasher: Hasher, tmp_path: Path) -> None:
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    hasher.request(stamps(tmp_path)).result(WAIT_S)
    assert hasher._thread is not None
    assert os.getpriority(os.PRIO_PROCESS, hasher._thread.native_id or 0) == digests.LEAST_PRIORITY
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine
