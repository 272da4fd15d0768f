"""What a batch job does with files: it changes none that it has not written, and says in one line what is wrong."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service import batch
from tests.batches import Service, read_lines, run, write_lines

ROOT = Path(__file__).resolve().parents[2]
OTHER_FILES = {
    "notes": b"dear diary",
    "notes of several lines": b"dear diary\nnothing",
    "an object": b'{"line": 1, "id": "0123456789ab"}',
    "lines of something else": b'{"line": 1, "id": "x", "answer": 1}\n',
    "not text": bytes(range(256)),
    "answers and then notes": b'{"line": 1, "id": "0123456789ab", "answer": 1}\nbuy milk',
}


@pytest.mark.parametrize("held", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.errors"])
def test_a_file_that_no_batch_has_written_is_refused_as_it_is(tmp_path: Path, name: str, held: bytes) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    other = tmp_path / name
    other.write_bytes(held)
    with pytest.raises(batch.BatchFailed, match=rf"{name} exists and is not the output of a batch"):
        run(tmp_path, Service())
    assert other.read_bytes() == held


def test_the_cut_off_line_of_another_job_is_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    held = b'{"line": 1, "id": "0123456789ab", "answer": {"ech'
    (tmp_path / "out.jsonl").write_bytes(held)
    with pytest.raises(batch.BatchFailed, match="line 1 was answered for another input"):
        run(tmp_path, Service())
    assert (tmp_path / "out.jsonl").read_bytes() == held


def test_a_line_may_be_cut_off_anywhere(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 2, {})
    run(tmp_path, Service())
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for n_bytes in range(first, len(whole)):
        out.write_bytes(whole[:n_bytes])
        assert run(tmp_path, Service()).skipped == 1
        assert out.read_bytes() == whole


def test_answers_to_more_lines_than_there_are_are_of_another_input(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 5, {})
    run(tmp_path, Service())
    before = (tmp_path / "out.jsonl").read_bytes()
    write_lines(tmp_path / "in.jsonl", 3, {})
    with pytest.raises(batch.BatchFailed, match="line 4 was answered for another input"):
        run(tmp_path, Service())
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("made", ["link", "symlink_to", "hardlink_to"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.errors"])
def test_the_input_is_never_written_to(tmp_path: Path, made: str, name: str) -> None:
    """Given by its own name, or by another that leads to it."""
    source = write_lines(tmp_path / "in.jsonl", 3, {})
    before = source.read_bytes()
    if made == "link":
        source = source.rename(tmp_path / name)
    else:
        getattr(tmp_path / name, made)(source)
    with pytest.raises(batch.BatchFailed, match="the same file as .*"):
        asyncio.run(batch.run(str(source), str(tmp_path / "out.jsonl"), "activations", "", Service().ask))
    assert source.read_bytes() == before


def test_answers_and_errors_are_two_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    run(tmp_path, Service())
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.errors").unlink()
    (tmp_path / "out.jsonl.errors").hardlink_to(tmp_path / "out.jsonl")
    with pytest.raises(batch.BatchFailed, match="the same file as"):
        run(tmp_path, Service())
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_files_beside_the_output_are_left_alone(tmp_path: Path) -> None:
    """An earlier failure makes the job put its lines in order, for which it needs a file of its own."""
    write_lines(tmp_path / "in.jsonl", 4, {})
    neighbours = [tmp_path / f"out.jsonl{ending}" for ending in (".lock", ".sorted", ".tmp", "~")]
    for neighbour in neighbours:
        neighbour.write_text("mine")
    run(tmp_path, Service(n2=[ValueError("no")]))
    run(tmp_path, Service())
    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl")] == [1, 2, 3, 4]
    assert [neighbour.read_text() for neighbour in neighbours] == ["mine"] * len(neighbours)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in neighbours), "in.jsonl", "out.jsonl", "out.jsonl.errors"
    }  # fmt: skip


def test_an_output_by_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 4, {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "elsewhere" / "answers")
    run(tmp_path, Service(n2=[ValueError("no")]))
    run(tmp_path, Service())
    assert (tmp_path / "out.jsonl").is_symlink()
    assert [entry["line"] for entry in read_lines(tmp_path / "elsewhere" / "answers")] == [1, 2, 3, 4]


@pytest.mark.parametrize("made", ["its name", "symlink_to", "hardlink_to"])
def test_one_job_at_a_time_writes_to_an_output(tmp_path: Path, made: str) -> None:
    """By whatever name."""
    write_lines(tmp_path / "in.jsonl", 3, {})
    held = tmp_path / ("out.jsonl" if made == "its name" else "another.jsonl")
    held.touch()
    if made != "its name":
        getattr(tmp_path / "out.jsonl", made)(held)
    with held.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(batch.BatchFailed, match="another batch is writing"):
            run(tmp_path, Service())
    assert run(tmp_path, Service()).answered == 3


def test_a_line_that_is_not_utf_8_is_one_failure(tmp_path: Path) -> None:
    """The first with a byte-order mark, the second in Latin-1."""
    lines = [b'\xef\xbb\xbf"one"', '"caf\xe9"'.encode("latin-1"), b'"three"', b""]
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join(lines))
    counts = run(tmp_path, Service())
    assert (counts.answered, counts.failed, counts.exit_code) == (2, 1, batch.SOME_FAILED)
    assert [entry["answer"]["echo"]["prompt"] for entry in read_lines(tmp_path / "out.jsonl")] == ["one", "three"]
    (error,) = read_lines(tmp_path / "out.jsonl.errors")
    assert (error["line"], error["error"]) == (2, "invalid_request: not UTF-8: byte 0xe9 at place 5 of the line")
    assert run(tmp_path, Service()).skipped == 2


def test_a_text_that_utf_8_cannot_say_is_written_as_json_can(tmp_path: Path) -> None:
    """What a service echoes may hold half of a surrogate pair."""
    write_lines(tmp_path / "in.jsonl", 1, {})

    class Odd(Service):
        async def ask(self, name: str, bodies: list[dict[str, Any]]) -> list[Any]:
            return ["\ud800 \u00e9"]

    assert run(tmp_path, Odd()).answered == 1
    assert read_lines(tmp_path / "out.jsonl")[0]["answer"] == "\ud800 \u00e9"


@pytest.mark.parametrize("held", ["", "\n\n  \n"])
def test_an_input_without_a_line_is_no_success(tmp_path: Path, held: str) -> None:
    (tmp_path / "in.jsonl").write_text(held)
    with pytest.raises(batch.BatchFailed, match="there is no line in it"):
        run(tmp_path, Service())


def test_nothing_answered_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{not json\n[]\n")
    with pytest.raises(batch.BatchFailed, match=r"no line was answered; .*out\.jsonl\.errors says why"):
        run(tmp_path, Service())
    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl.errors")] == [1, 2]


PATHS = {
    "missing input": ("nowhere.jsonl", "out.jsonl", "--input .*nowhere.jsonl: No such file or directory"),
    "folder as input": (".", "out.jsonl", "--input .*: not an ordinary file"),
    "missing folder": ("in.jsonl", "nowhere/out.jsonl", "--output .*: there is no folder .*nowhere"),
    "file as folder": ("in.jsonl", "in.jsonl/out.jsonl", "--output .*: there is no folder .*in.jsonl"),
    "folder as output": ("in.jsonl", "folder", "--output .*folder: a folder"),
    "folder of errors": ("in.jsonl", "with-folder", "--output .*with-folder.errors: a folder"),
    "device as output": ("in.jsonl", "/dev/null", "--output /dev/null: not an ordinary file"),
    "name too long": ("in.jsonl", "x" * 300, "--output x*: File name too long"),
}


@pytest.mark.parametrize(("source", "output", "line"), PATHS.values(), ids=PATHS)
def test_a_path_that_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in.jsonl"), 3, {})
    Path("folder").mkdir()
    Path("with-folder.errors").mkdir()
    with pytest.raises(batch.BatchFailed, match=f"^{line}$"):
        asyncio.run(batch.run(source, output, "activations", "", Service().ask))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    (tmp_path / "out.jsonl").touch(0o400)
    with pytest.raises(batch.BatchFailed, match="Permission denied"):
        run(tmp_path, Service())


LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from service import batch
from tests.batches import Service, run

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run(Path(sys.argv[1]), Service())
except batch.BatchFailed as exc:
    raise SystemExit(f"batch: {exc}")
"""


@pytest.mark.parametrize("limit", [1, 250, 4000])
def test_a_full_disk_stops_the_job_between_two_lines(tmp_path: Path, limit: int) -> None:
    """`limit`: bytes that a file may have, which the system enforces as it does the end of a disk."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    write_lines(tmp_path / "in.jsonl", 100, {})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}  # it would be cut, too
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if "answered," not in text]
    assert line.startswith("batch: --output ")
    assert line.endswith("File too large; the same command goes on from here")
    held = (tmp_path / "out.jsonl").read_bytes()
    assert limit - 150 < len(held) <= limit
    assert [json.loads(text)["line"] for text in held.splitlines()] == list(range(1, held.count(b"\n") + 1))
    counts = run(tmp_path, Service())
    assert counts.skipped == held.count(b"\n")
    assert len(read_lines(tmp_path / "out.jsonl")) == 100
