"""The notebooks that need no account: they run from top to bottom, and show what is committed with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_own_client import Shared

import neuronpedia_inference as ni
from neuronpedia_inference.client import Client
from neuronpedia_inference.client.in_process import InProcess
from neuronpedia_inference.runtime import Runtime
from tests.rounding import drawn_differences

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def outputs(notebook: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The source of each cell, and what it shows: the kind, and the text."""
    return [
        ("".join(cell["source"]), kind, "".join(text))
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for kind, text in output.get("data", {"stdout": output.get("text")}).items()
    ]


def client_of(runtime: Runtime) -> Client:
    shared: Any = Shared(runtime)
    return Client(InProcess(shared))


def ran(name: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the cells of a notebook assign, after what they show was held against what is committed."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import run_notebooks

    monkeypatch.setattr(ni, "load", lambda: client_of(runtime), raising=False)
    space: dict[str, Any] = {}
    committed = run_notebooks.read(name)
    found, expected = outputs(run_notebooks.run(committed, space)), outputs(committed)
    again = "they are written by scripts/run_notebooks.py"
    assert [(source, kind) for source, kind, _ in found] == [(source, kind) for source, kind, _ in expected], again
    for (source, _, text), (_, _, wanted) in zip(found, expected, strict=True):
        assert drawn_differences(text, wanted) == [], f"{again}: {source}"
        assert "http" not in text.lower(), "what is shown fetches nothing"
    assert len([kind for _, kind, _ in found if kind == "text/html"]) >= 8
    return space


def test_the_first_notebook_steers_with_an_effect_one_sees(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ran("laptop.ipynb", runtime, monkeypatch)
    both = space["both"]
    assert "econom" in both.steered.text
    assert "econom" not in both.default.text
    assert [cell.text for cell in space["sweep"]] != [both.default.text] * 4


def test_the_notebook_of_research_does_what_it_says(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ran("research.ipynb", runtime, monkeypatch)
    war, clamped, conditioned = space["war"], space["clamped"], space["conditioned"]
    assert "war" in war.label
    assert space["sweep"].suggested[0] is not None
    assert "war" in clamped.steered.text
    assert clamped.steered.text != clamped.default.text == conditioned.steered.text
    with client_of(runtime) as m:
        assert war.name in {one.name for one in m.search("military army war", limit=5)}, "both ways lead to it"
        difference = m.mean_difference(space["armies"], space["others"], space["point"])
    assert space["own"].vector == pytest.approx(difference.vector, rel=1e-4, abs=1e-4)
    assert (space["n_first"], space["n_again"]) == (10, 1)
    fired = dict(zip(space["table"]["text"], space["table"]["war"], strict=True))
    assert min(fired[text] for text in space["armies"]) > max(fired[text] for text in space["others"])


@pytest.mark.parametrize("name", ["laptop.ipynb", "research.ipynb"])
def test_a_notebook_as_a_page_has_every_cell_and_fetches_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import run_notebooks

    notebook = run_notebooks.read(name)
    page = run_notebooks.page(notebook)
    assert page.count('class="code"') == len([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    assert "<script" not in page
    assert "src=" not in page
    assert json.dumps(notebook).count("text/html") == page.count('<div class="shown"')
