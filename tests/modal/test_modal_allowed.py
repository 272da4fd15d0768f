"""Which models callers may choose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.settings import Settings
from service.allowed import CHOICES, check_models, is_name

OWN = Settings.read(model_id="gpt2-small", override_model_id="tests/ours")


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ((), "gpt2"),
        ((), "tests/ours"),
        ((), "gemma-2-2b-it"),
        ((), "meta-llama/Llama-3.1-8B"),
        (("gemma-2-2b",), "google/gemma-2-2b"),
        (("gemma-2-2b",), "openai-community/gpt2"),
        (("tests/other",), "tests/other"),
    ],
)
def test_allowed_under_every_name(listed: tuple[str, ...], name: str) -> None:
    for field in CHOICES:
        check_models({field: name}, listed, OWN)


@pytest.mark.parametrize(
    ("listed", "name", "why"),
    [
        ((), "tests/other", "Others must be listed in the deployment's MODELS"),
        ((), "gemma-2-2bb", "Did you mean 'gemma-2-2b'"),
        (("gemma-2-2b",), "gemma-2-9b", "The deployment's MODELS lists them"),
    ],
)
def test_not_allowed(listed: tuple[str, ...], name: str, why: str) -> None:
    for field in CHOICES:
        with pytest.raises(InvalidRequest, match=why):
            check_models({"model_id": "gpt2-small", field: name}, listed, OWN)


@given(st.text(max_size=30))
def test_a_name_never_leads_out_of_a_folder(text: str) -> None:
    if is_name(text):
        parts = text.split("/")
        assert len(parts) <= 2
        assert all(part and not part.startswith((".", "~", "-")) and part.isascii() for part in parts)
        assert ".." not in text


@pytest.mark.parametrize(
    "path", ["/etc/passwd", ".", "..", "~", "a/b/c", "a/../b", "a\\b", "./a", "a/", "a b", "a\n", ""]
)
def test_paths_are_no_names(path: str) -> None:
    assert not is_name(path)


@pytest.mark.parametrize("sets", ["hf://me/saes/final", "/etc", "res-jb ./saes", '["gpt2-small-res-jb/blocks.7"]', "~"])
def test_callers_do_not_say_where_saes_are(sets: str) -> None:
    with pytest.raises(InvalidRequest, match="Callers name sets and sources"):
        check_models({"model_id": "gpt2-small", "sae_sets": sets}, (), OWN)
    check_models({"model_id": "gpt2-small", "sae_sets": '["res-jb"]'}, (), OWN)
