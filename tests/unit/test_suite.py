"""What the tests promise: they leave nothing in the cache folder of the one who runs them, nor for each other."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuronpedia_inference.embedded.weights import CACHE_VARIABLE, default_cache_dir, model_folder, weights_available
from neuronpedia_inference.garbage import settle
from neuronpedia_inference.observability import PACKAGE, start_logging
from neuronpedia_inference.settings import Settings
from tests.conftest import PREFIX

ROOT = Path(__file__).resolve().parents[2]


def test_the_run_has_a_cache_of_its_own_with_the_weights_that_are_there() -> None:
    own = default_cache_dir()
    assert own == Path(os.environ[CACHE_VARIABLE])
    assert own.name.startswith(PREFIX)
    if weights_available():
        assert (own / model_folder().name).is_symlink()


def test_it_holds_nothing_that_was_measured_and_is_gone_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "products-0.json").write_text("{}")
    (tmp_path / "sae-directory-0.json").write_text("{}")
    code = "import json, os; from tests.conftest import CACHE; print(json.dumps([os.listdir(CACHE), str(CACHE)]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), CACHE_VARIABLE: str(tmp_path)}
    shared = model_folder()
    (tmp_path / shared.name).symlink_to(shared, target_is_directory=True)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    held, folder = json.loads(done.stdout)
    assert sorted(held) == sorted([shared.name, "sae-directory-0.json"])
    assert not Path(folder).exists()
    assert (shared / "config.json").is_file()


@pytest.mark.parametrize("nth", [1, 2])
def test_each_begins_as_in_a_fresh_process(nth: int, caplog: pytest.LogCaptureFixture) -> None:
    """The first leaves for the second what commands in this process leave."""
    import torch

    assert (torch.get_num_threads(), gc.get_freeze_count()) == (1, 0)
    root = logging.getLogger()
    assert PACKAGE not in [handler.get_name() for handler in root.handlers]
    caplog.set_level(logging.INFO)
    logging.getLogger(PACKAGE).info("heard")
    assert caplog.messages == ["heard"]
    start_logging(Settings.read(log_level="error"))
    assert root.level == logging.getLogger(PACKAGE).level == logging.ERROR
    torch.set_num_threads(2)
    settle()
