"""What TransformerLens says of an architecture is asked once, and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neuronpedia_inference.engine import description
from neuronpedia_inference.engine.description import describe
from neuronpedia_inference.engine.weights import load_weights
from tests import models


@pytest.mark.parametrize("family", models.CONFIGS)
def test_what_is_kept_is_what_was_said(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = describe(models.model(family))
    assert describe(models.model(family), tmp_path) == said
    monkeypatch.setattr(description, "_asked", lambda model: pytest.fail("it is asked again"))
    assert describe(models.model(family), tmp_path) == said
    with pytest.raises(pytest.fail.Exception):
        describe(models.model("gpt2" if family != "gpt2" else "llama"), tmp_path)


@pytest.mark.parametrize("broken", ["{", "[]", "{}", "null"])
def test_a_broken_file_is_made_again(broken: str, tmp_path: Path) -> None:
    said = describe(models.model("llama"), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(broken)
    assert describe(models.model("llama"), tmp_path) == said
    assert json.loads(file.read_text())["architecture"] == "LlamaForCausalLM"


def test_an_integer_for_a_number_is_taken(tmp_path: Path) -> None:
    """In a process that has not imported TransformerLens, which makes transformers take it."""
    models.save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1}))
    program = (
        "import sys; from neuronpedia_inference.engine.weights import load_tokenizer, load_weights\n"
        "assert 'transformer_lens' not in sys.modules\n"
        "load_tokenizer(sys.argv[1], {})\n"
        "print(load_weights(sys.argv[1], dtype='auto', device='cpu', options={}).config.rms_norm_eps)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
    loaded: Any = load_weights(str(tmp_path), dtype="auto", device="cpu", options={})
    assert loaded.config.rms_norm_eps == 1
