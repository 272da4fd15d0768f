"""Several secrets with names, from a file that may change while the server runs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

LOOKED_AT_S = 1.0
"""Seconds after which the file is looked at again."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")


def parse(text: str) -> dict[str, str]:
    """Names with their secrets: `name=secret` in a line, empty lines and those that begin with `#` left out.

    Raises ValueError with the number of the line, and never with what stands in it.
    """
    named: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, secret = (part.strip() for part in line.partition("="))
        if not equals or _NAME.fullmatch(name) is None:
            raise ValueError(
                f"line {number} is not `name=secret`, with a name of letters, digits, `_`, `.`, `@` and `-`"
            )
        if not secret:
            raise ValueError(f"line {number} has a name without a secret")
        if name in named:
            raise ValueError(f"line {number} has a name that stands above already")
        named[name] = secret
    if not named:
        raise ValueError("it names no secret, so that nobody could call")
    return named


class SecretsFile:
    """The secrets of a file as they are now. Whoever is taken out of it is refused a second later."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError for a file that cannot be used."""
        self._path = path
        self._state = _state(path)
        self._named = parse(path.read_text(encoding="utf-8"))
        self._looked_at = time.monotonic()

    def named(self) -> Mapping[str, str]:
        """By name; the same object until the file has changed. A file that has become unusable changes nothing."""
        if time.monotonic() - self._looked_at < LOOKED_AT_S:
            return self._named
        self._looked_at = time.monotonic()
        try:
            state = _state(self._path)
            if state != self._state:
                self._state = state
                self._named = parse(self._path.read_text(encoding="utf-8"))
                log.info("SECRETS_FILE has changed", extra={"names": ", ".join(self._named)})
        except (OSError, ValueError) as exc:
            problem = exc.strerror if isinstance(exc, OSError) else exc
            log.warning("SECRETS_FILE: %s. The secrets read before still hold.", problem)
        return self._named


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
