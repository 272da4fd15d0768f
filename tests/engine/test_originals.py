"""SAEs as they lie on the hub, in a cache laid out on disk, read offline by their names and held against formulas, and
against SAELens's own loaders and encode.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor

from neuronpedia_inference.errors import InvalidRequest, StartupError
from neuronpedia_inference.saes import files, saelens
from neuronpedia_inference.saes.catalogue import SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.convert import convert
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import LoadedSae
from neuronpedia_inference.saes.feature import FeatureWeights
from neuronpedia_inference.saes.load import load_on_host
from neuronpedia_inference.saes.originals import loaders_of, needed_files
from neuronpedia_inference.settings import Settings
from tests.engine import hub_formats as formats
from tests.engine.hub_formats import B_DEC, CENTRED, D_IN, D_SAE, NORMS, THRESHOLD, Write, X, jumprelu, relu, topk

REVISION = "0" * 40
RESID = "blocks.3.hook_resid_post"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("neuronpedia_inference.saes.convert.default_cache_dir", lambda: tmp_path / "ours")
    return tmp_path


@pytest.fixture(autouse=True)
def loaders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SAELens, whose tables of sizes by names are made small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        module = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    small = {key: (name, D_IN) for key, (name, _) in module.QWEN_SCOPE_MODEL_INFO.items()}
    monkeypatch.setattr(module, "QWEN_SCOPE_MODEL_INFO", small)
    for loader in ("gemma_2", "gemma_2_transcoder", "goodfire", "deepseek_r1"):
        getter = module.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader]
        smaller = _smaller(getter)
        monkeypatch.setitem(module.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, loader, smaller)
        monkeypatch.setattr(module, getter.__name__, smaller)
    return module


def _smaller(getter: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def smaller(*args: Any, **more: Any) -> dict[str, Any]:
        config = getter(*args, **more)
        return {**config, "d_in": D_IN, "d_sae": D_SAE} | ({"d_out": D_IN} if "d_out" in config else {})

    return smaller


def named(model: str, source: str) -> SourceSpec:
    (spec,) = resolve(Settings.read(model_id=model, sae_sets=(source,))).specs
    assert spec.name == source.partition("=")[0]
    return spec


def place(hub: Path, spec: SourceSpec) -> Path:
    """Where the SAE lies in the hub's cache; its repository has a main revision then."""
    repo, path = hub_location(spec)
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    return folder / "snapshots" / REVISION / path


def dictionary(kind: str) -> tuple[Write, Tensor]:
    tensors, expected = formats.DICTIONARIES[kind]
    return formats.dictionary(kind, tensors), expected


OLD_TOPK = {
    "hook_name": RESID,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 5},
    "normalize_activations": "layer_norm",
}
OLD_CENTRED = {"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "activation_fn_str": "relu"}
MATRYOSHKA = {
    "architecture": "jumprelu",
    "hook_name": RESID,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
}
CASES: list[tuple[str, str, str, Write, Tensor]] = [
    ("gemma-2-2b", "3-gemmascope-res-16k", RESID, formats.gemma_2, jumprelu(X, THRESHOLD)),
    ("gemma-2-2b", "3-gemmascope-att-16k", "blocks.3.attn.hook_z", formats.gemma_2, jumprelu(X, THRESHOLD)),
    ("gemma-2-2b", "3-gemmascope-mlp-16k", "blocks.3.hook_mlp_out", formats.gemma_2, jumprelu(X, THRESHOLD)),
    (
        "gemma-2-2b",
        "3-gemmascope-transcoder-16k",
        "blocks.3.ln2.hook_normalized",
        formats.gemma_2,
        jumprelu(X, THRESHOLD),
    ),
    (
        "gemma-3-4b",
        "3-gemma-scope-2-4b-pt-res-all__width_16k_l0_big",
        RESID,
        formats.gemma_3,
        jumprelu(X, THRESHOLD),
    ),
    (
        "gemma-3-4b-it",
        "3-gemma-scope-2-4b-it-att-all__width_262k_l0_small",
        "blocks.3.attn.hook_z",
        formats.gemma_3,
        jumprelu(X, THRESHOLD),
    ),
    (
        "gemma-3-1b",
        "3-gemma-scope-2-1b-pt-mlp-all__width_16k_l0_small",
        "blocks.3.hook_mlp_out",
        formats.gemma_3,
        jumprelu(X, THRESHOLD),
    ),
    (
        "gemma-3-4b",
        "3-gemma-scope-2-4b-pt-transcoders-all__width_16k_l0_big",
        "blocks.3.hook_mlp_in",
        formats.gemma_3,
        jumprelu(X, THRESHOLD),
    ),
    (
        "gemma-3-4b",
        "3-gemma-scope-2-4b-pt-transcoders-all__width_16k_l0_big_affine",
        "blocks.3.hook_mlp_in",
        formats.gemma_3_affine,
        jumprelu(X, THRESHOLD),
    ),
    ("qwen3-4b", "3-transcoder-hp", "blocks.3.mlp.hook_in", formats.mwhanna, relu(X)),
    ("Qwen/Qwen3-1.7B-Base", "3-qwen-scope-3-1.7b-base-w32k-l50", RESID, formats.qwen_scope, relu(X) / NORMS),
    ("llama3.1-8b-it", "19-resid-post-gf", "blocks.19.hook_resid_post", formats.goodfire, relu(X)),
    (
        "deepseek-r1-distill-llama-8b",
        "19-qresearch-res-65k",
        "blocks.19.hook_resid_post",
        formats.deepseek_r1,
        relu(X),
    ),
    ("gpt2-small", "3-att-kk", "blocks.3.attn.hook_z", formats.connor_rob, relu(X - B_DEC)),
    (
        "gpt2-small",
        "3-res-jb",
        "blocks.3.hook_resid_pre",
        formats.before_saelens_6(**OLD_CENTRED),
        relu(CENTRED - B_DEC),
    ),
    (
        "gpt2-small",
        "3-res_mid_32k-oai",
        RESID,
        formats.before_saelens_6(**OLD_TOPK),
        topk(formats.LAYER_NORMED - B_DEC, 5),
    ),
    (
        "gemma-3-1b",
        "3-gemma-3-1b-res-matryoshka-dc__hook_resid_post",
        RESID,
        formats.before_saelens_6(**MATRYOSHKA),
        jumprelu(X - B_DEC, THRESHOLD),
    ),
    ("openai/gpt-oss-20b", "3-resid-post-aa", RESID, *dictionary("BatchTopKSAE")),
    ("pythia-70m-deduped", "3-sae_bench-topk-res-4k__trainer_0_step_final", RESID, *dictionary("AutoEncoderTopK")),
    ("pythia-70m-deduped", "3-sae_bench-standard-res-16k__trainer_10_step_final", RESID, *dictionary("AutoEncoder")),
    ("pythia-70m-deduped", "3-sae_bench-gated-res-4k__trainer_0_step_final", RESID, *dictionary("GatedAutoEncoder")),
]


@pytest.mark.parametrize(("model", "source", "hook", "write", "expected"), CASES, ids=[case[1] for case in CASES])
def test_an_original_is_read_offline_and_means_what_its_formula_and_saelens_say(
    hub: Path, model: str, source: str, hook: str, write: Write, expected: Tensor
) -> None:
    spec = named(model, source)
    there = place(hub, spec)
    assert not files.is_here(spec)
    write(there)
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.name, sae.source.hook, sae.source.layer) == (source, hook, int(hook.split(".")[1]))
    assert 0 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X)[:, :D_SAE], expected, rtol=1e-5, atol=1e-5)
    close_to_saelens(spec, sae)
    sliced_alike(spec, sae)


@torch.no_grad()
def close_to_saelens(spec: SourceSpec, sae: LoadedSae, tolerance: float = 1e-5) -> None:
    """Its own loader and encode, on what it would read, times the norms that folding moves."""
    module = saelens.sae_on_hub(spec, "float32")
    module.turn_off_forward_pass_hook_z_reshaping()
    norms = 1.0 if module.cfg.architecture() == "topk" else module.W_dec.norm(dim=1)
    expected = module.encode(CENTRED if sae.source.is_centred else X) * norms
    torch.testing.assert_close(sae.encode(X), expected, rtol=tolerance, atol=tolerance)


def sliced_alike(spec: SourceSpec, sae: LoadedSae) -> None:
    """Features read from the file by themselves, or from its copy, are those of the whole to the bit."""
    if describe(spec, "auto").is_original:
        assert describe(spec, "auto").layout is None
        assert convert(spec) == convert(spec)
        copy = load_on_host(spec, dtype="float32")
        assert copy.source == sae.source
        assert torch.equal(copy.encode(X), sae.encode(X))
    about = describe(spec, "float32")
    assert (about.source, about.n_bytes, about.is_original) == (sae.source, sae.n_bytes, False)
    for index in (0, 5, D_SAE - 1):
        one, other = about.feature(index), sae.feature(index)
        for field in fields(FeatureWeights):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, (field.name, a, b)


@pytest.mark.parametrize(
    ("model", "source", "write", "threshold"),
    [
        ("llama3.1-8b", "3-llamascope-res-32k", formats.llama_scope, torch.tensor(0.7 * D_IN**0.5 / 8.0)),
        (
            "deepseek-r1-distill-llama-8b",
            "3-llamascope-slimpj-res-32k",
            formats.llama_scope_distilled,
            THRESHOLD,
        ),
    ],
)
def test_llama_scope_is_rescaled_by_the_norm_that_the_directory_lists(
    hub: Path, model: str, source: str, write: Write, threshold: Tensor
) -> None:
    """Weights are scaled by the directory's factor, the threshold by that of the file or not at all."""
    spec = named(model, source)
    write(place(hub, spec))
    factor = saelens.scale_of(spec)
    assert factor is not None
    sae, expected = load_on_host(spec, dtype="float32"), formats.scaled(threshold, factor)
    assert 0 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    close_to_saelens(spec, sae, 1e-5)
    sliced_alike(spec, sae)


@pytest.mark.filterwarnings("ignore:This loads the CLT layer")
def test_a_layer_of_a_cross_layer_transcoder_has_activations_and_no_rows(hub: Path) -> None:
    spec = named("gemma-2-2b", "3-clt-hp")
    repo = place(hub, spec).parent
    encoder = {"W_enc_3": formats.ENC.T.contiguous(), "b_enc_3": formats.B_ENC, "b_dec_3": B_DEC}
    formats.put(repo / "W_enc_3.safetensors", encoder)
    assert not files.is_here(spec)
    formats.put(repo / "W_dec_3.safetensors", {"W_dec_3": torch.stack([formats.DEC, formats.DEC], dim=1)})
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    formats.told(repo / "config.yaml", {"model_name": "google/gemma-2-2b", **hooks})
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.architecture, sae.steerable) == ("cross_layer_transcoder", False)
    expected = 2 * relu(X)
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_feature(X, 5), expected[:, 5], rtol=1e-5, atol=1e-5)
    close_to_saelens(spec, sae)
    sliced_alike(spec, sae)
    for ask in (lambda: sae.decoder_row(5), lambda: sae.nearest_decoder_rows(X[0], 3)):
        with pytest.raises(InvalidRequest, match="'3-clt-hp' is one layer of a cross-layer transcoder"):
            ask()


def test_an_sae_of_a_repository_that_is_in_no_directory(hub: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    spec = named("gpt2-small", "7-mine=hf://me/saes/final")
    metadata = SAEMetadata(hook_name="blocks.7.hook_resid_pre")
    module = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, metadata=metadata))
    for name, value in formats.OURS.items():
        getattr(module, name).data.copy_(value)
    there = place(hub, spec)
    module.save_model(there)
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.name, sae.source.source_set) == ("7-mine", "mine")
    torch.testing.assert_close(sae.encode(X), relu(X), rtol=1e-5, atol=1e-5)
    close_to_saelens(spec, sae)
    sliced_alike(spec, sae)
    (there / "cfg.json").unlink()
    assert not files.is_here(spec)


def test_an_activation_that_saelens_would_take_for_relu_is_refused(hub: Path) -> None:
    spec = named("gpt2-small", "3-res-jb")
    formats.before_saelens_6(**{**OLD_CENTRED, "activation_fn_str": "tanh-relu"})(place(hub, spec))
    with pytest.raises(StartupError, match="its activation 'tanh-relu' is not served"):
        describe(spec, "float32")


def test_files_are_named_by_format() -> None:
    spec = named("gpt2-small", "3-att-kk")
    _, path = hub_location(spec)
    assert path.endswith("_v9.pt")
    (loader,) = loaders_of(spec)
    assert needed_files(loader, path) == (path, path.removesuffix(".pt") + "_cfg.json")
