"""The errors that docs/errors.md promises, read from its text."""

from __future__ import annotations

import re
from pathlib import Path

ERRORS = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
ENTRY = re.compile(r"^## (\w+)\n\nStatus (\d{3})\.", re.MULTILINE)


def documented_errors() -> dict[str, int]:
    """Code → status."""
    return {code: int(status) for code, status in ENTRY.findall(ERRORS.read_text(encoding="utf-8"))}
