"""The benchmarks' document: rendered from the result, from all of it, and from nothing else."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.acceptance import judged
from benchmarks.cases import EVERYBODY, FLOOR, cases

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def rendering(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("render_benchmarks")


def table(head: Any, rows: Any) -> str:
    return "\n".join("|".join(line) for line in [head, *rows])


@pytest.fixture
def body(rendering: ModuleType) -> dict[str, Any]:
    return json.loads(rendering.RESULTS.read_text(encoding="utf-8"))


def test_the_documents_are_rendered_from_the_result(rendering: ModuleType) -> None:
    render_docs = importlib.import_module("render_docs")
    for path, text in rendering.documents(render_docs.table):
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python scripts/render_docs.py"
    assert set(render_docs.documents()) >= set(rendering.documents(render_docs.table))


def test_the_result_has_every_case_and_promise(body: dict[str, Any]) -> None:
    assert [(one["name"], one["title"]) for one in body["cases"]] == [(case.name, case.title) for case in cases()]
    assert [line["promise"] for line in body["acceptance"]] == [line["promise"] for line in judged({}, {})]
    assert set(body["versions"]) <= set(EVERYBODY)


def test_rendering_needs_neither_torch_nor_the_models() -> None:
    program = (
        "import sys; sys.path.insert(0, 'scripts'); import render_benchmarks\n"
        "assert len(list(render_benchmarks.documents(lambda head, rows: str(rows)))) == 2\n"
        "assert not {'torch', 'transformers', 'numpy', 'neuronpedia_inference'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_case_without_a_time_says_why(rendering: ModuleType, body: dict[str, Any]) -> None:
    changed = copy.deepcopy(body)
    (case,) = (one for one in changed["cases"] if one["name"] == "feature_15")
    case["results"]["http"] = {"disagrees": "prompt 1: off by 3"}
    page = rendering.page(changed, table)
    row = next(line for line in page.splitlines() if line.startswith(f"{case['title']}|"))
    assert "disagrees" in row
    assert f"**over HTTP**, disagrees: prompt 1: off by 3 ({case['title']})" in page


def test_a_peer_that_was_left_out_is_not_hidden(rendering: ModuleType, body: dict[str, Any]) -> None:
    changed = copy.deepcopy(body)
    changed["peer_left_out"] = "left out of this run (`--without-peer`)"
    assert "interp-engine was left out of this run" in rendering.page(changed, table)


@pytest.mark.parametrize(("ratio", "kept"), [(1.6, "yes"), (1.601, "**no**")])
def test_what_one_benchmark_promises_is_held_against_its_bound(rendering: ModuleType, ratio: float, kept: str) -> None:
    results = {
        name: json.loads(rendering.RESULTS.with_name(f"{name}.json").read_text(encoding="utf-8"))
        for name in rendering.SINGLE
    }
    results["lens"]["over_needed"]["lens"]["ratio"] = ratio
    page = rendering.single_page(results, table)
    [row] = [line for line in page.splitlines() if "benchmarks.lens" in line]
    assert row.split("|")[2:4] == ["at most 1.6", kept]
    for name, result in results.items():
        rows = [line for line in page.splitlines() if f"`python -m benchmarks.{name}`" in line]
        assert rows
        assert all(result["machine"]["date"] in row for row in rows)


def test_bars_are_as_long_as_the_ratios(rendering: ModuleType, body: dict[str, Any]) -> None:
    """Read back from the drawing: every timed contender has one bar, in the scale of the axis."""
    tree = ElementTree.fromstring(rendering.plot(body))
    gridlines = tree.findall(f"{SVG}line")
    zero, one = (float(line.attrib["x1"]) for line in gridlines[:2])
    top = float(gridlines[0].attrib["y1"])
    bars = [rect for rect in tree.findall(f"{SVG}rect") if float(rect.attrib["y"]) > top]
    expected = [
        result["to_floor"]
        for case in body["cases"]
        for name, result in case["results"].items()
        if name != FLOOR and "to_floor" in result
    ]
    lengths = sorted(float(bar.attrib["width"]) / (one - zero) for bar in bars)
    assert lengths == pytest.approx(sorted(expected), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["--help"], 0, "usage: python -m benchmarks.sweeps"), (["--rounds", "0"], 2, "at least one round is needed")],
)
def test_what_a_sweep_takes_is_measured_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    sweeps = importlib.import_module("benchmarks.sweeps")
    monkeypatch.setattr(sys, "argv", ["sweeps", *arguments])
    monkeypatch.setattr(sweeps, "Runtime", None)
    with pytest.raises(SystemExit) as ended:
        sweeps.main()
    assert ended.value.code == code
    told = capsys.readouterr()
    assert says in told.out + told.err
