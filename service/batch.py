"""Answer every line of a file: in order, written as it goes, picked up where it stopped.

Input: one JSON value a line, the body of a request, or a bare string, which is its prompt.
Output: `{"line": 7, "id": "...", "answer": {...}}` a line, in the order of the input. What could not be answered goes
to `<output>.errors` in the same form, with `error` in place of `answer`.

Start it again after a crash with the same arguments and it goes on; `id` tells lines of another input apart.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from neuronpedia_inference.errors import InvalidRequest, unknown_name
from neuronpedia_inference.operations import Operation, by_name, validate

CHUNK = 500
"""Lines sent at a time. An answer waits in memory for earlier ones of its chunk that have to be tried again."""
ATTEMPTS = 3
PROGRESS_S = 2.0

Map = Callable[..., Iterable[Any]]
"""`modal.Function.map`, or anything that takes bodies and `return_exceptions` and gives answers in order."""


class BatchFailed(Exception):
    """The whole job has to stop; the text says why."""


@dataclass(frozen=True)
class Line:
    number: int
    body: dict[str, Any]
    id: str


@dataclass
class Counts:
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    """Answered by an earlier run."""


@dataclass
class Job:
    """One run over one file."""

    operation: Operation[Any]
    map: Map
    answers: TextIO
    errors: TextIO
    total: int
    counts: Counts = field(default_factory=Counts)
    started: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def answer(self, lines: Sequence[Line]) -> None:
        """One chunk: the answers are written in order, as far as they have come. Raises BatchFailed."""
        outcomes: dict[int, Any] = {}
        left, written = list(lines), 0
        for attempt in range(1, ATTEMPTS + 1):
            sent, left, reason = left, [], None
            results = self.map([line.body for line in sent], return_exceptions=True)
            for line, result in zip(sent, results, strict=True):
                if _is_worth_retrying(result) and attempt < ATTEMPTS:
                    left.append(line)
                    reason = result
                    continue
                outcomes[line.number] = result
                written = self._write(lines, outcomes, written)
            if not left:
                return
            if attempt > 1 and len(left) == len(lines):
                raise BatchFailed(f"nothing is answered: {reason}")

    def fail(self, number: int, id_: str, error: str) -> None:
        self.counts.failed += 1
        print(f"line {number}: {error}", file=sys.stderr, flush=True)
        _put(self.errors, {"line": number, "id": id_, "error": error})

    def tell(self, *, now: bool = False) -> None:
        """Progress on standard error, every few seconds."""
        if not now and time.monotonic() - self.told < PROGRESS_S:
            return
        self.told = time.monotonic()
        counts, seconds = self.counts, max(self.told - self.started, 1e-9)
        rate = f"{counts.answered / seconds:.1f} lines/s"
        before = f", {counts.skipped} answered before" if counts.skipped else ""
        print(
            f"{counts.answered} of {self.total - counts.skipped} answered, {counts.failed} failed{before}; {rate}",
            file=sys.stderr,
            flush=True,
        )

    def _write(self, lines: Sequence[Line], outcomes: dict[int, Any], written: int) -> int:
        """Write what follows without a gap; returns how many lines of the chunk are out."""
        while written < len(lines) and lines[written].number in outcomes:
            line = lines[written]
            result = outcomes.pop(line.number)
            if isinstance(result, BaseException):
                self.fail(line.number, line.id, str(result) or type(result).__name__)
            else:
                self.counts.answered += 1
                _put(self.answers, {"line": line.number, "id": line.id, "answer": result})
            written += 1
            self.tell()
        return written


def run(input: str, output: str, operation: str, fields: str, mapper: Callable[[str], Map]) -> Counts:
    """Answer the lines of `input` that `output` does not hold yet. Raises BatchFailed."""
    wanted = _operation(operation)
    source, target = Path(input), Path(output)
    if not source.is_file():
        raise BatchFailed(f"--input {input}: no such file")
    defaults = _fields(fields)
    done = _finished(target)
    with target.open("a", encoding="utf-8") as answers, _errors_of(target).open("w", encoding="utf-8") as errors:
        with source.open(encoding="utf-8-sig") as counted:
            job = Job(wanted, mapper(operation), answers, errors, sum(1 for text in counted if text.strip()))
        with source.open(encoding="utf-8-sig") as texts:
            unfinished = _unfinished(job, texts, defaults, done)
            while lines := list(islice(unfinished, CHUNK)):
                job.answer(lines)
    _sort(target)
    job.tell(now=True)
    return job.counts


def _operation(name: str) -> Operation[Any]:
    if name not in by_name:
        raise BatchFailed(f"--operation: {unknown_name('operation', name, by_name)}")
    return by_name[name]


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except ValueError as exc:
        raise BatchFailed(f"--fields is not JSON: {exc}") from None
    if not isinstance(fields, dict):
        raise BatchFailed("--fields must be a JSON object")
    return fields


def _unfinished(job: Job, texts: Iterable[str], defaults: dict[str, Any], done: dict[int, str]) -> Iterator[Line]:
    """The lines still to be answered; those that no server could answer are reported at once."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        id_ = _id(job.operation, defaults, text)
        if number in done:
            if done[number] != id_:
                raise BatchFailed(
                    f"line {number} was answered for another input, operation or fields: choose another --output"
                )
            job.counts.skipped += 1
            continue
        try:
            yield Line(number, _body(job.operation, text, defaults), id_)
        except InvalidRequest as exc:
            job.fail(number, id_, f"{exc.code}: {exc.message}")


def _body(operation: Operation[Any], text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Raises InvalidRequest."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"not JSON: {exc}") from None
    value = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise InvalidRequest("neither a JSON object nor a string")
    body = {**defaults, **value}
    validate(operation, body)
    return body


def _id(operation: Operation[Any], defaults: dict[str, Any], text: str) -> str:
    asked = json.dumps([operation.name, defaults, text.strip()], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def _is_worth_retrying(result: object) -> bool:
    """Everything but an answer and what the request itself got wrong."""
    return isinstance(result, Exception) and not isinstance(result, ValueError | LookupError)


# Files


def _errors_of(output: Path) -> Path:
    return output.with_name(output.name + ".errors")


def _put(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
    file.flush()


def _finished(output: Path) -> dict[int, str]:
    """Id by number of every line in the output, whose last line is cut off if it was not written to its end."""
    if not output.exists():
        return {}
    kept, done = 0, {}
    with output.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                break
            try:
                entry = json.loads(text)
                done[entry["line"]] = entry["id"]
            except (ValueError, KeyError, TypeError):
                raise BatchFailed(f"--output {output} exists and is not the output of a batch") from None
            kept += len(text)
    with output.open("r+b") as file:
        file.truncate(kept)
    return done


def _sort(output: Path) -> None:
    """Put lines that an earlier run could not answer into their places."""
    with output.open(encoding="utf-8") as file:
        texts = list(file)
    numbers = [json.loads(text)["line"] for text in texts]
    if numbers == sorted(numbers):
        return
    ordered = output.with_name(output.name + ".sorted")
    by_number = dict(zip(numbers, texts, strict=True))
    ordered.write_text("".join(by_number[number] for number in sorted(by_number)), encoding="utf-8")
    ordered.replace(output)
