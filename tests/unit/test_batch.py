"""The rules of a batch job, with a service that is a plain function."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from service import batch
from tests.batches import BAD, N_LINES, Service, read_lines, run, write_lines


def test_good_lines_in_order_and_bad_ones_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in.jsonl")
    counts = run(tmp_path, Service(), '{"num_results": 3}')

    assert (counts.answered, counts.failed, counts.exit_code) == (197, 3, batch.SOME_FAILED)
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
    service = Service(
        n2=[TimeoutError("overloaded: full")],
        n4=[RuntimeError("lost")] * batch.ATTEMPTS,
        n5=[ValueError("limit_exceeded: too long")],
    )
    counts = run(tmp_path, service)

    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl")] == [1, 2, 3, 6]
    assert [(entry["line"], entry["error"]) for entry in read_lines(tmp_path / "out.jsonl.errors")] == [
        (4, "lost"),
        (5, "limit_exceeded: too long"),
    ]
    assert (counts.answered, counts.failed) == (4, 2)
    assert [service.sent.count(f"Number {i}.") for i in range(1, 7)] == [1, 2, 1, 3, 1, 1]


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """With a last line that was cut off in the middle, and an earlier failure that now succeeds in its place."""
    write_lines(tmp_path / "in.jsonl", 9, {})
    run(tmp_path, Service(n2=[ValueError("no")]))
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rindex(b'{"line": 9') + 20])
    service = Service()
    counts = run(tmp_path, service)

    assert service.sent == ["Number 2.", "Number 9."]
    assert (counts.answered, counts.skipped, counts.exit_code) == (2, 7, batch.ANSWERED)
    assert [entry["line"] for entry in read_lines(out)] == list(range(1, 10))
    assert read_lines(tmp_path / "out.jsonl.errors") == []


def test_output_of_another_job_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    run(tmp_path, Service())
    with pytest.raises(batch.BatchFailed, match="line 1 was answered for another input"):
        run(tmp_path, Service(), '{"num_results": 3}')
    (tmp_path / "out.jsonl").write_text("something else\n")
    with pytest.raises(batch.BatchFailed, match="is not the output of a batch"):
        run(tmp_path, Service())


def test_a_service_that_answers_nothing_stops_the_job(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", 3, {})
    fault: Exception = RuntimeError("startup_failed: no such model")
    service = Service(n1=[fault] * 9, n2=[fault] * 9, n3=[fault] * 9)
    with pytest.raises(batch.BatchFailed, match="nothing is answered: startup_failed"):
        run(tmp_path, service)


def test_many_lines_a_call_and_a_bounded_number_of_calls(tmp_path: Path) -> None:
    n_lines = 3 * batch.CALLS * batch.LINES_PER_CALL + 5
    write_lines(tmp_path / "in.jsonl", n_lines, {})
    service = Service()
    assert run(tmp_path, service).answered == n_lines
    assert [len(call) for call in service.calls] == [batch.LINES_PER_CALL] * (n_lines // batch.LINES_PER_CALL) + [5]
    assert service.most_under_way == batch.CALLS


def test_a_slow_call_does_not_hold_up_those_beside_it(tmp_path: Path) -> None:
    """The first is answered only once a full window of others has been asked for: a barrier would wait for ever."""
    write_lines(tmp_path / "in.jsonl", batch.CALLS * batch.LINES_PER_CALL, {})

    class Slow(Service):
        async def ask(self, name: str, bodies: list[dict[str, Any]]) -> list[Any]:
            is_first = bodies[0]["prompt"] == "Number 1."
            answers = await super().ask(name, bodies)
            while is_first and len(self.calls) < batch.CALLS:
                await asyncio.sleep(0)
            return answers

    assert run(tmp_path, Slow()).answered == batch.CALLS * batch.LINES_PER_CALL
    numbers = [entry["line"] for entry in read_lines(tmp_path / "out.jsonl")]
    assert numbers == sorted(numbers)


def test_a_service_that_stops_answering_stops_the_job(tmp_path: Path) -> None:
    """What was answered before stays, and the next run goes on behind it."""
    n_lines, n_good = 10 * batch.LINES_PER_CALL, 2 * batch.LINES_PER_CALL
    write_lines(tmp_path / "in.jsonl", n_lines, {})
    dead: list[Exception] = [RuntimeError("gone")] * batch.ATTEMPTS
    service = Service(**{f"n{number}": list(dead) for number in range(n_good + 1, n_lines + 1)})
    with pytest.raises(batch.BatchFailed, match="nothing is answered: gone"):
        run(tmp_path, service)
    assert len(read_lines(tmp_path / "out.jsonl")) == n_good
    assert run(tmp_path, Service()).skipped == n_good
    assert len(read_lines(tmp_path / "out.jsonl")) == n_lines


@pytest.mark.parametrize(
    ("operation", "fields", "why"),
    [("activation", "", "Did you mean"), ("activations", "{", "JSON"), ("activations", "[]", "object")],
)
def test_wrong_arguments(tmp_path: Path, operation: str, fields: str, why: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", 3, {})
    with pytest.raises(batch.BatchFailed, match=why):
        asyncio.run(batch.run(str(source), str(tmp_path / "out.jsonl"), operation, fields, Service().ask))


def test_strings_are_prompts_and_blank_lines_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"one"\n\n  \n"two \\u2028 lines"\n', encoding="utf-8")
    counts = run(tmp_path, Service())
    with (tmp_path / "out.jsonl").open(encoding="utf-8") as file:
        entries = [json.loads(text) for text in file]
    assert [(entry["line"], entry["answer"]["echo"]["prompt"]) for entry in entries] == [
        (1, "one"),
        (4, "two \u2028 lines"),
    ]
    assert counts.answered == 2
