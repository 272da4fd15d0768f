"""The floor of the comparison, in a process of its own: plain Hugging Face, and SAELens's SAEs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case, FullForward, OneFeature, cases
from benchmarks.process import Child, Process
from neuronpedia_inference.embedded import SAES_DIR
from neuronpedia_inference.embedded.weights import model_folder


def test_the_floor_is_hugging_face_and_the_saes_are_sae_lens_s() -> None:
    """Its numbers are those of the two libraries asked directly."""
    child = Child(Process("benchmarks.plain", str(model_folder()), str(SAES_DIR)))
    try:
        works = (FullForward("The capital of France is"), OneFeature(("The capital of France is", "Rome"), 15, 1346))
        token, rows = (
            child.ask({**Case("", "", "", work, at_a_time=2).line(), "times": 2})["answer"] for work in works
        )
        refused = child.ask({**next(case for case in cases() if case.name == "first_busy").line(), "times": 1})
        broken = child.ask({"kind": "Nothing", "times": 1})
    finally:
        child.close()
    assert (token, rows) == asked_directly("The capital of France is", "Rome")
    assert set(refused) == {"not_offered"}
    assert broken == {"failed": "KeyError: 'Nothing'"}
    assert child.versions.keys() == {"torch", "transformers"}


def asked_directly(text: str, other: str) -> tuple[str, Any]:
    import torch
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
    sae: Any = SAE.load_from_disk(SAES_DIR / "15-res-4k", device="cpu", dtype="float32")
    sae.fold_W_dec_norm()
    token, rows = "", []
    with torch.inference_mode():
        for prompt in (other, text):
            ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False).input_ids]])
            output = model(ids, output_hidden_states=True)
            token = tokenizer.decode(output.logits[0, -1].argmax())
            values = sae.encode(output.hidden_states[16][0])[1:, 1346]
            rows.insert(0, pytest.approx(values.tolist(), abs=2e-3))
    return token, rows
