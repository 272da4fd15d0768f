"""SAELens's directory of published SAEs, read without importing SAELens, which takes torch and seconds along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from neuronpedia_inference import kept
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
    about = source.stat()
    version = f"{FORM}-{metadata.version('sae-lens')}-{about.st_size}-{about.st_mtime_ns}"
    copy = default_cache_dir() / f"sae-directory-{version}.json"
    try:
        return _releases(kept.read(copy))
    except (TypeError, AttributeError, KeyError):
        rows = _rows(source)
        kept.write(copy, rows)
        return _releases(rows)


def _releases(rows: Mapping[str, Sequence[Any]]) -> dict[str, Release]:
    """Raises TypeError, AttributeError or KeyError for what `_rows` has not made."""
    found = {name: Release(*row) for name, row in rows.items()}
    if not found or any(one.paths.keys() != one.neuronpedia_ids.keys() for one in found.values()):
        raise KeyError
    return found


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
