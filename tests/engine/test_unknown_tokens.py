"""A tokenizer that knows more tokens than the model has embeddings for: what cannot be looked up is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import models

EXTRA = "<|extra|>"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder: Path = models.save("llama", tmp_path_factory.mktemp("extra"))
    tokenizer = models.tokenizer()
    tokenizer.add_tokens([EXTRA])
    tokenizer.save_pretrained(folder)
    loaded = Runtime.load(Settings.read(model_id=str(folder), sae_sets=(), num_threads=1))
    yield loaded
    loaded.close()


def ask(runtime: Runtime, name: str, **body: Any) -> dict[str, Any]:
    return asyncio.run(answer(by_name[name], body, runtime))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("steer", {"features": [], "max_new_tokens": 2}),
        ("activation_single", {"model": "m", "source": "1", "index": "3"}),
        ("top_k", {"source": "1"}),
    ],
)
def test_a_token_without_an_embedding_is_refused_and_others_are_served(
    runtime: Runtime, name: str, body: dict[str, Any]
) -> None:
    """Looked up anyway it would fail a whole batch, or the device."""
    with pytest.raises(InvalidRequest, match=r"no embedding for token '<\|extra\|>' \(id 260\).* last id is 259"):
        ask(runtime, name, prompt=f"ab{EXTRA}c", **body)
    assert ask(runtime, name, prompt="abc", **body)
    assert runtime.healthy
