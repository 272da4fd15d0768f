"""What the tests themselves promise: they leave nothing in the cache folder of the one who runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from neuronpedia_inference.embedded.weights import CACHE_VARIABLE, default_cache_dir, model_folder, weights_available
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
