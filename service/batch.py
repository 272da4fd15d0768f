"""Answer every line of a file: in order, written as it goes, picked up where it stopped.

Input: one JSON value a line, the body of a request, or a bare string, which is its prompt.
Output: `{"line": 7, "id": "...", "answer": {...}}` a line, in the order of the input. What could not be answered goes
to `<output>.errors` in the same form, with `error` in place of `answer`.

Several lines go in one call, and a bounded number of calls is under way: the next is sent when the oldest is written.
Start it again after a crash with the same arguments and it goes on; `id` tells lines of another input apart.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from neuronpedia_inference.errors import InvalidRequest, unknown_name
from neuronpedia_inference.operations import Operation, by_name, validate

LINES_PER_CALL = 8
CALLS = 16
"""Under way or waiting to be written: what is in memory is bounded by this times LINES_PER_CALL."""
ATTEMPTS = 3
PAUSE_S = 1.0
"""Before the second attempt; twice as long before each further one."""
SILENT_CALLS = 3
"""Calls in a row of which no line is answered, after which the job stops."""
PROGRESS_S = 2.0

ANSWERED, SOME_FAILED = 0, 3
"""Exit codes of a job that came to its end."""

Ask = Callable[[str, list[dict[str, Any]]], Awaitable[Sequence[Any]]]
"""Answers several bodies of one operation. For each: its answer, or an exception in its place."""


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

    @property
    def exit_code(self) -> int:
        return SOME_FAILED if self.failed else ANSWERED


@dataclass
class Job:
    """One run over one file."""

    operation: Operation[Any]
    ask: Ask
    answers: TextIO
    errors: TextIO
    total: int
    pause_s: float
    counts: Counts = field(default_factory=Counts)
    silent_calls: int = 0
    started: float = field(default_factory=time.monotonic)
    told: float = 0.0

    async def answer(self, lines: Sequence[Line]) -> list[Any]:
        """For each line its answer, or the exception of its last attempt."""
        outcomes: dict[int, Any] = {}
        left = list(lines)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(self.pause_s * 2 ** (attempt - 1))
            results = await self.ask(self.operation.name, [line.body for line in left])
            outcomes |= {line.number: result for line, result in zip(left, results, strict=True)}
            left = [line for line in left if _is_worth_retrying(outcomes[line.number])]
            if not left:
                break
        return [outcomes[line.number] for line in lines]

    def write(self, lines: Sequence[Line], outcomes: Sequence[Any]) -> None:
        """Raises BatchFailed once nothing is answered any more."""
        for line, outcome in zip(lines, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self.fail(line.number, line.id, str(outcome) or type(outcome).__name__)
            else:
                self.counts.answered += 1
                _put(self.answers, {"line": line.number, "id": line.id, "answer": outcome})
            self.tell()
        is_silent = all(map(_is_worth_retrying, outcomes))
        self.silent_calls = self.silent_calls + 1 if is_silent else 0
        if is_silent and (self.silent_calls == SILENT_CALLS or not self.counts.answered):
            raise BatchFailed(f"nothing is answered: {outcomes[-1]}")

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


async def run(input: str, output: str, operation: str, fields: str, ask: Ask, *, pause_s: float = PAUSE_S) -> Counts:
    """Answer the lines of `input` that `output` does not hold yet. Raises BatchFailed."""
    wanted = _operation(operation)
    source, target = Path(input), Path(output)
    if not source.is_file():
        raise BatchFailed(f"--input {input}: no such file")
    defaults = _fields(fields)
    with _alone(target):
        done = _finished(target)
        with target.open("a", encoding="utf-8") as answers, _errors_of(target).open("w", encoding="utf-8") as errors:
            with source.open(encoding="utf-8-sig") as counted:
                job = Job(wanted, ask, answers, errors, sum(1 for text in counted if text.strip()), pause_s)
            with source.open(encoding="utf-8-sig") as texts:
                await _answer_all(job, _unfinished(job, texts, defaults, done))
        _sort(target)
    job.tell(now=True)
    return job.counts


async def _answer_all(job: Job, lines: Iterator[Line]) -> None:
    """A window over the calls, oldest first: what is done is written in order, and makes room for another."""
    window: deque[tuple[list[Line], asyncio.Task[list[Any]]]] = deque()
    try:
        while True:
            while len(window) < CALLS and (group := list(islice(lines, LINES_PER_CALL))):
                window.append((group, asyncio.create_task(job.answer(group))))
            if not window:
                return
            group, answering = window[0]
            job.write(group, await answering)
            window.popleft()
    finally:
        for _, answering in window:
            answering.cancel()
        await asyncio.gather(*(answering for _, answering in window), return_exceptions=True)


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
    """Put lines that an earlier run could not answer into their places. Only where they lie is kept in memory."""
    places: list[tuple[int, int, int]] = []
    with output.open("rb") as file:
        start = 0
        for text in file:
            places.append((json.loads(text)["line"], start, len(text)))
            start += len(text)
    ordered = sorted(places)
    if ordered == places:
        return
    scratch = output.with_name(output.name + ".sorted")
    with output.open("rb") as file, scratch.open("wb") as target:
        for _, start, length in ordered:
            file.seek(start)
            target.write(file.read(length))
    shutil.copymode(output, scratch)
    scratch.replace(output)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """No other job writes to this output meanwhile. The lock goes with the process, however that ends."""
    with output.with_name(output.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchFailed(f"--output {output}: another batch is writing to it") from None
        yield
