"""Temporal SAEs, whose encoder attends to earlier positions, against their formulas, position by position."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuronpedia_inference.costs import reduce_bytes
from neuronpedia_inference.domain import Tokens
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.questions import PredictedSimilarity
from neuronpedia_inference.saes import reduce
from neuronpedia_inference.saes.catalogue import WEIGHTS_NAME, SourceSpec, hub_location, resolve
from neuronpedia_inference.saes.describe import describe
from neuronpedia_inference.saes.encode import LoadedSae
from neuronpedia_inference.saes.listed import WHOLE_TEXTS
from neuronpedia_inference.saes.load import load_on_host, place_on_device
from neuronpedia_inference.settings import Settings
from tests.allocation import allocated_at_the_peak
from tests.temporal_by_hand import D_SAE, Temporal

D_IN, N_POS = 32, 9
HOOK = "blocks.12.hook_resid_post"
ONES = [Temporal(D_IN, HOOK), Temporal(D_IN, HOOK, tied=False), Temporal(D_IN, HOOK, n_layers=2)]
X = 4 * torch.randn(N_POS, D_IN, generator=torch.Generator().manual_seed(5))


def in_folder(folder: Path, one: Temporal) -> SourceSpec:
    one.module().save_model(folder / "12-temporal-res")
    return SourceSpec("12-temporal-res", "temporal-res", folder=folder / "12-temporal-res")


def close(found: Tensor, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def check_numbers(sae: LoadedSae, one: Temporal) -> None:
    novel, predicted = one.codes(X)
    close(sae.encode(X), novel)
    close(sae.predicted(X), predicted)
    strongest = int(novel.max(0).argmax())
    close(sae.encode_features(X, [3, strongest]), novel[:, [3, strongest]])
    close(sae.encode_feature(X, strongest), novel[:, strongest])
    close(torch.cat([block for _, block in sae.blocks(X, 20)], dim=1), novel)
    alone = torch.cat([sae.encode(row[None]) for row in X])
    assert float((alone - sae.encode(X))[1:].abs().max()) > 0.05 * novel.max(), "positions do see those before"
    close(sae.encode(X[:4]), novel[:4])  # and none behind them


@pytest.mark.parametrize("one", ONES, ids=["tied", "apart", "two layers"])
def test_codes_are_those_of_the_formula_from_a_folder(tmp_path: Path, one: Temporal) -> None:
    spec = in_folder(tmp_path, one)
    sae = load_on_host(spec, dtype="float32")
    assert (sae.source.architecture, sae.source.hook, sae.source.n_heads) == ("temporal", HOOK, 2)
    check_numbers(sae, one)
    about = describe(spec, "auto")
    assert (about.dtype, about.n_bytes) == ("float32", sae.n_bytes)
    weights = one.weights
    for where in (about.feature(7), sae.feature(7)):
        close(where.encoder_column(7), weights.get("W_enc", weights["W_dec"].T)[:, 7].numpy())
        assert where.decoder is not None
        close(where.decoder, weights["W_dec"][7].numpy())
        assert where.offsets == (None, None)
    close(about.decoder_row(7), weights["W_dec"][7].numpy())
    check_numbers(place_on_device(sae, "cpu"), one)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_the_authors_files_are_read_from_the_hub_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    [spec] = resolve(Settings.read(model_id="gemma-2-2b", sae_sets=("temporal-res",))).specs
    assert spec.listed is not None
    assert (spec.listed.refused, spec.listed.limited, spec.listed.hook) == (None, WHOLE_TEXTS, HOOK)
    repo, path = hub_location(spec)
    folder = tmp_path / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    one = Temporal(D_IN, HOOK, tied=tied)
    one.write_original(folder / "snapshots" / ("0" * 40) / path)
    sae = load_on_host(spec, dtype="float32")
    assert sae.source.hook == HOOK
    check_numbers(sae, one)
    close(describe(spec, "float32").decoder_row(7), one.weights["W_dec"][7].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_sixteen_bits_it_is_near_what_it_is_in_thirty_two(tmp_path: Path, dtype: torch.dtype) -> None:
    """Roundings are of one part in 2048 or 256; what they change of the attention adds up."""
    name = str(dtype).removeprefix("torch.")
    sae = load_on_host(in_folder(tmp_path, ONES[0]), dtype=name)
    assert {weights.dtype for weights in sae.module.parameters()} == {dtype}
    wanted = ONES[0].codes(X)[1]
    found = sae.predicted(X)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - wanted).max() < 20 * torch.finfo(dtype).eps * np.abs(wanted).max()


def test_a_file_of_other_sizes_is_refused_before_it_is_used(tmp_path: Path) -> None:
    spec = in_folder(tmp_path, ONES[0])
    file = (spec.folder or tmp_path) / WEIGHTS_NAME
    name = "attn_layers.0.v_ctx.weight"
    save_file({**load_file(file), name: torch.zeros(D_SAE, 2)}, file)
    with pytest.raises(StartupError, match=rf"its {name} is \[48, 2\], its configuration says \[48, 48\]"):
        describe(spec, "float32")


def test_what_is_predicted_alike_is_a_cosine(tmp_path: Path) -> None:
    sae = load_on_host(in_folder(tmp_path, ONES[0]), dtype="float32")
    found = torch.tensor(reduce.predicted_similarity(sae, X))
    close(found[1:, 1:], ONES[0].similarity(X))
    torch.testing.assert_close(found.diagonal(), torch.ones(N_POS))
    alone = torch.tensor(reduce.predicted_similarity(sae, X[:1]))
    assert alone.tolist() == [[0]], "the mean of one is itself"


@pytest.mark.parametrize("n_positions", [40, 300])
def test_it_stays_within_its_demand(tmp_path: Path, n_positions: int) -> None:
    sae = load_on_host(in_folder(tmp_path, ONES[0]), dtype="float32")
    text = Tokens((1,) * n_positions, ("t",) * n_positions, (False,) * n_positions, False)
    x = torch.randn(n_positions, D_IN)
    asked = PredictedSimilarity(text, sae.source)
    assert allocated_at_the_peak(lambda: sae.encode(x)) <= reduce_bytes([text], [sae.source])
    assert allocated_at_the_peak(lambda: reduce.predicted_similarity(sae, x)) <= asked.n_bytes
