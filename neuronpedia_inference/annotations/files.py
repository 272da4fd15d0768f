"""Files of annotations: JSON lines (also gzipped) and Parquet, one row for each feature or for a part of what is known.

Neuronpedia's export is understood as it is: its `explanations`, `features` and `activations` files name the same things
by other keys.

row         `source` (or Neuronpedia's `layer`), else the file or a folder above it is named after the source
            `index`, a number or its digits
            `label` (`description`), `density` (`frac_nonzero`), `max` (`maxActApprox`), `mean`, `contexts`: if known
            `model` (`modelId`): rows of other models are left out
context     `tokens`, `values` of the same length, `from`; a row with these keys is itself a context
"""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuronpedia_inference.annotations.values import Context, SourceAnnotations, stored_contexts
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.folders import expanded, missing_folder

log = logging.getLogger(__name__)

MOST_CONTEXTS = 10
"""Of one feature: the strongest are kept."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
NUMBERS = {"density": "frac_nonzero", "max": "maxActApprox", "mean": "mean"}
"""Keys of numbers, with Neuronpedia's word."""

Row = Mapping[str, Any]


@dataclass
class _Collected:
    """What the rows have said of one source so far."""

    n_features: int
    labels: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in NUMBERS})
    contexts: dict[int, list[Context]] = field(default_factory=lambda: defaultdict(list))


class _BadRow(ValueError):
    """What is wrong with a row."""


def read_folder(
    folder: Path, n_features: Mapping[str, int], model_names: Collection[str], known: Mapping[str, SourceAnnotations]
) -> dict[str, SourceAnnotations]:
    """Annotations of sources that are served, from every file in `folder`; what they say wins over `known`.

    n_features: of every source that is served. Raises StartupError for a folder without such files, a file or row that
    cannot be read (it names file and line), and a folder that says nothing about what is served.
    """
    folder = expanded("LABELS_DIR", folder)
    if not folder.is_dir():
        raise missing_folder("LABELS_DIR", folder)
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES))
    if not files:
        raise StartupError(f"LABELS_DIR: no {', '.join(SUFFIXES)} files in {str(folder)!r}")
    found = {name: _Collected(size) for name, size in n_features.items()}
    left_out: Counter[str] = Counter()
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            try:
                _take(row, file, folder, model_names, found, left_out)
            except _BadRow as exc:
                raise StartupError(f"LABELS_DIR: {file}, row {number}: {exc}") from None
    told = {name: one for name, one in found.items() if one.labels or one.contexts or any(one.numbers.values())}
    if not told:
        raise StartupError(
            f"LABELS_DIR: nothing in {str(folder)!r} is about a source that is served "
            f"({', '.join([*n_features][:6]) or 'none is'}); it has {', '.join([*left_out][:6]) or 'no rows'}"
        )
    if left_out:
        log.warning("LABELS_DIR: %s rows are left out, of %s", sum(left_out.values()), ", ".join(sorted(left_out)[:12]))
    return {name: _annotations(one, known.get(name)) for name, one in told.items()}


def _rows(file: Path) -> Iterator[Row]:
    """Raises StartupError for what is no such file."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
            return
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(line.decode(), file, number)
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise StartupError(f"LABELS_DIR: {file} cannot be read: {exc}") from exc


def _json_row(line: str, file: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise StartupError(f"LABELS_DIR: {file}, line {number}: {exc}") from None
    if not isinstance(row, dict):
        raise StartupError(f"LABELS_DIR: {file}, line {number}: not an object")
    return row


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as exc:
        raise StartupError(f"LABELS_DIR: {file} cannot be read: {exc}") from exc


def _take(
    row: Row,
    file: Path,
    folder: Path,
    model_names: Collection[str],
    found: Mapping[str, _Collected],
    left_out: Counter[str],
) -> None:
    model = _first(row, "model", "modelId")
    source = _source(row, file, folder, found)
    if source not in found or (model is not None and model not in model_names):
        left_out[f"{model}/{source}" if model is not None else str(source)] += 1
        return
    one = found[source]
    index = _index(row, one.n_features, source)
    label = _first(row, "label", "description")
    if label is not None and not isinstance(label, str):
        raise _BadRow(f"the label {label!r:.40} is not text")
    if label:
        one.labels[index].append(label)
    for name, theirs in NUMBERS.items():
        value = _first(row, name, theirs)
        if value is not None:
            one.numbers[name][index] = _number(value, name)
    listed = row.get("contexts") or ([row] if row.get("tokens") else [])
    kept = sorted([*one.contexts.pop(index, []), *map(_context, listed)], key=lambda context: -max(context.values))
    if kept:
        one.contexts[index] = kept[:MOST_CONTEXTS]


def _first(row: Row, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _source(row: Row, file: Path, folder: Path, found: Mapping[str, _Collected]) -> str:
    named = _first(row, "source", "layer")
    if named is not None:
        return str(named)
    parts = file.relative_to(folder).parts
    places = [file.name.partition(".")[0], *reversed(parts[:-1]), folder.name]
    return next((place for place in places if place in found), places[0])


def _index(row: Row, n_features: int, source: str) -> int:
    index = row.get("index")
    if isinstance(index, str) and index.isascii() and index.isdecimal():
        index = int(index[:20])
    if isinstance(index, bool) or not isinstance(index, int):
        raise _BadRow(f"index: {index!r:.40} is not the number of a feature")
    if not 0 <= index < n_features:
        raise _BadRow(f"index: {index} is out of range for {source}, which has {n_features} features")
    return index


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _BadRow(f"{name}: {value!r:.40} is not a number from 0 on")
    return float(value)


def _context(body: Any) -> Context:
    tokens, values = (body.get("tokens"), body.get("values")) if isinstance(body, Mapping) else (None, None)
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values) or not tokens:
        raise _BadRow("a context needs `tokens` and as many `values`")
    if not all(isinstance(token, str) for token in tokens):
        raise _BadRow("the tokens of a context are not all text")
    origin = body.get("from")
    return Context(tuple(tokens), tuple(_finite(value) for value in values), None if origin is None else str(origin))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _BadRow(f"{value!r:.40} in the values of a context is not a finite number")
    return float(value)


def _annotations(one: _Collected, known: SourceAnnotations | None) -> SourceAnnotations:
    """What the files say, and for the rest what was known before."""
    before = known or SourceAnnotations.of_labels([""] * one.n_features)
    labels = list(before.labels)
    others = dict(before.other_labels)
    for index, given in one.labels.items():
        labels[index] = given[0]
        others.pop(index, None)
        if len(given) > 1:
            others[index] = tuple(given[1:])
    columns = {"density": before.density, "max": before.maximum, "mean": before.mean}
    density, maximum, mean = (_filled(columns[name], one.numbers[name]) for name in NUMBERS)
    return SourceAnnotations(labels, density, maximum, mean, others, _with(one.contexts, before.read_contexts))


def _filled(column: Any, values: Mapping[int, float]) -> Any:
    filled = np.array(column, np.float64)
    filled[list(values.keys())] = list(values.values())
    return filled


def _with(
    contexts: Mapping[int, Sequence[Context]], before: Callable[[], Mapping[int, bytes]]
) -> Callable[[], Mapping[int, bytes]]:
    stored = {index: stored_contexts(given) for index, given in contexts.items()}
    return lambda: {**before(), **stored}
