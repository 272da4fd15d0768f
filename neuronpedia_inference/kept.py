"""Small JSON files in the cache folder: what was found out at one start, for the next. Losing one costs time only."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def read(file: Path) -> Any:
    """What was written there; None where there is nothing that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_text(encoding="utf-8"))
    return None


def write(file: Path, value: Any) -> None:
    """At once and whole. A folder that cannot be written to makes the next start as slow as this one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(value), encoding="utf-8")
        beside.replace(file)
