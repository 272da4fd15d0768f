"""The study of steering: what it asks is valid, what it counts is right, and its page shows what it has measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from neuronpedia_inference import embedded
from neuronpedia_inference.operations import by_name, validate

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("steering_study", ROOT / "examples" / "steering_study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


study: Any = load()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(study.RESULTS.read_text(encoding="utf-8"))


def test_its_features_are_the_documented_ones() -> None:
    documented = {f"{one.source}/{one.index}" for one in embedded.steering_examples()}
    assert set(study.SUBJECTS) == documented
    for feature in study.SUBJECTS:
        source, _, index = feature.rpartition("/")
        label = embedded.labels(source)[int(index)]
        assert study.effect(label, feature) > 0.5, "most words of its label are of its subject"


def test_what_it_asks_is_valid() -> None:
    norms = dict.fromkeys(embedded.SOURCES, 100.0)
    bodies = [case.body(norms) for case in study.cases()]
    for body in bodies:
        validate(by_name["steer"], body)
    amounts = [edit["amount"] for body in bodies for edit in body["edits"] if edit.get("unit") is None]
    assert (min(amounts), max(amounts)) == (10.0, 80.0), "shares of the norm"
    assert len({case.key for case in study.cases()}) == len(bodies)


def test_words_of_the_subject_are_counted() -> None:
    economy = "15-res-4k/1113"
    assert study.effect("The economy of the industrial country", economy) == pytest.approx(2 / 6)
    assert study.effect(" that you can have it", economy) == 0.0
    assert study.effect("", economy) == 0.0


def test_the_results_are_of_all_cases(results: dict[str, Any]) -> None:
    assert results["n_texts"] == len(list(study.cases()))
    assert [kind["kind"] for kind in results["kinds"]] == [kind.name for kind in study.KINDS]
    for kind, asked in zip(results["kinds"], study.KINDS, strict=True):
        assert [one["strength"] for one in kind["strengths"]] == list(asked.strengths)
        assert all(set(one["features"]) == set(study.SUBJECTS) for one in kind["strengths"])


def test_page_and_picture_are_drawn_from_the_results(results: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "steering.svg").read_text(encoding="utf-8") == study.svg(results)
    page = (ROOT / "docs" / "steering.md").read_text(encoding="utf-8")
    assert study.drawn(results, page) == page
    assert all(table in page for table in study.tables(results).values())


@pytest.mark.long
def test_it_runs_and_goes_on_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "NEW_TOKENS", 6)
    monkeypatch.setattr(study, "PROMPTS", study.PROMPTS[1:2])
    monkeypatch.setattr(study, "SUBJECTS", {"15-res-4k/1113": study.SUBJECTS["15-res-4k/1113"]})
    monkeypatch.setattr(study, "KINDS", [study.Kind("dose", (0.1, 0.4), "", {"do": "add", "unit": "dose"}, "one")])
    study.run(tmp_path)
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    (tmp_path / "texts.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    study.run(tmp_path)
    assert (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines() == lines
    weak, strong = study.summed(tmp_path)["kinds"][0]["strengths"]
    assert weak["effect"] < strong["effect"]
    assert weak["cost"] < strong["cost"]
