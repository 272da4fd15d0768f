"""The comparison: what it asks is what its titles say, what it finds is judged rightly, the floor is what it says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceptance import PROMISES, judged
from benchmarks.agreement import difference
from benchmarks.cases import Case, Generate, OneFeature, cases
from benchmarks.compare import compared
from benchmarks.process import Child, ChildFailed, Process
from benchmarks.wire import requests_of
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.operations import by_name, validate

ROOT = Path(__file__).resolve().parents[2]


def by_case(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


# What is asked


def test_titles_count_tokens_rightly() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))

    def lengths(name: str) -> set[int]:
        work = by_case(name).work
        texts = work.texts if isinstance(work, OneFeature) else [work.text]  # pyright: ignore[reportAttributeAccessIssue]
        return {1 + len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts}

    assert lengths("full_forward") == lengths("feature_10") == lengths("feature_15") == {19}
    assert lengths("feature_long") == lengths("all_features") == {177}
    assert lengths("features_serial") == lengths("features_together") == {16, 17, 18, 19}
    assert all(495 <= n <= 505 for n in lengths("long_serial") | lengths("long_together"))


def test_eight_steers_have_eight_vectors_at_three_layers() -> None:
    alone, together = by_case("steers_serial"), by_case("steers_together")
    assert alone.work == together.work
    assert (alone.at_a_time, together.at_a_time) == (1, 8)
    assert isinstance(alone.work, Generate)
    assert len({prompt.steer.vector for prompt in alone.work.prompts}) == 8
    assert {prompt.steer.layer for prompt in alone.work.prompts} == {10, 15, 20}


def test_every_request_is_one_that_the_project_takes() -> None:
    for case in cases():
        if "in_process" in case.who:
            operation, bodies = requests_of(case.line())
            for body in bodies:
                validate(by_name[operation], body)


def test_the_peer_shares_the_versions_of_the_project() -> None:
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))

    own, peer = pins(ROOT / "constraints.txt"), pins(ROOT / "benchmarks" / "peer-constraints.txt")
    assert {"torch", "transformers", "interp-engine"} <= peer.keys()
    assert {name: peer[name] for name in peer.keys() & own.keys()} == {
        name: own[name] for name in peer.keys() & own.keys()
    }


# Who agrees


@pytest.mark.parametrize(
    ("kind", "answer", "floor", "said"),
    [
        ("OneFeature", [[1.0, 2.0019]], [[1.0, 2.0]], None),
        ("OneFeature", [[1.0, 2.0021]], [[1.0, 2.0]], "prompt 1: off by 0.0021"),
        ("OneFeature", [[1.0, float("nan")]], [[1.0, 2.0]], "prompt 1: off by nan"),
        ("OneFeature", [[1.0]], [[1.0, 2.0]], "prompt 1: 1 values instead of 2"),
        ("AllFeatures", [[10, 1, [3.0]], [15, 2, [3.0]]], [[15, 2, [3.0]], [10, 1, [3.0]]], None),
        ("AllFeatures", [[10, 1, [3.0]]], [[15, 1, [3.0]]], "features [(10, 1)] instead of [(15, 1)]"),
        ("AllFeatures", [[10, 1, [2.0]], [15, 2, [3.0]]], [[15, 2, [3.0]], [10, 1, [2.0]]], "not in order"),
        ("Generate", [["a"], ["b", "c"]], [["a"], ["b", "c"]], None),
        (
            "Generate",
            [["a"], ["b", "cat"]],
            [["a"], ["b", "cut"]],
            "text 3 differs from character 1: 'at' instead of 'ut'",
        ),
        ("Generate", [["ab"]], [["abc"]], "text 1 differs from character 2: '' instead of 'c'"),
        ("FirstToken", " a", " b", "the token differs from character 1"),
    ],
)
def test_what_differs_is_named(kind: str, answer: Any, floor: Any, said: str | None) -> None:
    found = difference(kind, answer, floor)
    assert found is None if said is None else found is not None and said in found


def test_a_floor_that_finds_nothing_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        difference("OneFeature", [[0.0]], [[0.0]])


class Scripted:
    """A contender that always gives the same answer, and remembers in `asked` when it was its turn."""

    def __init__(self, name: str, reply: dict[str, Any], asked: list[str]) -> None:
        self._name, self._reply, self._asked = name, reply, asked

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        self._asked.append(self._name)
        return copy.deepcopy(self._reply)

    def close(self) -> None: ...


def test_who_disagrees_is_not_timed_and_the_others_take_turns() -> None:
    right, wrong = {"ms": [5.0], "answer": [[1.0]]}, {"ms": [1.0], "answer": [[2.0]]}
    asked: list[str] = []
    replies = {"http": right, "in_process": wrong, "plain": right, "peer": {"not_offered": "no"}}
    contenders = {name: Scripted(name, reply, asked) for name, reply in replies.items()}
    found = compared([by_case("feature_10")], contenders, rounds=2)
    results = {name: measured.as_json() for (_, name), measured in found.items()}
    assert results["http"] == {"ms": 5.0, "min_ms": 5.0, "max_ms": 5.0, "samples": 2}
    assert results["in_process"] == {"disagrees": "prompt 1: off by 1, where the largest value is 1"}
    assert results["peer"] == {"not_offered": "no"}
    # The floor answers first, so that the others can be compared; then who begins changes.
    assert asked == ["plain", "http", "in_process", "peer", "http", "plain", "plain", "http"]


def test_without_the_floor_s_answer_nobody_is_timed() -> None:
    asked: list[str] = []
    replies = {"http": {"ms": [5.0], "answer": [[1.0]]}, "plain": {"failed": "no memory"}}
    contenders = {name: Scripted(name, reply, asked) for name, reply in replies.items()}
    found = compared([by_case("feature_10")], contenders, rounds=1)
    assert found["feature_10", "http"].as_json() == {"failed": "the floor has no answer to compare with"}
    assert asked == ["plain", "http"]


# What is promised


def lines(medians: dict[str, dict[str, float]], answers: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    return {(line["promise"], line["contender"]): line for line in judged(medians, answers)}


def test_promises_are_about_cases_that_exist() -> None:
    known = {case.name for case in cases()}
    assert {name for promise in PROMISES for name in (promise.above, promise.below)} <= known


def test_promises_divide_the_right_medians() -> None:
    medians = {
        "steers_serial": {"http": 500.0, "plain": 360.0},
        "steers_together": {"http": 100.0, "plain": 100.0},
        "feature_10": {"http": 46.0, "plain": 40.0},
        "features_together": {"http": 70.0, "in_process": 60.0, "plain": 100.0},
        "full_forward": {"plain": 100.0},
    }
    found = lines(medians, {})
    assert (found["1", "http"]["value"], found["1", "http"]["met"], found["1", "http"]["plain"]) == (5.0, True, 3.6)
    assert (found["3", "http"]["value"], found["3", "http"]["met"], found["3", "http"]["plain"]) == (0.46, False, 0.4)
    assert (found["2 batch", "http"]["value"], found["2 batch", "http"]["met"]) == (0.7, False)
    assert (found["2 batch", "in_process"]["value"], found["2 batch", "in_process"]["met"]) == (0.6, True)


def test_what_was_not_measured_is_not_kept() -> None:
    found = lines({}, {})
    assert all(line["value"] is None and not line["met"] for line in found.values())


def test_together_must_say_what_alone_says() -> None:
    answers = {
        ("steers_serial", "http"): [["a"], ["b"]],
        ("steers_together", "http"): [["a"], ["c"]],
        ("features_serial", "http"): [[1.0, 2.0]],
        ("features_together", "http"): [[1.0, 2.001]],
    }
    found = lines({}, answers)
    assert (found["1 texts", "http"]["value"], found["1 texts", "http"]["met"]) == (1, False)
    assert found["2 numbers", "http"]["value"] == pytest.approx(0.001)
    assert not found["2 numbers", "http"]["met"]


# Who works


def test_a_process_that_ends_says_its_last_words() -> None:
    process = Process("benchmarks.no_such_contender")
    with pytest.raises(ChildFailed, match="No module named benchmarks.no_such_contender"):
        Child(process)
    process.close()
