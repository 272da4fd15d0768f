"""One feature by itself: its weights and its activations are those of the whole SAE."""

from __future__ import annotations

import importlib
import warnings
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neuronpedia_inference.domain import Source
from neuronpedia_inference.errors import InvalidRequest, NotReady, UnknownSource
from neuronpedia_inference.saes.encode import LoadedSae
from neuronpedia_inference.saes.feature import ACROSS_LAYERS, FeatureWeights
from neuronpedia_inference.saes.load import load_sae
from neuronpedia_inference.saes.store import SaeStore
from tests.engine.stores import SOON, Loader, make
from tests.engine.test_saes_load import BY_COLUMN, D_SAE, TRANSCODERS, WHOLE, activations, build, saved

INDEX = 11


@pytest.fixture(autouse=True, scope="module")
def _saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        importlib.import_module("sae_lens")


def loaded(folder: Path, kind: str, dtype: str = "float32", **options: Any) -> LoadedSae:
    return load_sae(saved(folder, build(kind, **options)), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", BY_COLUMN)
def test_it_answers_as_the_whole_sae_to_the_bit(kind: str, normalisation: str, dtype: str, tmp_path: Path) -> None:
    sae, x = loaded(tmp_path, kind, dtype, normalize_activations=normalisation), activations()
    found = torch.stack([sae.feature(index).encode(x) for index in range(D_SAE)], dim=1)
    assert 0 < (found != 0).float().mean() < 0.95
    assert torch.equal(found, torch.cat([sae.encode_features(x, (index,)) for index in range(D_SAE)], dim=1))
    with torch.no_grad():
        whole = sae.module.encode(x.to(sae.module.W_enc.dtype)).float()
    if dtype == "float32":
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*BY_COLUMN, *WHOLE])
def test_its_weights_are_those_of_the_folded_sae(kind: str, tmp_path: Path) -> None:
    sae = loaded(tmp_path, kind)
    feature, module = sae.feature(INDEX), sae.module
    assert (feature.source, feature.index) == (sae.source, INDEX)
    assert torch.equal(feature.encoder, module.W_enc[:, INDEX])
    assert feature.decoder is not None
    assert torch.equal(feature.decoder, module.W_dec[INDEX])
    assert torch.equal(feature.encoder_column(INDEX), sae.encoder_column(INDEX))
    bias = getattr(module, "b_gate", getattr(module, "b_enc", torch.zeros(D_SAE)))
    assert feature.bias == bias[INDEX]
    for name in ("threshold", "r_mag", "b_mag"):
        whole, one = getattr(module, name, None), getattr(feature, name)
        assert (whole is None) == (one is None)
        assert whole is None or one == whole[INDEX]
    takes_off = kind not in TRANSCODERS and module.cfg.apply_b_dec_to_input
    assert (feature.b_dec is not None) == takes_off
    assert feature.b_dec is None or torch.equal(feature.b_dec, module.b_dec)
    kept = feature.encoder.clone()
    sae.free()
    assert torch.equal(feature.encoder, kept)  # a copy
    assert feature.encoder.untyped_storage().nbytes() == feature.encoder.nbytes


def test_where_a_transcoder_writes_is_said(tmp_path: Path) -> None:
    module = build("jumprelu_transcoder", hook="blocks.3.ln2.hook_normalized")
    module.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    source = load_sae(saved(tmp_path, module), dtype="float32", device="cpu").source
    assert (source.hook, source.hook_out) == ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")


def test_a_layer_of_a_cross_layer_transcoder_has_no_row(tmp_path: Path) -> None:
    sae = loaded(tmp_path, "transcoder")
    sae.source = replace(sae.source, architecture=ACROSS_LAYERS)
    feature = sae.feature(INDEX)
    assert feature.decoder is None
    assert (feature.encode(activations()) != 0).any()
    with pytest.raises(InvalidRequest, match="cross-layer transcoder.*no decoder rows"):
        sae.decoder_row(INDEX)


class _Whole(LoadedSae):
    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def n_bytes(self) -> int:
        return 1

    def feature(self, index: int) -> FeatureWeights:
        return FeatureWeights(self.source, index, torch.ones(4), torch.zeros(()), torch.ones(4))

    def free(self) -> None: ...


class _Loader(Loader):
    def __call__(self, spec: Any, /, *, dtype: str, device: str) -> Any:
        return _Whole(super().__call__(spec, dtype=dtype, device=device).source)


class TestAsking:
    """Through the store: the whole SAE may have to come first."""

    def store(self) -> tuple[SaeStore, Loader]:
        return make(2, _Loader())

    def test_one_that_is_there_is_given_at_once_and_holds_nothing(self) -> None:
        store, _ = self.store()
        future = store.feature("5-res-t", 3)
        assert future.done()
        with future.result() as feature:
            assert (feature.source.name, feature.index) == ("5-res-t", 3)
            assert store.stats()["leased"] == 0

    def test_one_that_is_not_comes_with_its_sae(self) -> None:
        store, loader = self.store()
        gate = loader.stop_at("0-res-t")
        future = store.feature("0-res-t", 3)
        assert not future.done()
        gate.set()
        assert future.result(SOON).reader.index == 3
        assert store.stats()["leased"] == 0

    def test_who_goes_leaves_nothing_behind(self) -> None:
        store, loader = self.store()
        gate = loader.stop_at("0-res-t")
        future = store.feature("0-res-t", 3)
        assert loader.entered["0-res-t"].wait(SOON)
        assert future.cancel()
        gate.set()
        store.request("1-res-t").result(SOON).release()  # comes after it
        assert store.stats()["leased"] == 0

    def test_errors_reach_who_asked(self) -> None:
        store, _ = self.store()
        with pytest.raises(UnknownSource):
            store.feature("9-res-t", 0)
        store.close()
        closed: Future[Any] = store.feature("0-res-t", 0)
        with pytest.raises(NotReady):
            closed.result(SOON)
