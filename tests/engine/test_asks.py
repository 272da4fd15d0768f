"""What SAEs ask of their model beside a hook: centred weights as TransformerLens makes them, and what is refused."""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuronpedia_inference.checks.features import written
from neuronpedia_inference.domain import CENTRED
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.asks import WITHOUT_BOS
from neuronpedia_inference.saes.catalogue import CONFIG_NAME, SourceSpec
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import LoadedSae
from neuronpedia_inference.saes.feature import FeatureWeights
from tests import models
from tests.engine.test_saes_load import D_SAE, close, load, saved

WIDTH, LAYER = 32, 2
IDS = list(range(0, 96, 4))
KINDS = ("standard", "jumprelu", "topk")


@pytest.fixture(scope="module")
def centred_model() -> Any:
    """The seeded GPT-2 as SAELens would load it for such an SAE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that is deprecated
        lens = importlib.import_module("transformer_lens")
        weights = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    net = models.model("gpt2")
    about: Any = net.config
    config = lens.HookedTransformerConfig(
        n_layers=about.n_layer,
        d_model=about.n_embd,
        n_ctx=about.n_positions,
        d_head=about.n_embd // about.n_head,
        n_heads=about.n_head,
        d_vocab=about.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=about.layer_norm_epsilon,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = lens.HookedTransformer(config, move_to_device=False)
    state = {name: t.clone() for name, t in weights.convert_gpt2_weights(net, config).items()}
    made.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return made.eval()


def asking(folder: Path, kind: str, hook: str = f"blocks.{LAYER}.hook_resid_pre", **more: Any) -> SourceSpec:
    """An SAE whose b_dec, biases and columns all have a mean, and whose model is to have centred writing weights."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(kind)
    options: dict[str, Any] = {"k": 5} if kind == "topk" else {}
    config = config_class(d_in=WIDTH, d_sae=D_SAE, apply_b_dec_to_input=more.pop("applies", True), **options)
    config.metadata.hook_name = hook
    for name, value in ({"model_from_pretrained_kwargs": {"center_writing_weights": True}} | more).items():
        setattr(config.metadata, name, value)
    module = sae_class(config)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 + 0.4 * torch.randn(parameter.shape, generator=made))
    return saved(folder, module, f"{LAYER}-res-t")


def of_saelens(spec: SourceSpec, x: Tensor) -> Tensor:
    """Its own encode, times the norms that folding moves."""
    from sae_lens import SAE

    module = SAE.load_from_disk(spec.folder or "", device="cpu", dtype="float32")
    norms = 1.0 if getattr(module.cfg, "rescale_acts_by_decoder_norm", True) is False else module.W_dec.norm(dim=1)
    with torch.no_grad():
        return module.encode(x) * norms


@pytest.mark.parametrize("applies", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_saelens_on_the_centred_model(
    kind: str, applies: bool, centred_model: Any, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = asking(tmp_path, kind, applies=applies)
    _, seen = centred_model.run_with_cache(torch.tensor([IDS]))
    expected = of_saelens(spec, seen[f"blocks.{LAYER}.hook_resid_pre"][0])
    ours = models.read(models.model("gpt2"), "gpt2", IDS, LAYER, "hook_resid_pre")
    sae = load(spec)
    assert sae.source.asks == (CENTRED,)
    assert 0 < (expected != 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(ours), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    uncentred = of_saelens(spec, ours)
    assert (uncentred - expected).abs().max() > 0.01 * expected.max()
    alike(spec, sae)


def alike(spec: SourceSpec, sae: LoadedSae) -> None:
    """One feature from the file is that of the whole to the bit."""
    about = describe(spec, "float32")
    assert about.source == sae.source
    for index in range(D_SAE):
        one, other = about.feature(index), sae.feature(index)
        for field in fields(FeatureWeights):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, (field.name, index)


def test_what_is_added_does_the_same_to_both_models(centred_model: Any, tmp_path: Path) -> None:
    """Though decoder rows have a mean: the norms behind take it off."""
    row = 10 * load(asking(tmp_path, "standard")).decoder_row(3)
    assert row.mean().abs() > 0.1 * row.std()
    hook = f"blocks.{LAYER}.hook_resid_pre"
    steered = centred_model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=[(hook, lambda h, hook: h + row)])
    net = models.model("gpt2")
    plain = net(torch.tensor([IDS])).logits
    with models.hooked(net, "gpt2", LAYER, "hook_resid_pre", lambda h: h + row):
        ours = net(torch.tensor([IDS])).logits
    scale = float(plain.abs().max())
    torch.testing.assert_close(ours, steered, rtol=1e-4, atol=1e-4 * scale)
    assert (ours - plain).abs().max() > 0.01 * scale


def test_the_hand_written_check_centres_too(tmp_path: Path) -> None:
    spec = asking(tmp_path, "jumprelu")
    ours = models.read(models.model("gpt2"), "gpt2", IDS, LAYER, "hook_resid_pre")
    by_hand = written(spec.folder or Path())
    assert not isinstance(by_hand, str)
    close(by_hand.activations(ours)[0], load(spec).encode(ours))


def test_places_that_see_no_mean_are_read_as_they_are(tmp_path: Path) -> None:
    spec = asking(tmp_path, "standard", hook=f"blocks.{LAYER}.attn.hook_z")
    sae, x = load(spec), torch.randn(4, WIDTH)
    assert sae.source.asks == ()
    close(sae.encode(x), of_saelens(spec, x))


@pytest.mark.parametrize(
    ("kind", "hook", "more", "words"),
    [
        ("gated", "hook_resid_pre", {}, "center_writing_weights, which changes hook_resid_pre and is not done"),
        ("standard", "mlp.hook_in", {"model_from_pretrained_kwargs": {"fold_ln": True}}, "fold_ln, which changes"),
        ("standard", "attn.hook_z", {"model_from_pretrained_kwargs": {"fold_value_biases": True}}, "fold_value_biases"),
    ],
)
def test_what_would_give_other_numbers_is_refused(
    kind: str, hook: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    spec = asking(tmp_path, kind, f"blocks.{LAYER}.{hook}", **more)
    for read in (lambda: describe(spec, "float32"), lambda: load(spec)):
        with pytest.raises(StartupError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_what_changes_no_number_is_said_or_needs_no_word(tmp_path: Path) -> None:
    kwargs = {"fold_ln": True, "center_unembed": True, "fold_value_biases": False, "revision": "step1000"}
    spec = asking(tmp_path, "standard", prepend_bos=False, model_from_pretrained_kwargs=kwargs)
    said = describe(spec, "float32").source.asks
    assert said[0] == WITHOUT_BOS
    assert said[1:] == ("a model loaded with revision='step1000': MODEL_FROM_PRETRAINED_KWARGS chooses what is loaded",)
    file = (spec.folder or Path()) / CONFIG_NAME
    config = json.loads(file.read_text())
    config["metadata"] |= {"prepend_bos": True, "model_from_pretrained_kwargs": {}}
    file.write_text(json.dumps(config))
    assert describe(spec, "float32").source.asks == ()
