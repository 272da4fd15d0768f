"""Part 8: what a batch job does with files. Nothing is ever truncated that the job did not write."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fire_tree import INJECTED, Ended, Tree, limited, patience, short, tail, until

N_LINES = 40
DEPLOYING = {"MODEL_ID": "smollm2-135m-instruct", "GPU": "none"}
"""What the file of the Modal app is imported with: a model that needs no look at the hub."""
DIARY = b"dear diary\nnothing"
BLOCKS = 4
"""Of 512 bytes, that a file may have: less than the answers."""


def _input(tree: Tree, held: bytes | None = None) -> Path:
    """In a folder of its own, in which outputs go too."""
    file = tree.new_folder() / "in.jsonl"
    lines = "".join(f"{json.dumps({'prompt': f'Number {n}.'})}\n" for n in range(1, N_LINES + 1))
    file.write_bytes(lines.encode() if held is None else held)
    return file


def _job(tree: Tree, source: Path, output: Path, *go: Path, before: Sequence[str] = ()) -> Ended:
    words = (str(source), str(output), *map(str, go))
    return tree.run(*words, fault="batch", before=before, folder=source.parent, seconds=60 * patience(), env=DEPLOYING)


def _stopped(ended: Ended, *says: str) -> str:
    """The one line that a job ends in, behind what it tells of its progress."""
    assert "Traceback" not in ended.err, f"a traceback: {tail(ended.err)}"
    assert ended.code == 1, f"exit code {ended.code}: {tail(ended.err)}"
    line = ended.err.splitlines()[-1]
    for word in (*says, "batch: "):
        assert word in line, f"{word!r} is not in: {short(line)}"
    return short(line)


def another_file_as_output_is_kept(tree: Tree) -> str:
    """An output that is any other file without a final newline is not emptied: it is refused as it is."""
    source = _input(tree)
    other = source.with_name("diary.txt")
    for held in (b"dear diary", DIARY, b'{"line": 1, "id": "x", "answer": 1}\nbuy milk'):
        other.write_bytes(held)
        ended = _job(tree, source, other)
        now = other.read_bytes()
        assert now == held, f"{held!r} has become {now[:60]!r}"
        said = _stopped(ended, "diary.txt")
    return said


def the_input_as_output_is_kept(tree: Tree) -> str:
    """`--input` given as `--output` is not emptied."""
    for held in (b'"Number 1."', b'"Number 1."\n"Number 2."\n'):
        source = _input(tree, held)
        ended = _job(tree, source, source)
        now = source.read_bytes()
        assert now == held, f"{held!r} has become {now!r}"
        said = _stopped(ended, "the same file")
    return said


def a_byte_that_is_not_utf_8_is_one_failure(tree: Tree) -> str:
    """One byte that is not UTF-8 fails its own line, and the others are answered."""
    source = _input(tree, b'"one"\n"caf\xe9"\n"three"\n')
    output = source.with_name("out.jsonl")
    ended = _job(tree, source, output)
    answered = [json.loads(line)["line"] for line in output.read_text("utf-8").splitlines()] if output.exists() else []
    assert answered == [1, 3], f"answered: {answered}; {tail(ended.err)}"
    return short(output.with_name("out.jsonl.errors").read_text("utf-8"))


def a_full_disk_is_one_line(tree: Tree) -> str:
    """A full disk is one line, behind whole answers, and the same command goes on from there."""
    source = _input(tree)
    output = source.with_name("out.jsonl")
    said = _stopped(_job(tree, source, output, before=limited("-f", BLOCKS)), str(output))
    held = output.read_bytes()
    assert held.endswith(b"\n"), f"a line is cut off: {held[-40:]!r}"
    assert _job(tree, source, output).code == 0
    n_lines = output.read_bytes().count(b"\n")
    assert n_lines == N_LINES, f"{n_lines} of {N_LINES} lines"
    return f"{said}; {held.count(bytes([10]))} answers, then {n_lines}"


def a_missing_folder_is_one_line(tree: Tree) -> str:
    """A missing folder is one line."""
    source = _input(tree)
    return _stopped(_job(tree, source, source.with_name("nowhere") / "out.jsonl"), "nowhere")


def a_folder_as_output_is_one_line(tree: Tree) -> str:
    """A folder as output is one line."""
    source = _input(tree)
    folder = source.with_name("folder")
    folder.mkdir()
    return _stopped(_job(tree, source, folder), "a folder")


def one_job_at_a_time_writes_to_an_output(tree: Tree) -> str:
    """Two runs on one output: the second is refused while the first runs."""
    source = _input(tree)
    output, go = source.with_name("out.jsonl"), source.with_name("go")
    command = [sys.executable, "-P", str(INJECTED), "batch", str(source), str(output), str(go)]
    first = subprocess.Popen(command, env=tree.environment(DEPLOYING), cwd=source.parent, stderr=subprocess.DEVNULL)
    try:
        until(output.exists, 60 * patience(), "the first has begun")
        second = _job(tree, source, output)
        go.touch()
        first.wait(60 * patience())
    finally:
        first.kill()
        first.wait()
    n_lines = output.read_bytes().count(b"\n")
    assert n_lines == N_LINES, f"{n_lines} lines for {N_LINES}"
    return f"{_stopped(second, 'another batch')}; {n_lines} lines"


def nothing_answered_is_no_success(tree: Tree) -> str:
    """A job of which no line was answered does not end with 0."""
    source = _input(tree, b"{not json\n[]\n")
    return _stopped(_job(tree, source, source.with_name("out.jsonl")), "no line was answered")


PROBES = {
    8: (
        another_file_as_output_is_kept,
        the_input_as_output_is_kept,
        a_byte_that_is_not_utf_8_is_one_failure,
        a_full_disk_is_one_line,
        a_missing_folder_is_one_line,
        a_folder_as_output_is_one_line,
        one_job_at_a_time_writes_to_an_output,
        nothing_answered_is_no_success,
    )
}
