"""SAELens's directory of published SAEs, read without importing SAELens, which takes torch and seconds along."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from neuronpedia_inference.embedded.weights import default_cache_dir

PACKAGE = "sae_lens"
FORM = 2
"""Of the copy: another number when its rows change."""
FILE = "pretrained_saes.yaml"


@dataclass(frozen=True)
class Release:
    """SAEs of one model in one repository of the hub."""

    model: str
    repo: str
    paths: Mapping[str, str]
    """Path in the repository by SAE id."""
    neuronpedia_ids: Mapping[str, str | None]
    """By SAE id."""
    loader: str | None = None
    """SAELens's name for the format of the files; None for its own."""


@lru_cache(maxsize=1)
def releases() -> dict[str, Release]:
    """Every release by its name. From a copy in the cache folder, which reads sixty times faster than the original."""
    source = _source()
    copy = default_cache_dir() / f"sae-directory-{FORM}-{metadata.version('sae-lens')}-{source.stat().st_size}.json"
    try:
        rows = json.loads(copy.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = _rows(source)
        _keep(copy, rows)
    return {name: Release(*row) for name, row in rows.items()}


def _source() -> Path:
    # find_spec does not run the package.
    spec = util.find_spec(PACKAGE)
    assert spec, PACKAGE
    assert spec.origin, PACKAGE
    return Path(spec.origin).with_name(FILE)


def _rows(source: Path) -> dict[str, list[Any]]:
    import yaml

    with source.open("rb") as file:
        data = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        name: [
            about["model"],
            about["repo_id"],
            {sae["id"]: str(sae["path"]) for sae in about["saes"]},
            {sae["id"]: sae.get("neuronpedia") for sae in about["saes"]},
            about.get("conversion_func"),
        ]
        for name, about in data.items()
    }


def _keep(copy: Path, rows: Mapping[str, Any]) -> None:
    """For the next start; a folder that cannot be written to only makes that one slower."""
    scratch = copy.with_name(f".{copy.name}.{os.getpid()}")
    with suppress(OSError):
        copy.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(rows), encoding="utf-8")
        scratch.replace(copy)
