"""Folders that are not there, in every setting that takes one: one line with the near name."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuronpedia_inference import downloads
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.catalogue import resolve
from neuronpedia_inference.settings import Settings


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "7-mine").mkdir()
    (tmp_path / "notes").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model_id": "./my-modle"}, r"MODEL_ID: there is no folder 'my-modle'. Did you mean 'my-model'\?"),
        ({"model_id": "../elsewhere/x"}, r"MODEL_ID: there is no folder '../elsewhere/x'."),
        ({"model_id": "./notes"}, "MODEL_ID: 'notes' is a file, not a folder."),
        ({"custom_hf_model_id": "./my-modle"}, r"CUSTOM_HF_MODEL_ID: there is no folder 'my-modle'. Did .*"),
        ({"model_id": "~nobody-of-this-name/x"}, "MODEL_ID: '~nobody-of-this-name/x': there is no such user's home .*"),
        ({"local_sae_dir": "~nobody-of-this-name"}, "LOCAL_SAE_DIR: .* no such user's home folder."),
        ({"sae_sets": "~nobody-of-this-name/x"}, "SAE_SETS: .* no such user's home folder."),
        ({"local_sae_dir": "7-mien"}, r"LOCAL_SAE_DIR: there is no folder '7-mien'. Did you mean '7-mine'\?"),
        ({"sae_sets": "./7-mien"}, r"SAE_SETS: there is no folder '7-mien'. Did you mean '7-mine'\?"),
    ],
)
def test_a_folder_that_is_not_there(fields: dict[str, str], line: str) -> None:
    with pytest.raises(StartupError, match=f"^{line}$"):
        resolve(Settings.read(**fields))


def test_so_too_where_only_the_weights_are_looked_for() -> None:
    with pytest.raises(StartupError, match=r"Did you mean 'my-model'\?"):
        downloads.found(Settings.read(model_id="./my-modle", sae_sets=()))


def test_a_name_with_a_slash_may_be_a_repository() -> None:
    assert downloads.found(Settings.read(model_id="me/my-model", sae_sets=())) is None


def test_the_variable_that_was_set_is_named() -> None:
    with pytest.raises(StartupError, match=r"^OVERRIDE_MODEL_ID: there is no folder"):
        downloads.found(Settings.read(model_id="gpt2-small", override_model_id="./my-modle", sae_sets=()))
