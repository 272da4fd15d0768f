"""Answer every line of a file: in order, written as it goes, picked up where it stopped.

Input: one JSON value a line, the body of a request, or a bare string, which is its prompt.
Output: `{"line": 7, "id": "...", "answer": {...}}` a line, in the order of the input. What could not be answered goes
to `<output>.errors` in the same form, with `error` in place of `answer`.

Several lines go in one call, and a bounded number of calls is under way: the next is sent when the oldest is written.
Start it again after a crash with the same arguments and it goes on; `id` tells lines of another input apart. A file
that no such job has written is never changed: it is refused, as is one that is two of the job's files at once.
"""

from __future__ import annotations

import asyncio
import codecs
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

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
    answers: FileIO
    errors: FileIO
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
    """Answer the lines of `input` that `output` does not hold yet. Raises BatchFailed, also if none is answered."""
    wanted, defaults = _operation(operation), _fields(fields)
    source, target = Path(input), Path(output)
    _check(source, target)
    with _opened(target) as answers:
        _lock(answers, target)
        written = _written(target, "answer")
        total = _survey(source, wanted, defaults, written)
        with _opened(_errors_of(target)) as errors:
            _written(_errors_of(target), "error")
            errors.truncate(0)
            answers.truncate(written.n_bytes)
            job = Job(wanted, ask, answers, errors, total, pause_s)
            await _answer_all(job, _unfinished(job, _lines(source), defaults, written.ids))
        _sort(target)
    job.tell(now=True)
    if not job.counts.answered + job.counts.skipped:
        raise BatchFailed(f"no line was answered; {_errors_of(target)} says why")
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


def _survey(source: Path, operation: Operation[Any], defaults: dict[str, Any], written: Written) -> int:
    """How many lines there are to answer. Raises BatchFailed unless `written` answers lines of this very job."""
    total, unmatched = 0, written.ids | written.cut_off
    for number, text in _lines(source):
        total += 1
        if number in unmatched and unmatched.pop(number) != _id(operation, defaults, text):
            raise BatchFailed(
                f"line {number} was answered for another input, operation or fields: choose another --output"
            )
    if not total:
        raise BatchFailed(f"--input {source}: there is no line in it")
    if unmatched:
        raise BatchFailed(f"line {min(unmatched)} was answered for another input: choose another --output")
    return total


def _unfinished(
    job: Job, lines: Iterator[tuple[int, bytes]], defaults: dict[str, Any], done: dict[int, str]
) -> Iterator[Line]:
    """The lines still to be answered; those that no server could answer are reported at once."""
    for number, text in lines:
        if number in done:
            job.counts.skipped += 1
            continue
        id_ = _id(job.operation, defaults, text)
        try:
            yield Line(number, _body(job.operation, text, defaults), id_)
        except InvalidRequest as exc:
            job.fail(number, id_, f"{exc.code}: {exc.message}")


def _body(operation: Operation[Any], text: bytes, defaults: dict[str, Any]) -> dict[str, Any]:
    """Raises InvalidRequest."""
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"not UTF-8: byte {text[exc.start]:#04x} at place {exc.start + 1} of the line") from None
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"not JSON: {exc}") from None
    value = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise InvalidRequest("neither a JSON object nor a string")
    body = {**defaults, **value}
    validate(operation, body)
    return body


def _id(operation: Operation[Any], defaults: dict[str, Any], text: bytes) -> str:
    asked = json.dumps([operation.name, defaults, text.decode(errors="surrogateescape").strip()], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def _is_worth_retrying(result: object) -> bool:
    """Everything but an answer and what the request itself got wrong."""
    return isinstance(result, Exception) and not isinstance(result, ValueError | LookupError)


# Files

_BEGINNING = re.compile(rb'\{"line": (\d+), "id": "([0-9a-f]{12})", "(answer|error)": ')
"""Of every line that a job writes."""
_OF_A_BEGINNING = (
    *map(re.escape, '{"line": '),
    r"\d+",
    *map(re.escape, ', "id": "'),
    *["[0-9a-f]"] * 12,
    *map(re.escape, '", "'),
    "[a-z]*",
    '"',
    ":",
)
_CUT_OFF = re.compile(reduce(lambda rest, token: f"(?:{token}{rest})?", reversed(_OF_A_BEGINNING), "").encode())
"""One that was cut off in its beginning."""


@dataclass(frozen=True)
class Written:
    """What a file of an earlier run holds."""

    ids: dict[int, str]
    """Of its whole lines, by their numbers."""
    n_bytes: int
    """Of its whole lines."""
    cut_off: dict[int, str]
    """Its last line, if that was not written to its end."""


def _errors_of(output: Path) -> Path:
    return output.with_name(output.name + ".errors")


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of every line that is not blank."""
    with _said_of("--input", source), source.open("rb") as file:
        for number, text in enumerate(file, 1):
            line = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
            if line.strip():
                yield number, line


@contextmanager
def _said_of(option: str, path: Path) -> Iterator[None]:
    """What goes wrong with a file, as one line that names it."""
    try:
        yield
    except OSError as exc:
        raise BatchFailed(f"{option} {path}: {exc.strerror or exc}") from None


def _check(source: Path, output: Path) -> None:
    """Raises BatchFailed unless one is a file, and the other and its errors are other files, or can be made."""
    with _said_of("--input", source):
        source.stat()
    if not source.is_file():
        raise BatchFailed(f"--input {source}: not an ordinary file")
    with _said_of("--output", output):
        if not output.parent.is_dir():
            raise BatchFailed(f"--output {output}: there is no folder {output.parent}")
        _check_output(output, source)
        _check_output(_errors_of(output), source, output)


def _check_output(path: Path, *others: Path) -> None:
    """Raises BatchFailed, and OSError for a path that no system takes."""
    if not path.exists():
        return
    if not path.is_file():
        raise BatchFailed(f"--output {path}: {'a folder' if path.is_dir() else 'not an ordinary file'}")
    for other in others:
        if other.exists() and path.samefile(other):
            raise BatchFailed(f"--output {path}: the same file as {other}")


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """To write at its end; what is there is kept."""
    with _said_of("--output", path):
        file = path.open("ab", buffering=0)
    with file:
        yield file


def _lock(answers: FileIO, output: Path) -> None:
    """No other job writes to this file meanwhile, by whatever name. The lock goes with the process."""
    with _said_of("--output", output):
        try:
            fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat(output.stat(), os.fstat(answers.fileno()))  # else a job's end has replaced it
        except BlockingIOError:
            is_free = False
    if not is_free:
        raise BatchFailed(f"--output {output}: another batch is writing to it")


def _put(file: FileIO, value: dict[str, Any]) -> None:
    """A whole line or nothing. Raises BatchFailed."""
    line = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    n_before, n_written = os.fstat(file.fileno()).st_size, 0
    try:
        while n_written < len(line):
            n_written += file.write(line[n_written:])
    except OSError as exc:
        file.truncate(n_before)
        raise BatchFailed(f"--output {file.name}: {exc.strerror}; the same command goes on from here") from None


def _written(path: Path, key: str) -> Written:
    """key: "answer" or "error". Raises BatchFailed if any line of it is not a job's."""
    ids, n_bytes, cut_off = {}, 0, {}
    with _said_of("--output", path), path.open("rb") as file:
        for text in file:
            found = _BEGINNING.match(text)
            is_whole = text.endswith(b"\n")
            if found is None and ids and _CUT_OFF.fullmatch(text):
                break
            if found is None or found[3].decode() != key or (is_whole and not _is_json(text)):
                raise BatchFailed(f"--output {path} exists and is not the output of a batch: choose another")
            (ids if is_whole else cut_off)[int(found[1])] = found[2].decode()
            n_bytes += len(text) if is_whole else 0
    return Written(ids, n_bytes, cut_off)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _sort(output: Path) -> None:
    """Put lines that an earlier run could not answer into their places. Only where they lie is kept in memory."""
    with _said_of("--output", output):
        places: list[tuple[int, int, int]] = []
        with output.open("rb") as file:
            start = 0
            for text in file:
                places.append((json.loads(text)["line"], start, len(text)))
                start += len(text)
        ordered = sorted(places)
        if ordered != places:
            _rewrite(output.resolve(), ordered)


def _rewrite(output: Path, ordered: list[tuple[int, int, int]]) -> None:
    """ordered: number, place and bytes of each line, as they shall stand. Raises OSError, and nothing has changed."""
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    scratch = Path(name)
    try:
        with output.open("rb") as file, open(handle, "wb") as target:
            for _, start, length in ordered:
                file.seek(start)
                target.write(file.read(length))
        shutil.copymode(output, scratch)
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
