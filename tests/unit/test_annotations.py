"""Files of LABELS_DIR, in our own form and in Neuronpedia's, and the search over what they say."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from neuronpedia_inference.annotations import Context, Searcher, SourceAnnotations, read_folder
from neuronpedia_inference.errors import InvalidRequest, StartupError

SERVED = {"3-res": 4, "4-res": 4}
NAMES = ("tiny", "org/tiny")
MOON = {"tokens": ["The", " moon", " rose"], "values": [0, 7.5, 1], "from": "A book"}


def write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows in the form that the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
        return path
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(folder: Path, known: Mapping[str, SourceAnnotations] | None = None) -> dict[str, SourceAnnotations]:
    return read_folder(folder, SERVED, NAMES, known or {})


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.parquet"])
def test_our_own_form(tmp_path: Path, name: str) -> None:
    contexts = [{"tokens": ["a"], "values": [2.0], "from": None}, MOON]
    rows = [
        {
            "source": "3-res",
            "index": 2,
            "label": "moon",
            "density": 0.25,
            "max": 9.0,
            "mean": 3.5,
            "contexts": contexts,
        },
        {"source": "4-res", "index": 0, "label": "sun", "density": None, "max": None, "mean": None, "contexts": None},
    ]
    write(tmp_path, name, rows)

    found = read(tmp_path)

    assert found.keys() == SERVED.keys()
    moon = found["3-res"]
    assert list(moon.labels) == ["", "", "moon", ""]
    assert (moon.density[2], moon.maximum[2], moon.mean[2]) == (0.25, 9.0, 3.5)
    assert all(np.isnan(column[3]) for column in (moon.density, moon.maximum, moon.mean)), "unknown is not zero"
    strongest = Context(("The", " moon", " rose"), (0.0, 7.5, 1.0), "A book")
    assert moon.contexts(2) == (strongest, Context(("a",), (2.0,)))
    assert moon.contexts(0) == ()
    assert math.isnan(found["4-res"].density[0])


def test_neuronpedia_s_export_as_it_is(tmp_path: Path) -> None:
    of = {"modelId": "tiny", "layer": "3-res"}
    write(
        tmp_path,
        "tiny/3-res/explanations/batch-0.jsonl.gz",
        [
            {**of, "id": "a", "index": "1", "description": "moons", "typeName": "oai_token-act-pair"},
            {**of, "id": "b", "index": "1", "description": "planets and moons"},
        ],
    )
    write(
        tmp_path,
        "tiny/3-res/features/batch-0.jsonl.gz",
        [{**of, "index": "1", "maxActApprox": 31.5, "frac_nonzero": 0.002}],
    )
    activations = [
        {**of, "index": "1", "tokens": ["x", "y"], "values": [1.0, 0.0], "maxValue": 1.0, "dataIndex": "7"},
        {**of, "index": "1", "tokens": ["m", "n"], "values": [0.0, 5.0], "maxValue": 5.0},
    ]
    write(tmp_path, "tiny/3-res/activations/batch-0.jsonl.gz", activations)

    one = read(tmp_path)["3-res"]

    assert one.labels_of(1) == ("moons", "planets and moons")
    assert (one.maximum[1], one.density[1]) == (31.5, 0.002)
    assert [context.tokens for context in one.contexts(1)] == [("m", "n"), ("x", "y")]


def test_the_source_may_be_the_name_of_file_or_folder(tmp_path: Path) -> None:
    write(tmp_path, "3-res.jsonl", [{"index": 0, "label": "file"}])
    write(tmp_path, "4-res/some.jsonl", [{"index": 1, "label": "folder"}])
    found = read(tmp_path)
    assert (found["3-res"].labels[0], found["4-res"].labels[1]) == ("file", "folder")


def test_files_win_over_what_was_known_and_leave_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "3-res.jsonl", [{"index": 1, "label": "mine", "max": 8}])
    column = np.ones(4, np.float64)
    contexts = {1: json.dumps([MOON]).encode()}
    before = SourceAnnotations(("a", "b", "c", "d"), column, column, column, read_contexts=lambda: contexts)
    one = read(tmp_path, {"3-res": before})["3-res"]
    assert list(one.labels) == ["a", "mine", "c", "d"]
    assert one.maximum.tolist() == [1, 8, 1, 1]
    assert one.contexts(1)[0].origin == "A book"
    assert before.maximum.tolist() == [1, 1, 1, 1], "what was known is as it was"


def test_rows_of_others_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"source": "3-res", "index": 0, "label": "a"}, {"source": "9-res", "index": 77, "label": "b"}]
    write(tmp_path, "rows.jsonl", [*rows, {"source": "3-res", "model": "other", "index": 9, "label": "c"}])
    with caplog.at_level(logging.WARNING):
        assert list(read(tmp_path)) == ["3-res"]
    assert "2 rows are left out, of 9-res, other/3-res" in caplog.text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": "x"}, "row 2: index: None is not the number of a feature"),
        ({"index": True}, "index: True is not"),
        ({"index": "-1"}, "index: '-1' is not"),
        ({"index": 4}, "index: 4 is out of range for 3-res, which has 4 features"),
        ({"index": 0, "label": 5}, "the label 5 is not text"),
        ({"index": 0, "density": -0.5}, "density: -0.5 is not a number from 0 on"),
        ({"index": 0, "max": "9"}, "max: '9' is not a number"),
        ({"index": 0, "maxActApprox": float("nan")}, "max: nan is not a number"),
        ({"index": 0, "contexts": [{"tokens": ["a"], "values": []}]}, "a context needs `tokens` and as many `values`"),
        ({"index": 0, "contexts": [5]}, "a context needs"),
        ({"index": 0, "tokens": [1], "values": [1]}, "the tokens of a context are not all text"),
        ({"index": 0, "tokens": ["a"], "values": [float("inf")]}, "inf in the values of a context is not a finite"),
    ],
)
def test_a_bad_row_stops_the_start_and_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    file = write(tmp_path, "3-res.jsonl", [{"index": 0, "label": "good"}, row])
    with pytest.raises(StartupError) as refused:
        read(tmp_path)
    assert says in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("3-res.jsonl", b'{"index": 0}\n{oh\n', "line 2"),
        ("3-res.jsonl", b"[1]\n", "line 1: not an object"),
        ("3-res.jsonl", b"\xff\xfe\n", "cannot be read"),
        ("3-res.jsonl.gz", b"not gzip", "cannot be read"),
        ("3-res.parquet", b"not parquet", "cannot be read"),
        ("notes.txt", b"", "no .jsonl, .jsonl.gz, .parquet files"),
        ("9-res.jsonl", b'{"index": 0, "label": "x"}\n', "nothing in"),
    ],
)
def test_a_bad_file_stops_the_start_and_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match="LABELS_DIR") as refused:
        read(tmp_path)
    assert says in str(refused.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    with pytest.raises(StartupError, match=r"LABELS_DIR: there is no folder .*lables'. Did you mean '.*labels'"):
        read(tmp_path / "lables")


def searcher() -> Searcher:
    contexts = {2: json.dumps([MOON]).encode()}
    column = np.ones(3, np.float64)
    one = SourceAnnotations(("courts and judges", "cats", ""), column, column, column, read_contexts=lambda: contexts)
    return Searcher({"a": one, "b": SourceAnnotations.of_labels(("a judge", "of the"))})


def test_words_are_found_in_labels_and_contexts_by_their_stems() -> None:
    assert [(one.source, one.index) for one in searcher().search("moons", ["a", "b"], 5)] == [("a", 2)]
    assert {(one.source, one.index) for one in searcher().search("the judging", ["a", "b"], 5)} == {("a", 0), ("b", 0)}
    assert [one.source for one in searcher().search("judge", ["b"], 5)] == ["b"]
    assert len(searcher().search("judge cats moon", ["a", "b"], 2)) == 2
    assert searcher().search("submarine", ["a", "b"], 5) == []
    assert searcher().search("judge", ["unknown"], 5) == []


def test_a_query_without_words_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="has no words to look for"):
        searcher().search("of the", ["a"], 5)


def test_the_documented_row_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "labels.md").read_text(encoding="utf-8")
    row = json.loads(page.partition("```json\n")[2].partition("```")[0])
    write(tmp_path, "rows.jsonl", [row])
    one = read_folder(tmp_path, {row["source"]: 4096}, (), {})[row["source"]]
    assert (one.labels[1113], one.density[1113]) == (row["label"], row["density"])
    assert one.contexts(1113)[0].tokens == tuple(row["contexts"][0]["tokens"])


def test_what_is_peculiar_by_hand() -> None:
    density = np.array([0.01, 0.1, np.nan, 0.01, 0.0, 1.0], np.float64)
    maximum = np.array([50.0, 50.0, 50.0, np.nan, 50.0, 50.0], np.float64)
    one = SourceAnnotations([""] * 6, density, maximum, maximum)
    assert one.peculiarity[:2].tolist() == pytest.approx([2 / 50, 1 / 50])
    assert one.peculiarity[2:].tolist() == pytest.approx([1e-12] * 4)
