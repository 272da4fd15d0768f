"""Every fault that an attack or a new user has found, tried on this tree; `benchmarks.fire` tries others too."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmarks.fire import RESULTS, Probe, probes
from benchmarks.fire_tree import Tree
from benchmarks.process import ROOT

PROBES = [pytest.param(part, probe, id=probe.__name__) for part, probe in probes()]
AS_BEFORE = "232fc0c does so too"
"""What a probe says of itself that the earlier tree passes."""


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    made = Tree(ROOT)
    yield made
    made.close()


@pytest.mark.long
@pytest.mark.parametrize(("part", "probe"), PROBES)
def test_it_holds_under_fire(tree: Tree, part: int, probe: Probe) -> None:
    assert probe.__doc__
    assert probe(tree), f"part {part} says nothing of what it saw"


def test_every_probe_was_seen_to_fail_before_and_to_hold_now() -> None:
    """But those that say that they only keep what was there."""
    tables = json.loads(RESULTS.read_text(encoding="utf-8"))
    held = {which: {row["name"]: row["holds"] for row in table["probes"]} for which, table in tables.items()}
    assert held["this tree"] == {probe.__name__: True for _, probe in probes()}
    assert held["before"] == {probe.__name__: AS_BEFORE in (probe.__doc__ or "") for _, probe in probes()}
    assert {row["commit"] for row in tables["before"]["probes"]} == {"232fc0c"}
