"""JSON that callers sent, read in slices: a large body does not keep everybody else waiting."""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator
from typing import Any

import ijson
from pydantic_core import from_json

WHOLE_BYTES = 2**16
"""Up to here a body is read at once, in about a millisecond."""
AT_ONCE_BYTES = 2**14
MAX_CONTAINERS = 20_000
"""Objects and lists in a body: each costs a hundred times what a number does."""

FEW = 20_000
"""Values, or escapes, that are read in a few milliseconds."""

# What follows a quotation mark for long: a text, or numbers behind one.
LONG_RUN = re.compile(rb'"[^"]{65536}')
IN_NUMBERS = b"0123456789+-.eE,[] \t\r\n{}:"
# An escaped backslash, a pair of surrogates, or (group 1) one alone, which is not a character.
SURROGATES = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)")


def n_containers(raw: bytes) -> int:
    """Objects and lists at the most: brackets in texts count too."""
    return raw.count(b"[") + raw.count(b"{")


def parsed(raw: bytes) -> Generator[None, None, Any]:
    """The value, with a yield between small steps of the work. Raises ValueError, whose text shows nothing of the body.

    Large bodies may not hold integers beyond ±(2**63 - 1).
    """
    if len(raw) <= WHOLE_BYTES or ijson.backend != "yajl2_c" or _is_better_whole(raw):
        return from_json(raw, allow_inf_nan=False)
    yield from _require_characters(raw)
    found: Any = ijson.sendable_list()
    parser = ijson.items_coro(found, "", use_float=True)
    try:
        for start in range(0, len(raw), AT_ONCE_BYTES):
            parser.send(raw[start : start + AT_ONCE_BYTES])
            yield
        parser.close()
    except ijson.JSONError as exc:
        raise ValueError(str(exc).partition("\n")[0]) from None
    [value] = found
    return value


def _is_better_whole(raw: bytes) -> bool:
    """Few values; or texts so long that the parser, which begins a text anew with every slice, would take forever."""
    return (
        raw.count(b",") <= FEW
        or raw.count(b"\\") > FEW
        or any(found[0].translate(None, IN_NUMBERS) != b'"' for found in LONG_RUN.finditer(raw))
    )


def _require_characters(raw: bytes) -> Generator[None, None, None]:
    """UTF-8, and no surrogate alone: the parser would put a question mark in its place."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(raw), AT_ONCE_BYTES):
        decoder.decode(raw[start : start + AT_ONCE_BYTES])
        yield
    decoder.decode(b"", final=True)
    if b"\\ud" in raw or b"\\uD" in raw:
        for number, found in enumerate(SURROGATES.finditer(raw)):
            if found[1]:
                raise ValueError("lone surrogate in an escape, which is not a character")
            if number % 1024 == 0:
                yield
