"""What is found out at start is kept for the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neuronpedia_inference import loading
from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from neuronpedia_inference.engine import linear
from neuronpedia_inference.settings import Settings
from tests import models


def test_products_are_timed_once_for_a_kind_of_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    models.save("llama", tmp_path / "model")
    timed: list[int] = []
    fastest = linear._fastest
    monkeypatch.setattr(linear, "_fastest", lambda layers: timed.append(len(layers)) or fastest(layers))
    settings = Settings.read(model_id=str(tmp_path / "model"), sae_sets=(), num_threads=1)

    def start(settings: Settings) -> None:
        loading.load(settings, lambda line: None)

    start(settings)
    (kept,) = (tmp_path / "cache").glob("products-*.json")
    names = json.loads(kept.read_text())
    assert len(timed) == 1
    start(settings)
    assert (len(timed), json.loads(kept.read_text())) == (1, names)
    start(settings.model_copy(update={"num_threads": 2}))
    assert len(timed) == 2
    for broken in ("{", "[]", '{"1x1": 3}'):
        kept.write_text(broken)
        start(settings)
        assert json.loads(kept.read_text()).keys() == names.keys()
    assert len(timed) == 5


def test_a_second_start_imports_neither_transformer_lens_nor_saelens(tmp_path: Path) -> None:
    """The first has kept what they say. SAEs: test_saes_plain.py."""
    settings = Settings.read(model_id=str(models.save("llama", tmp_path)), sae_sets=(), num_threads=1)
    loading.load(settings, lambda line: None)
    program = (
        "import sys\n"
        "from neuronpedia_inference import loading\n"
        "from neuronpedia_inference.settings import Settings\n"
        "loading.load(Settings.read(model_id=sys.argv[1], sae_sets=(), num_threads=1), lambda line: None)\n"
        "print(*sorted({'transformer_lens', 'sae_lens', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
