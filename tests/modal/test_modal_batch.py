"""The batch job: its rules with a mapper that is a plain function, then as the command that people type."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import batch
from tests.modal.service_under_test import EMBEDDED, MODAL, NAMED, ROOT, Deployed

N_LINES = 200
BAD = {17: '{"prompt": 5}', 90: "{not json", 151: '{"source": "1"}'}


def write_lines(path: Path, n: int = N_LINES, bad: dict[int, str] = BAD) -> Path:
    good = (json.dumps({"prompt": f"Number {i}."}) for i in range(1, n + 1))
    path.write_text("".join(f"{bad.get(i, text)}\n" for i, text in enumerate(good, 1)), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


class Mapper:
    """Answers each body with its prompt; `faults` gives errors to raise for a prompt, one per attempt."""

    def __init__(self, **faults: list[Exception]) -> None:
        self.sent: list[str] = []
        self.faults = {f"Number {name[1:]}.": list(errors) for name, errors in faults.items()}

    def __call__(self, name: str) -> Callable[..., Iterator[Any]]:
        assert name == "activations"
        return self.map

    def map(self, bodies: list[dict[str, Any]], *, return_exceptions: bool) -> Iterator[Any]:
        assert return_exceptions
        for body in bodies:
            self.sent.append(body["prompt"])
            faults = self.faults.get(body["prompt"])
            yield faults.pop(0) if faults else {"echo": body}


def run(tmp_path: Path, mapper: Mapper, fields: str = "") -> batch.Counts:
    return batch.run(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "activations", fields, mapper)


def test_good_lines_in_order_and_bad_ones_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl")
    counts = run(tmp_path, Mapper(), '{"num_results": 3}')

    assert (counts.answered, counts.failed) == (197, 3)
    out = read_lines(tmp_path / "out.jsonl")
    assert [entry["line"] for entry in out] == [i for i in range(1, N_LINES + 1) if i not in BAD]
    assert out[0]["answer"]["echo"] == {"num_results": 3, "prompt": "Number 1."}
    errors = read_lines(tmp_path / "out.jsonl.errors")
    assert [entry["line"] for entry in errors] == sorted(BAD)
    said = capsys.readouterr().err
    assert all(f"line {number}: " in said for number in BAD)
    assert "197 of 200 answered, 3 failed" in said.splitlines()[-1]


def test_what_failed_is_tried_again_and_keeps_its_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 6, {})
    mapper = Mapper(
        n2=[TimeoutError("overloaded: full")],
        n4=[RuntimeError("lost")] * batch.ATTEMPTS,
        n5=[ValueError("limit_exceeded: too long")],
    )
    counts = run(tmp_path, mapper)

    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl")] == [1, 2, 3, 6]
    assert [(entry["line"], entry["error"]) for entry in read_lines(tmp_path / "out.jsonl.errors")] == [
        (4, "lost"),
        (5, "limit_exceeded: too long"),
    ]
    assert (counts.answered, counts.failed) == (4, 2)
    assert [mapper.sent.count(f"Number {i}.") for i in range(1, 7)] == [1, 2, 1, 3, 1, 1]


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """With a last line that was cut off in the middle, and an earlier failure that now succeeds in its place."""
    write_lines(tmp_path / "in.jsonl", 9, {})
    run(tmp_path, Mapper(n2=[ValueError("no")]))
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rindex(b'{"line": 9') + 20])
    mapper = Mapper()
    counts = run(tmp_path, mapper)

    assert mapper.sent == ["Number 2.", "Number 9."]
    assert (counts.answered, counts.skipped) == (2, 7)
    assert [entry["line"] for entry in read_lines(out)] == list(range(1, 10))
    assert read_lines(tmp_path / "out.jsonl.errors") == []


def test_output_of_another_job_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    run(tmp_path, Mapper())
    with pytest.raises(batch.BatchFailed, match="line 1 was answered for another input"):
        run(tmp_path, Mapper(), '{"num_results": 3}')
    (tmp_path / "out.jsonl").write_text("something else\n")
    with pytest.raises(batch.BatchFailed, match="is not the output of a batch"):
        run(tmp_path, Mapper())


def test_a_service_that_answers_nothing_stops_the_job(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    fault: Exception = RuntimeError("startup_failed: no such model")
    mapper = Mapper(n1=[fault] * 9, n2=[fault] * 9, n3=[fault] * 9)
    with pytest.raises(batch.BatchFailed, match="nothing is answered: startup_failed"):
        run(tmp_path, mapper)


@pytest.mark.parametrize(
    ("operation", "fields", "why"),
    [("activation", "", "Did you mean"), ("activations", "{", "JSON"), ("activations", "[]", "object")],
)
def test_wrong_arguments(tmp_path: Path, operation: str, fields: str, why: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", 3, {})
    with pytest.raises(batch.BatchFailed, match=why):
        batch.run(str(source), str(tmp_path / "out.jsonl"), operation, fields, Mapper())


def test_strings_are_prompts_and_blank_lines_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"one"\n\n  \n"two \\u2028 lines"\n', encoding="utf-8")
    counts = run(tmp_path, Mapper())
    with (tmp_path / "out.jsonl").open(encoding="utf-8") as file:
        entries = [json.loads(text) for text in file]
    assert [(entry["line"], entry["answer"]["echo"]["prompt"]) for entry in entries] == [
        (1, "one"),
        (4, "two \u2028 lines"),
    ]
    assert counts.answered == 2


def test_killed_half_way_and_started_again(deployed: Deployed, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ["run", "service/inference_cls.py::batch", "--input", str(source), "--output", str(output)]
    command += ["--operation", "activations", "--fields", '{"source_set": "neurons", "num_results": 1}']
    command += ["--model-id", NAMED, "--sae-sets", "[]"]

    first = subprocess.Popen(
        [str(MODAL), *command],
        env=deployed.env(MODELS=NAMED, **EMBEDDED),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while (not output.exists() or output.read_bytes().count(b"\n") < 30) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = output.read_bytes()
    assert 30 <= before.count(b"\n") < 197

    said = deployed.modal(*command, MODELS=NAMED, **EMBEDDED)

    assert said.code == 0, said.text
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    entries = read_lines(output)
    assert [entry["line"] for entry in entries] == [i for i in range(1, N_LINES + 1) if i not in BAD]
    assert all(entry["answer"]["results"][0]["features"] for entry in entries)
    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl.errors")] == sorted(BAD)
    n_before = before.count(b"\n")
    assert f"{n_before} answered before" in said.text
