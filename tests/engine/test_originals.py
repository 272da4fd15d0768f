"""SAEs as they lie on the hub, in a cache laid out on disk, read offline by their names and held against formulas."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.saes import files
from neuronpedia_inference.saes.catalogue import SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.convert import convert
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import LoadedSae
from neuronpedia_inference.saes.feature import FeatureWeights
from neuronpedia_inference.saes.load import load_on_host
from neuronpedia_inference.saes.originals import needed_files
from neuronpedia_inference.settings import Settings

D_IN, D_SAE, N_POS = 16, 48, 9
REVISION = "0" * 40


def weights() -> dict[str, Tensor]:
    """In SAELens's orientation: encoder [width, feature], decoder [feature, width]."""
    made = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    decoder = draw(D_SAE, D_IN) * (0.3 + torch.rand(D_SAE, 1, generator=made))
    return {"enc": draw(D_IN, D_SAE), "dec": decoder, "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}


W = weights()
THRESHOLD = 0.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(4))
X = 2 * torch.randn(N_POS, D_IN, generator=torch.Generator().manual_seed(5))
NORMS = W["dec"].norm(dim=1)


def jumprelu(threshold: Tensor, *, scale: float = 1.0, centred: bool = False) -> Tensor:
    """[pos, feature], times the decoder norms that folding moves."""
    before = scale * (X - W["b_dec"] if centred else X) @ W["enc"] + W["b_enc"]
    return torch.where(before > threshold, before.relu(), 0.0) * NORMS


def gemma_3(folder: Path) -> None:
    """No config.json: Google's folders have one, SAELens can do without."""
    names = {"w_enc": W["enc"], "w_dec": W["dec"], "b_enc": W["b_enc"], "b_dec": W["b_dec"], "threshold": THRESHOLD}
    put(folder / "params.safetensors", names)


def gemma_3_transcoder(folder: Path) -> None:
    gemma_3(folder)


def llama_scope(folder: Path) -> None:
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.7,
        "hook_point_in": "blocks.3.hook_resid_post",
        "dataset_average_activation_norm": {"in": 8.0},
    }
    told(folder / "hyperparams.json", config)
    put(folder / "checkpoints" / "final.safetensors", linear_layers())


def dictionary_learning(folder: Path) -> None:
    trainer = {
        "layer": 3,
        "dict_class": "BatchTopKSAE",
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "k": 5,
        "lm_name": "openai/gpt-oss-20b",
    }
    told(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 64}})
    tensors = {k: v for k, v in linear_layers().items() if k != "decoder.bias"}
    torch.save({**tensors, "b_dec": W["b_dec"], "threshold": torch.tensor(0.7)}, folder / "ae.pt")


def qwen_scope(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = 32 * 1024  # the repository's name says how many features there are
    grown = {"W_enc": torch.zeros(rows, D_IN), "W_dec": torch.zeros(D_IN, rows), "b_enc": torch.full((rows,), -9.0)}
    grown["W_enc"][:D_SAE], grown["W_dec"][:, :D_SAE], grown["b_enc"][:D_SAE] = W["enc"].T, W["dec"].T, W["b_enc"]
    torch.save({**grown, "b_dec": W["b_dec"]}, file)


def linear_layers() -> dict[str, Tensor]:
    return {
        "encoder.weight": W["enc"].T.contiguous(),
        "decoder.weight": W["dec"].T.contiguous(),
        "encoder.bias": W["b_enc"],
        "decoder.bias": W["b_dec"],
    }


def topk_of_all() -> Tensor:
    """[pos, feature] of the 50 largest of 32 thousand: all of ours that are positive. TopK is not folded."""
    return (X @ W["enc"] + W["b_enc"]).relu()


def put(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def told(file: Path, config: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("neuronpedia_inference.saes.convert.default_cache_dir", lambda: tmp_path / "ours")
    return tmp_path


@pytest.fixture(autouse=True)
def loaders(monkeypatch: pytest.MonkeyPatch) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        module = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    small = {key: (name, D_IN) for key, (name, _) in module.QWEN_SCOPE_MODEL_INFO.items()}
    monkeypatch.setattr(module, "QWEN_SCOPE_MODEL_INFO", small)
    return module


def named(model: str, source: str) -> SourceSpec:
    (spec,) = resolve(Settings.read(model_id=model, sae_sets=(source,))).specs
    assert spec.name == source
    return spec


def place(hub: Path, spec: SourceSpec) -> Path:
    """Where the SAE lies in the hub's cache; its repository has a main revision then."""
    repo, path = hub_location(spec)
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    return folder / "snapshots" / REVISION / path


ROOT_D = D_IN**0.5
CASES: list[tuple[str, str, str, Callable[[Path], None], Tensor]] = [
    (
        "gemma-3-4b",
        "3-gemma-scope-2-4b-pt-res-all__width_16k_l0_big",
        "blocks.3.hook_resid_post",
        gemma_3,
        jumprelu(THRESHOLD),
    ),
    (
        "gemma-3-4b-it",
        "3-gemma-scope-2-4b-it-att-all__width_262k_l0_small",
        "blocks.3.attn.hook_z",
        gemma_3,
        jumprelu(THRESHOLD),
    ),
    (
        "gemma-3-1b",
        "3-gemma-scope-2-1b-pt-mlp-all__width_16k_l0_small",
        "blocks.3.hook_mlp_out",
        gemma_3,
        jumprelu(THRESHOLD),
    ),
    (
        "gemma-3-4b",
        "3-gemma-scope-2-4b-pt-transcoders-all__width_16k_l0_big",
        "blocks.3.hook_mlp_in",
        gemma_3_transcoder,
        jumprelu(THRESHOLD),
    ),
    (
        "openai/gpt-oss-20b",
        "3-resid-post-aa",
        "blocks.3.hook_resid_post",
        dictionary_learning,
        jumprelu(torch.tensor(0.7), centred=True),
    ),
    (
        "Qwen/Qwen3-1.7B-Base",
        "3-qwen-scope-3-1.7b-base-w32k-l50",
        "blocks.3.hook_resid_post",
        qwen_scope,
        topk_of_all(),
    ),
]


@pytest.mark.parametrize(("model", "source", "hook", "write", "expected"), CASES)
def test_an_original_is_read_offline_and_means_what_its_formula_says(
    hub: Path, model: str, source: str, hook: str, write: Callable[[Path], None], expected: Tensor
) -> None:
    spec = named(model, source)
    there = place(hub, spec)
    assert not files.is_here(spec)
    write(there)
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.name, sae.source.hook, sae.source.layer) == (source, hook, 3)
    assert 0 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X)[:, :D_SAE], expected, rtol=1e-5, atol=1e-5)
    sliced_alike(spec, sae)


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


def test_llama_scope_is_rescaled_by_the_norm_that_the_directory_lists(hub: Path, loaders: Any) -> None:
    """Weights are scaled by the directory's factor, the threshold by that of the file."""
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    spec = named("llama3.1-8b", "3-llamascope-res-32k")
    llama_scope(place(hub, spec))
    factor = get_norm_scaling_factor(spec.release or "", spec.sae_id or "")
    assert factor is not None
    sae = load_on_host(spec, dtype="float32")
    # SAELens folds the factor into W_enc and takes it out of W_dec again, whose norms are folded afterwards.
    before = factor * X @ W["enc"] + W["b_enc"]
    expected = torch.where(before > 0.7 * ROOT_D / 8.0, before.relu(), 0.0) * NORMS / factor
    assert 0 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-4, atol=1e-4)
    sliced_alike(spec, sae)


@pytest.mark.filterwarnings("ignore:This loads the CLT layer")
def test_a_layer_of_a_cross_layer_transcoder_has_activations_and_no_rows(hub: Path) -> None:
    spec = named("gemma-2-2b", "3-clt-hp")
    repo = place(hub, spec).parent
    encoder = {"W_enc_3": W["enc"].T.contiguous(), "b_enc_3": W["b_enc"], "b_dec_3": W["b_dec"]}
    put(repo / "W_enc_3.safetensors", encoder)
    assert not files.is_here(spec)
    put(repo / "W_dec_3.safetensors", {"W_dec_3": torch.stack([W["dec"], W["dec"]], dim=1)})
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    told(repo / "config.yaml", {"model_name": "google/gemma-2-2b", **hooks})
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.architecture, sae.steerable) == ("cross_layer_transcoder", False)
    expected = (X @ W["enc"] + W["b_enc"]).relu() * 2 * NORMS
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_feature(X, 5), expected[:, 5], rtol=1e-5, atol=1e-5)
    sliced_alike(spec, sae)
    for ask in (lambda: sae.decoder_row(5), lambda: sae.nearest_decoder_rows(X[0], 3)):
        with pytest.raises(InvalidRequest, match="'3-clt-hp' is one layer of a cross-layer transcoder"):
            ask()


def test_an_sae_of_a_repository_that_is_in_no_directory(hub: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    (spec,) = resolve(Settings.read(model_id="gpt2-small", sae_sets=("7-mine=hf://me/saes/final",))).specs
    metadata = SAEMetadata(hook_name="blocks.7.hook_resid_pre")
    module = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, metadata=metadata))
    for name, value in (("W_enc", W["enc"]), ("W_dec", W["dec"]), ("b_enc", W["b_enc"]), ("b_dec", W["b_dec"])):
        getattr(module, name).data.copy_(value)
    there = place(hub, spec)
    module.save_model(there)
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.name, sae.source.source_set) == ("7-mine", "mine")
    torch.testing.assert_close(sae.encode(X), topk_of_all() * NORMS, rtol=1e-5, atol=1e-5)
    sliced_alike(spec, sae)
    (there / "cfg.json").unlink()
    assert not files.is_here(spec)


def test_files_are_named_by_format() -> None:
    spec = named("gpt2-small", "3-att-kk")
    _, path = hub_location(spec)
    assert path.endswith("_v9.pt")
    assert needed_files(spec, path) == (path, path.removesuffix(".pt") + "_cfg.json")
