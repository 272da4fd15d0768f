"""Every fault that an attack or a new user has found, tried on this tree; `benchmarks.fire` tries others too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.fire import Probe, probes
from benchmarks.fire_tree import Tree
from benchmarks.process import ROOT

PROBES = [pytest.param(part, probe, id=probe.__name__) for part, probe in probes()]


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
