"""Variants of the served model: what to steer with, in files, each under a name of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from neuronpedia_inference.errors import InferenceError, StartupError
from neuronpedia_inference.schemas.steering import Steering

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_VARIANTS = 256
MAX_BYTES = 2**24
"""Of one file."""


@dataclass(frozen=True)
class Variant:
    """A name, and what it steers with."""

    name: str
    steering: Steering
    given: Mapping[str, Any]
    """As its file says it."""


def read_variants(path: Path | None) -> dict[str, Variant]:
    """By name: of a folder every `NAME.json`, or one such file. Raises StartupError, naming the file."""
    if path is None:
        return {}
    if not path.exists():
        raise StartupError(f"VARIANTS: there is no file or folder {str(path)!r}")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or len(files) > MAX_VARIANTS:
        raise StartupError(f"VARIANTS: {str(path)!r} holds {len(files)} .json files; 1 to {MAX_VARIANTS} are served")
    return {file.stem: _variant(file) for file in files}


def _variant(file: Path) -> Variant:
    if NAME.fullmatch(file.stem) is None:
        raise StartupError(f"VARIANTS: {file.name!r} names no variant: letters, digits and ._- may stand in a name")
    try:
        if file.stat().st_size > MAX_BYTES:
            raise StartupError(f"VARIANTS: {file.name} is larger than {MAX_BYTES} bytes")
        given = json.loads(file.read_text(encoding="utf-8"))
        return Variant(file.stem, Steering.model_validate(given), given)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise StartupError(f"VARIANTS: {file.name}: {where}: {first['msg']}") from None
    except (OSError, ValueError, InferenceError) as exc:
        raise StartupError(f"VARIANTS: {file.name}: {' '.join(str(exc).split())}") from None
