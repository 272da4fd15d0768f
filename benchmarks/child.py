"""One contender in a process of its own: a line of JSON in, a line of JSON out. Standard library only.

The process times its own work, so the pipe costs nothing. In: a case's line and `times`. Out: `ms` and `answer`, or
`not_offered` with the reason, or `failed`. The first line out names the versions.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol, TextIO

Run = Callable[[], Any]


class NotOffered(Exception):
    """The contender has no way to do this work; the message says why."""


class Contender(Protocol):
    """Turns a case's line into the function that is timed."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions belong to the result."""
        ...

    def prepare(self, line: dict[str, Any]) -> Run:
        """What may be done beforehand is done here. Raises NotOffered."""
        ...


def serve(load: Callable[[], Contender]) -> None:
    """Answer every line of standard input, until it ends."""
    answers = _answers_only()
    contender = load()
    _send(answers, {"versions": {name: metadata.version(name) for name in contender.packages}})
    for text in sys.stdin:
        _send(answers, _answer(contender, json.loads(text)))


def _answers_only() -> TextIO:
    """The real standard output; what libraries print goes to standard error instead."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _send(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _answer(contender: Contender, line: dict[str, Any]) -> dict[str, Any]:
    try:
        return timed(contender.prepare(line), line["times"])
    except NotOffered as exc:
        return {"not_offered": str(exc)}
    except Exception as exc:  # the parent reports it as this contender's result
        traceback.print_exc()
        return {"failed": f"{type(exc).__name__}: {exc}"}


def timed(run: Run, times: int) -> dict[str, Any]:
    """Milliseconds of each of `times` runs, and the last answer."""
    spent, answer = [], None
    for _ in range(times):
        started = time.perf_counter()
        answer = run()
        spent.append(1000 * (time.perf_counter() - started))
    return {"ms": spent, "answer": answer}
