"""Features of many texts, a line of JSON for each in a file, which is gone on with where it was left."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from neuronpedia_inference.client import calls
from neuronpedia_inference.client.calls import Call
from neuronpedia_inference.client.results import Features
from neuronpedia_inference.errors import InferenceError, InvalidRequest

AT_ONCE = 4
"""Texts of one request."""

Say = Callable[[int], None]


def quiet(_: int) -> None:
    """Says nothing."""


Steps = Generator[Call[list[Features]], list[Features], int]
"""Asks, is sent the answers or thrown what was raised, and returns how many texts were written."""


def corpus(texts: Iterable[str], to: str | Path, say: Say, fields: dict[str, Any]) -> Steps:
    """Append a line for every text that `to` does not have yet: its features, or what the service said against it.

    Texts go several at a time; where they are refused together, one by one. say: told how many lines there are.
    Raises ValueError where the file has other texts than `texts` begin with, and InvalidRequest where all texts of
    the first request are refused for the same reason, which is then not theirs.
    """
    path, rest = Path(to), iter(texts)
    n_lines = _kept_lines(path, rest)
    written = 0
    with path.open("a", encoding="utf-8") as file:
        while batch := list(islice(rest, AT_ONCE)):
            found = yield from _each(batch, fields)
            reasons = {str(one) if isinstance(one, InvalidRequest) else None for one in found}
            if written == 0 and isinstance(found[0], InvalidRequest) and len(batch) > 1 and len(reasons) == 1:
                raise found[0]
            for pair in zip(batch, found, strict=True):
                file.write(_line(*pair) + "\n")
            file.flush()
            written += len(batch)
            say(n_lines + written)
    return written


def read_corpus(path: str | Path) -> Iterator[tuple[str, Features | InferenceError]]:
    """Every text of a file that `corpus` has written, with its features or the error that it met."""
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            body = json.loads(line)
            if "error" in body:
                yield body["text"], InvalidRequest(body["error"])
            else:
                yield body["text"], Features.read(body["features"])


def _each(
    batch: list[str], fields: dict[str, Any]
) -> Generator[Call[list[Features]], list[Features], list[Features | InvalidRequest]]:
    try:
        return [*(yield calls.features_of_several(batch, **fields))]
    except InvalidRequest as exc:
        if len(batch) == 1:
            return [exc]
    found: list[Features | InvalidRequest] = []
    for text in batch:
        found += yield from _each([text], fields)
    return found


def _line(text: str, found: Features | InvalidRequest) -> str:
    if isinstance(found, InvalidRequest):
        return json.dumps({"text": text, "error": found.message, "code": found.code}, ensure_ascii=False)
    return json.dumps({"text": text, "features": json.loads(found.to_json())["value"]}, ensure_ascii=False)


def _kept_lines(path: Path, rest: Iterator[str]) -> int:
    """How many texts the file has, which are taken from `rest`. A line that was cut off is taken out of the file."""
    if not path.exists():
        return 0
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, start=1):
        text = json.loads(line)["text"]
        if next(rest, None) != text:
            raise ValueError(f"{path} has another text in line {number} than there is now: name another file")
    with path.open("r+b") as file:
        file.truncate(len(whole) + 1 if whole else 0)
    return len(lines)
