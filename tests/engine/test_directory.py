"""SAELens's directory, read without SAELens, says what SAELens says."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from neuronpedia_inference.saes import directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    directory.releases.cache_clear()
    yield tmp_path
    directory.releases.cache_clear()


def test_it_agrees_with_saelens(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    for _ in ("from the original", "from the copy"):
        ours = directory.releases()
        assert list(ours) == list(theirs)
        for name, about in theirs.items():
            found = (ours[name].model, ours[name].repo, ours[name].paths, ours[name].neuronpedia_ids)
            assert found == (about.model, about.repo_id, about.saes_map, about.neuronpedia_id)
        (copy,) = cache.iterdir()
        assert copy.suffix == ".json"
        directory.releases.cache_clear()


def test_a_broken_copy_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = directory.releases()
    (copy,) = cache.iterdir()
    good = copy.read_text()
    monkeypatch.setattr(directory, "_rows", lambda source: json.loads(good))  # parsing it takes seconds
    for broken in (good[:1000], "{}", "[]", "3", '{"a": 1}', '{"a": ["m", "r", {"x": "y"}, {}]}'):
        copy.write_text(broken)
        directory.releases.cache_clear()
        assert directory.releases() == whole
        assert copy.read_text() == good


def test_a_folder_that_cannot_be_written_to_is_no_fault(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "file" / "below"))
    assert "gpt2-small-res-jb" in directory.releases()


def test_finding_the_sources_of_a_model_imports_neither_saelens_nor_torch() -> None:
    program = (
        "import sys; from neuronpedia_inference.saes.catalogue import offered; assert offered('gpt2-small'); "
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
