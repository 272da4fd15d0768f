"""SAEs of EleutherAI's sparsify and of dictionary_learning: local folders and repositories that no directory lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuronpedia_inference.checks.features import written
from neuronpedia_inference.domain import UNNORMED
from neuronpedia_inference.downloads import disk_bytes, fetch_saes, missing_sizes
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.inventory import find
from neuronpedia_inference.loading import _check_source
from neuronpedia_inference.memory import sae_numbers
from neuronpedia_inference.saes import files
from neuronpedia_inference.saes.catalogue import SourceSpec, resolve
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.load import load_on_host
from neuronpedia_inference.settings import Settings
from tests.engine import hub_formats as formats
from tests.engine.engines import engine
from tests.engine.hub_formats import B_DEC, D_SAE, Write, X, topk
from tests.engine.test_originals import hub, loaders, named, place, sliced_alike
from tests.modal.local_modal.hub import a_hub
from tests.unit.test_downloads import use_hub

__all__ = ["hub", "loaders"]
SPARSIFY = (formats.sparsify(), topk(X - B_DEC, 5))
FORMATS: dict[str, tuple[Write, Tensor]] = {
    "sparsify": SPARSIFY,
    **{
        kind: (formats.dictionary(kind, tensors), expected)
        for kind, (tensors, expected) in formats.DICTIONARIES.items()
    },
}


def of_folder(folder: Path, name: str = "") -> SourceSpec:
    (spec,) = resolve(Settings.read(model_id="gpt2-small", sae_sets=(f"{name}{folder}",))).specs
    return spec


@pytest.mark.parametrize("kind", FORMATS)
def test_a_local_folder_means_what_its_trainer_says(hub: Path, kind: str, tmp_path: Path) -> None:
    write, expected = FORMATS[kind]
    folder = tmp_path / "saes" / ("layers.3" if kind == "sparsify" else "resid_post_layer_3")
    write(folder)
    spec = of_folder(folder)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.hook, sae.source.layer, sae.source.asks) == ("blocks.3.hook_resid_post", 3, ())
    assert 0 < (expected != 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5)
    sliced_alike(spec, sae)
    found = find(str(folder), Settings.read(model_id="gpt2-small"))
    assert (found.hook, found.width, found.kind) == (sae.source.hook, D_SAE, sae.source.architecture)
    assert found.disk_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert written(folder) == "it is not in SAELens's format"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_repository_that_no_directory_lists(hub: Path, kind: str, loaders: Any) -> None:
    from sae_lens import SAE

    write, expected = FORMATS[kind]
    path = "layers.3" if kind == "sparsify" else "sweep/resid_post_layer_3"
    spec = named("gpt2-small", f"3-mine=hf://me/saes/{path}")
    there = place(hub, spec)
    assert not files.is_here(spec)
    write(there)
    assert files.is_here(spec)
    sae = load_on_host(spec, dtype="float32")
    torch.testing.assert_close(sae.encode(X), expected, rtol=1e-5, atol=1e-5)
    if kind not in ("sparsify", "AutoEncoderNew"):  # SAELens turns the decoder of one, and has no bias of the other
        read = loaders.dictionary_learning_sae_huggingface_loader_1("me/saes", path)
        theirs = SAE.load_from_disk(there, dtype="float32", converter=lambda *args, **more: read[:2])
        norms = 1.0 if kind == "AutoEncoderTopK" else theirs.W_dec.norm(dim=1)
        with torch.no_grad():
            torch.testing.assert_close(sae.encode(X), theirs.encode(X) * norms, rtol=1e-5, atol=1e-5)
    sliced_alike(spec, sae)
    assert sae_numbers([spec]) == [pytest.approx(sae.n_bytes / 4, rel=0.6 if kind != "sparsify" else 0)]


def test_sparsify_keeps_its_precision_and_is_read_from_its_file(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "layers.3"
    formats.sparsify()(folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "sae.safetensors").items()}
    formats.put(folder / "sae.safetensors", weights)
    about = describe(of_folder(folder), "auto")
    assert (about.dtype, about.is_original) == ("bfloat16", False)
    assert torch.equal(about.feature(7).encoder, weights["encoder.weight"][7])
    assert torch.equal(about.decoder_row(7), weights["W_dec"][7].float())


@pytest.mark.parametrize(
    ("path", "name", "hook"),
    [
        ("layers.5", "5-me-saes", "blocks.5.hook_resid_post"),
        ("a/layers.5.mlp", "5-me-saes__a_mlp", "blocks.5.hook_mlp_out"),
        ("h.5.attn", "5-me-saes__attn", "blocks.5.hook_attn_out"),
        ("gpt_neox.layers.5.attention", "5-me-saes__gpt_neox_attention", "blocks.5.hook_attn_out"),
    ],
)
def test_a_folder_of_sparsify_is_called_by_the_module_that_it_reads(hub: Path, path: str, name: str, hook: str) -> None:
    (spec,) = resolve(Settings.read(model_id="gpt2-small", sae_sets=(f"hf://me/saes/{path}",))).specs
    assert spec.name == name
    formats.sparsify()(place(hub, spec))
    assert describe(spec, "float32").source.hook == hook


def test_what_a_module_gives_is_not_read_behind_a_norm(hub: Path, tmp_path: Path) -> None:
    """Gemma 2 has a norm behind its MLP; what it adds to the stream is not what the module gives."""
    formats.dictionary(
        "AutoEncoder", formats.DICTIONARIES["AutoEncoder"][0], layer=1, submodule_name="mlp_out_layer_1"
    )(tmp_path / "layer_1")
    source = replace(describe(of_folder(tmp_path / "layer_1"), "float32").source, width=32)
    assert (source.hook, source.asks) == ("blocks.1.hook_mlp_out", (UNNORMED,))
    for family in ("llama", "gpt2"):
        _check_source(source, engine(family))
    with pytest.raises(StartupError, match="is what a norm makes of that"):
        _check_source(source, engine("gemma2"))
    _check_source(replace(source, asks=()), engine("gemma2"))


@pytest.mark.parametrize(
    ("write", "folder", "words"),
    [
        (formats.sparsify(), "layer_5", "not as the module whose output it reads"),
        (formats.sparsify(), "layers.5.mlp.act", "not as the module whose output it reads"),
        (formats.sparsify(transcode=True), "layers.5.mlp", "transcode is not served"),
        (formats.sparsify(skip_connection=True), "layers.5.mlp", "skip_connection is not served"),
        (formats.sparsify(signed=True), "layers.5", "signed is not served"),
        (formats.sparsify(activation="groupmax"), "layers.5", "its activation 'groupmax' is not served"),
        (formats.dictionary("CrossCoder", {}), "layer_3", "its class 'CrossCoder' is not served"),
        (formats.dictionary("AutoEncoder", {}, submodule_name="ln_1"), "layer_3", "it reads 'ln_1'"),
    ],
)
def test_what_is_not_served_of_them_is_one_line(
    hub: Path, write: Write, folder: str, words: str, tmp_path: Path
) -> None:
    write(tmp_path / folder)
    spec = of_folder(tmp_path / folder, "5-t=")
    for read in (lambda: describe(spec, "float32"), lambda: load_on_host(spec, dtype="float32")):
        with pytest.raises(StartupError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_local_set_may_hold_dictionaries(hub: Path, tmp_path: Path) -> None:
    tensors, expected = formats.DICTIONARIES["BatchTopKSAE"]
    formats.dictionary("BatchTopKSAE", tensors)(tmp_path / "saes" / "3-res-mine")
    (spec,) = resolve(Settings.read(model_id=str(tmp_path), local_sae_dir=tmp_path / "saes")).specs
    assert spec.name == "3-res-mine"
    torch.testing.assert_close(load_on_host(spec, dtype="float32").encode(X), expected, rtol=1e-5, atol=1e-5)


def test_only_the_files_of_its_format_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    formats.sparsify()(repository / "layers.3")
    formats.told(repository / "layers.3" / "config.json", {})
    formats.pickled(repository / "layers.3" / "optimizer.pt", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = named("gpt2-small", "3-mine=hf://me/saes/layers.3")
    with a_hub({"me/saes": repository}) as (address, _):
        use_hub(monkeypatch, address)
        assert fetch_saes([spec], lambda line: None)
    here = files.files_of(spec)
    assert here is not None
    assert sorted(path.name for path in here.folder.iterdir()) == ["cfg.json", "sae.safetensors"]
    torch.testing.assert_close(load_on_host(spec, dtype="float32").encode(X), SPARSIFY[1], rtol=1e-5, atol=1e-5)


def test_the_format_of_a_repository_is_known_by_its_files() -> None:
    spec = named("gpt2-small", "5-mine=hf://me/saes/layers.5")
    there = {"layers.5/cfg.json": 10, "layers.5/sae.safetensors": 1000, "layers.5/optimizer.pt": 5000, "README.md": 1}
    wanted = missing_sizes(spec, lambda repo: there)
    assert wanted == {"layers.5/cfg.json": 10, "layers.5/sae.safetensors": 1000}
    assert disk_bytes(wanted) == 1010
    pickled = {"layers.5/config.json": 10, "layers.5/ae.pt": 1000}
    assert disk_bytes(missing_sizes(spec, lambda repo: pickled)) == 2010
    with pytest.raises(StartupError, match=r"'me/saes' lists no 'layers.5/cfg.json'"):
        missing_sizes(spec, lambda repo: {"README.md": 1})
