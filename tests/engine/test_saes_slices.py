"""Single features read from files: to the bit what the whole SAE has, and no page more than they lie on."""

from __future__ import annotations

import importlib
import json
import os
import struct
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import sparse
from benchmarks.pages import PAGE, cached_pages, forget, pages_of
from neuronpedia_inference.errors import EngineFailed, StartupError
from neuronpedia_inference.saes.catalogue import CONFIG_NAME, WEIGHTS_NAME, SourceSpec
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.feature import FeatureWeights
from neuronpedia_inference.saes.load import load_sae
from neuronpedia_inference.saes.specs import from_folder
from neuronpedia_inference.saes.store import SaeStore
from neuronpedia_inference.saes.stored import tensors_in
from tests.engine.stores import SOON
from tests.engine.test_saes_load import BY_COLUMN, D_IN, D_SAE, WHOLE, activations, build, saved


@pytest.fixture(autouse=True, scope="module")
def _saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        importlib.import_module("sae_lens")


def stored_in(spec: SourceSpec, dtype: torch.dtype) -> SourceSpec:
    """The same with its weights in another precision on disk."""
    file = (spec.folder or Path()) / WEIGHTS_NAME
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    return spec


def equal(one: FeatureWeights, other: FeatureWeights) -> None:
    for field in fields(FeatureWeights):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize(
    ("on_disk", "dtype"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "auto"),
        ("float16", "auto"),
    ],
)
@pytest.mark.parametrize("kind", [*BY_COLUMN, *WHOLE])
def test_a_feature_is_to_the_bit_that_of_the_whole_sae(kind: str, on_disk: str, dtype: str, tmp_path: Path) -> None:
    spec = stored_in(saved(tmp_path, build(kind)), getattr(torch, on_disk))
    about = describe(spec, dtype)
    assert about.dtype == (on_disk if dtype == "auto" else dtype)
    whole = load_sae(spec, dtype=about.dtype, device="cpu")
    assert (about.source, about.n_bytes) == (whole.source, whole.n_bytes)
    for index in (0, 17, D_SAE - 1):
        equal(about.feature(index), whole.feature(index))
        assert torch.equal(about.decoder_row(index), whole.decoder_row(index))
    if kind in BY_COLUMN:
        found = torch.stack([about.feature(index).encode(activations()) for index in range(D_SAE)], dim=1)
        parts = [whole.encode_features(activations(), (index,)) for index in range(D_SAE)]
        assert torch.equal(found, torch.cat(parts, dim=1))
        assert 0 < (found != 0).float().mean() < 0.95


def test_tensors_that_are_not_known_leave_it_to_the_whole_sae(tmp_path: Path) -> None:
    spec = saved(tmp_path, build("standard"))
    file = (spec.folder or Path()) / WEIGHTS_NAME
    save_file({**load_file(file), "scaling_factor": torch.ones(D_SAE)}, file)
    assert describe(spec, "float32").layout is None
    store = SaeStore([spec], dtype="float32", device="cpu", max_loaded=1)
    store.describe_all()
    feature = store.feature(spec.name, 3).result(SOON).reader
    equal(feature, load_sae(spec, dtype="float32", device="cpu").feature(3))
    assert store.decoder_row(spec.name, 3).result(SOON).reader.norm() == pytest.approx(1)
    assert (store.stats()["loads"], store.stats()["features_read"], store.stats()["leased"]) == (1, 0, 0)


class TestFiles:
    def spec(self, folder: Path) -> SourceSpec:
        return saved(folder, build("jumprelu"))

    def test_one_that_has_changed_since_the_start_is_refused(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path)
        store = SaeStore([spec], dtype="float32", device="cpu", max_loaded=1)
        store.describe_all()
        stored_in(spec, torch.float32)
        with pytest.raises(EngineFailed, match="Feature 3 of source '3-res-t' could not be read") as caught:
            store.feature(spec.name, 3).result(SOON)
        assert "has changed" in str(caught.value.__cause__)

    def test_one_that_is_cut_off_later_gives_an_error_and_does_not_end_the_process(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path)
        about = describe(spec, "float32")
        file = (spec.folder or Path()) / WEIGHTS_NAME
        times = file.stat()
        os.truncate(file, 200)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(OSError, match="has changed"):
            about.feature(3)

    @pytest.mark.parametrize(
        ("about", "why"),
        [
            ({"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 60]}, "outside"),
            ({"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "outside"),
            ({"dtype": "F32", "shape": [2, 4], "data_offsets": [-32, 0]}, "outside"),
            ({"dtype": "I32", "shape": [2, 4], "data_offsets": [0, 32]}, "I32 is no precision"),
            ({"dtype": "F32", "shape": [2, 4]}, "data_offsets"),
            ({"dtype": "F32", "shape": "x", "data_offsets": [0, 32]}, "invalid literal"),
            ([], "list"),
        ],
    )
    def test_headers_that_lie_are_refused(self, about: Any, why: str, tmp_path: Path) -> None:
        header = json.dumps({"W_dec": about}).encode()
        file = tmp_path / "a.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
        with pytest.raises(ValueError, match=why):
            tensors_in(file)

    def test_a_start_checks_shapes(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path)
        path = (spec.folder or Path()) / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": D_SAE + 1}))
        with pytest.raises(StartupError, match=rf"its W_enc is \[{D_IN}, {D_SAE}\], its configuration says"):
            describe(spec, "float32")


# To the page


def test_no_page_is_read_beside_those_that_are_needed(tmp_path: Path) -> None:
    """Of an SAE of 65,536 features of width 2,560 in float32."""
    index, starts = 40_001, sparse.starts()
    folder = sparse.write(tmp_path / "3-res-wide", "blocks.3.hook_resid_post", [index])
    file = folder / WEIGHTS_NAME
    if not forget(file):
        pytest.skip("this file system keeps in memory what was written")
    about = describe(from_folder(folder), "auto")
    header = pages_of(0, starts["W_dec"])
    assert cached_pages(file) == header
    row = about.decoder_row(index)
    assert row.norm() == pytest.approx(1, abs=1e-6)
    needed = header | pages_of(starts["W_dec"] + 4 * index * sparse.WIDTH, 4 * sparse.WIDTH)
    assert cached_pages(file) == needed
    feature = about.feature(index)
    assert feature.decoder is not None
    assert torch.equal(feature.decoder, row)
    assert (feature.encoder != 0).all()
    column = {(starts["W_enc"] + 4 * (r * sparse.FEATURES + index)) // PAGE for r in range(sparse.WIDTH)}
    vectors = pages_of(starts["b_dec"], 4 * sparse.WIDTH)
    vectors |= {(starts[name] + 4 * index) // PAGE for name in ("b_enc", "threshold")}
    assert cached_pages(file) == needed | column | vectors
    assert len(column) == sparse.WIDTH


class TestStore:
    def store(self, folder: Path) -> SaeStore:
        store = SaeStore([saved(folder, build("gated"))], dtype="float32", device="cpu", max_loaded=1)
        store.describe_all()
        return store

    def test_no_sae_is_loaded_for_a_feature(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        with store.feature("3-res-t", 5).result(SOON) as feature:
            assert feature.index == 5
        store.decoder_row("3-res-t", 5).result(SOON)
        assert store.stats()["loads"] == 0
        assert store.stats()["features_read"] == 2

    def test_one_that_was_read_is_kept(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        first = store.feature("3-res-t", 5).result(SOON).reader
        again = store.feature("3-res-t", 5)
        assert again.done()
        assert again.result().reader is first
        assert store.stats()["features_read"] == 1

    def test_those_kept_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = self.store(tmp_path).feature("3-res-t", 0).result(SOON).reader
        monkeypatch.setattr("neuronpedia_inference.saes.slices.KEPT_BYTES", 2 * one.nbytes)
        store = self.store(tmp_path)
        for index in (0, 1, 2):
            store.feature("3-res-t", index).result(SOON)
        assert store.feature("3-res-t", 2).done()
        store.feature("3-res-t", 0).result(SOON)
        assert store.stats()["features_read"] == 4
