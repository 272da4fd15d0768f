"""Loading and encoding against SAELens itself, unfolded and folded, and against formulas written out here."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuronpedia_inference.domain import Ranking, Source
from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.saes import reduce
from neuronpedia_inference.saes.catalogue import WEIGHTS_NAME, SourceSpec
from neuronpedia_inference.saes.encode import FeatureReader, LoadedSae, NeuronReader
from neuronpedia_inference.saes.kinds import SERVED
from neuronpedia_inference.saes.load import load_sae
from neuronpedia_inference.saes.reduce import FeatureRanker, active_features, top_features
from tests.steps import result_of

D_IN, D_SAE, N_POS = 16, 48, 9

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
BY_COLUMN = ("standard", "jumprelu", "gated", *TRANSCODERS)
WHOLE = ("topk", "topk_rescaled", "abstopk", "abstopk_rescaled", "matching_pursuit")
UNCHANGED_BY_FOLDING = WHOLE


@pytest.fixture(autouse=True, scope="module")
def _saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        importlib.import_module("sae_lens")


def build(kind: str, *, seed: int = 0, hook: str | None = "blocks.3.hook_resid_post", **options: Any) -> Any:
    """A SAELens SAE whose biases, thresholds and decoder norms are all away from their neutral values."""
    from sae_lens.registry import get_sae_class

    architecture = kind.removesuffix("_rescaled")
    if "topk" in kind:
        options |= {"k": 5, "rescale_acts_by_decoder_norm": kind.endswith("_rescaled")}
    if kind in TRANSCODERS:
        options |= {"apply_b_dec_to_input": False, "d_out": D_IN + 4}
    if kind == "matching_pursuit":
        options |= {"max_iterations": 6}
    sae_class, config_class = get_sae_class(architecture)
    config = config_class(d_in=D_IN, d_sae=D_SAE, **options)
    if hook is not None:
        config.metadata.hook_name = hook
    module = sae_class(config)
    randomise(module, seed)
    return module


def randomise(module: Any, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in sorted(module.named_parameters()):
            weights.copy_(0.4 * torch.randn(weights.shape, generator=made))
            if name == "threshold":
                weights.copy_(0.2 + torch.rand(weights.shape, generator=made))
        module.W_dec.mul_(0.3 + 3 * torch.rand(len(module.W_dec), 1, generator=made))


def activations(seed: int = 7) -> Tensor:
    return 2 * torch.randn(N_POS, D_IN, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def saved(folder: Path, module: Any, name: str = "3-res-t") -> SourceSpec:
    module.save_model(folder / name)
    return SourceSpec(name, name.split("-", 1)[1], folder=folder / name)


def load(spec: SourceSpec, dtype: str = "float32") -> LoadedSae:
    return load_sae(spec, dtype=dtype, device="cpu")


@torch.no_grad()
def unfolded(spec: SourceSpec) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(spec.folder or "", device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", [*BY_COLUMN, *WHOLE])
class TestEveryArchitecture:
    def test_folding_multiplies_by_the_decoder_norms(self, kind: str, tmp_path: Path) -> None:
        spec = saved(tmp_path, build(kind))
        reference, x = unfolded(spec), activations()
        norms = reference.W_dec.detach().norm(dim=1)
        assert norms.min() < 0.9 < 1.1 < norms.max()
        plain = reference.encode(x).detach()
        assert 0 < (plain != 0).float().mean() < 0.95
        expected = plain if kind in UNCHANGED_BY_FOLDING else plain * norms
        close(load(spec).encode(x), expected)

    def test_decoder_rows_have_unit_norm_where_folded(self, kind: str, tmp_path: Path) -> None:
        spec = saved(tmp_path, build(kind))
        original, sae = unfolded(spec).W_dec.detach(), load(spec)
        rows = torch.stack([sae.decoder_row(i) for i in range(D_SAE)])
        kept = kind in ("topk", "abstopk", "matching_pursuit")
        expected = original if kept else original / original.norm(dim=1, keepdim=True)
        close(rows, expected)

    def test_parts_equal_the_whole_of_saelens(self, kind: str, tmp_path: Path) -> None:
        spec = saved(tmp_path, build(kind, seed=1))
        sae, x = load(spec), activations()
        with torch.no_grad():
            whole = sae.module.encode(x).float()
        wanted = [40, 3, 3, 0, 47]
        close(sae.encode_features(x, wanted), whole[:, wanted])
        close(sae.encode_feature(x, 11), whole[:, 11])
        for block in (1, 7, 16, 48, 500):
            firsts, parts = zip(*sae.blocks(x, block), strict=True)
            assert firsts == tuple(range(0, D_SAE, block))
            assert all(part.shape[1] <= block for part in parts)
            close(torch.cat(parts, dim=1), whole)

    def test_a_position_does_not_see_the_others(self, kind: str, tmp_path: Path) -> None:
        sae, x = load(saved(tmp_path, build(kind, seed=2))), activations()
        alone = torch.cat([sae.encode(row[None]) for row in x])
        close(sae.encode(x), alone)

    def test_the_source_says_what_was_loaded(self, kind: str, tmp_path: Path) -> None:
        sae = load(saved(tmp_path, build(kind, hook="blocks.11.hook_resid_post"), name="12-res-t"))
        architecture = kind.removesuffix("_rescaled")
        assert sae.source == Source(
            name="12-res-t",
            source_set="res-t",
            layer=11,
            hook="blocks.11.hook_resid_post",
            n_features=D_SAE,
            width=D_IN,
            architecture=architecture,
        )
        assert sae.steerable is (kind not in TRANSCODERS)
        assert architecture in SERVED
        reader: FeatureReader = sae
        assert not any(weights.requires_grad for weights in sae.module.parameters())
        assert reader.encode(activations()).dtype == torch.float32


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_input_normalisation_and_bias_in_the_shortcuts(
    kind: str, normalisation: str, apply_b_dec: bool, tmp_path: Path
) -> None:
    options = {"normalize_activations": normalisation, "apply_b_dec_to_input": apply_b_dec}
    spec = saved(tmp_path, build(kind, seed=3, **options))
    sae, x = load(spec), activations()
    raw = {name: weights.double() for name, weights in load_file((spec.folder or Path()) / WEIGHTS_NAME).items()}
    expected = by_hand(raw, x.double(), normalisation, apply_b_dec).float()
    assert 0 < (expected != 0).float().mean() < 0.95
    close(sae.encode(x), expected)
    close(sae.encode_features(x, range(D_SAE)), expected)


def by_hand(raw: dict[str, Tensor], x: Tensor, normalisation: str, apply_b_dec: bool) -> Tensor:
    """Activations after folding, from the saved weights alone."""
    if normalisation == "layer_norm":
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=1) + 1e-5)
    elif normalisation == "constant_norm_rescale":
        x = x * D_IN**0.5 / x.norm(dim=1, keepdim=True)
    x = x - raw["b_dec"] if apply_b_dec else x
    norms, product = raw["W_dec"].norm(dim=1), x @ raw["W_enc"]
    if "b_gate" in raw:
        magnitude = product * raw["r_mag"].exp() + raw["b_mag"]
        return norms * magnitude.clamp(min=0) * (product + raw["b_gate"] > 0)
    before = product + raw["b_enc"]
    return norms * before.clamp(min=0) * (before > raw.get("threshold", torch.tensor(0.0)))


def test_encoder_columns_carry_the_decoder_norm(tmp_path: Path) -> None:
    spec = saved(tmp_path, build("jumprelu"))
    raw = load_file((spec.folder or Path()) / WEIGHTS_NAME)
    sae = load(spec)
    for index in (0, 17, 47):
        expected = raw["W_enc"][:, index] * raw["W_dec"][index].norm()
        close(sae.encoder_column(index), expected)


def test_rows_and_columns_are_copies(tmp_path: Path) -> None:
    sae = load(saved(tmp_path, build("standard")))
    row, column = sae.decoder_row(2), sae.encoder_column(2)
    row.zero_()
    column.zero_()
    assert sae.decoder_row(2).norm() > 0.5
    assert sae.encoder_column(2).norm() > 0
    assert row.untyped_storage().nbytes() == D_IN * 4


def test_a_zero_decoder_row_stays_finite(tmp_path: Path) -> None:
    module = build("standard")
    with torch.no_grad():
        module.W_dec[5] = 0
    sae = load(saved(tmp_path, module))
    assert sae.encode(activations()).isfinite().all()
    assert sae.decoder_row(5).tolist() == [0.0] * D_IN


def test_batchtopk_arrives_as_jumprelu(tmp_path: Path) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    module = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4))
    randomise(module, 5)
    module.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    module.topk_threshold = torch.tensor(0.8, dtype=torch.double)
    module.save_inference_model(tmp_path / "1-mlp-t")
    sae = load(SourceSpec("1-mlp-t", "mlp-t", folder=tmp_path / "1-mlp-t"))
    assert sae.source.architecture == "jumprelu"
    x = activations()
    with torch.no_grad():
        # Such an SAE is trained as if decoder rows had unit norm; its one threshold is in those units.
        before = module.W_dec.norm(dim=1) * ((x - module.b_dec) @ module.W_enc + module.b_enc)
        expected = before * (before > 0.8)
    assert ((before > 0) & (before <= 0.8)).any()
    close(sae.encode(x), expected)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_bfloat16_weights_give_float32_answers(kind: str, tmp_path: Path) -> None:
    spec = saved(tmp_path, build(kind))
    sae, x = load(spec, "bfloat16"), activations()
    assert {weights.dtype for weights in sae.module.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        whole = sae.module.encode(x.bfloat16()).float()
    assert sae.encode(x).dtype == torch.float32
    assert sae.decoder_row(0).dtype == sae.encoder_column(0).dtype == torch.float32
    close(sae.encode(x), whole)
    torch.testing.assert_close(sae.encode_features(x, range(D_SAE)), whole, rtol=1e-2, atol=1e-2)
    # Against full precision: bfloat16 has 8 bits, and what lies near a threshold may fall on its other side.
    off = (whole - load(spec).encode(x)).abs() > 0.05 * whole.abs() + 0.1
    assert off.float().mean() < 0.03


def test_loading_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    spec = saved(tmp_path, build("jumprelu"))
    weights = (spec.folder or Path()) / WEIGHTS_NAME
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    first = load(spec).encode(activations())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    close(load(spec).encode(activations()), first)


class TestAttentionOutputs:
    def load(self, folder: Path, name: str, **options: Any) -> LoadedSae:
        module = build("standard", hook="blocks.2.attn.hook_z", reshape_activations="hook_z")
        for key, value in options.items():
            module.cfg.metadata[key] = value
        return load(saved(folder, module, name))

    def test_heads_come_concatenated(self, tmp_path: Path) -> None:
        sae, x = self.load(tmp_path, "2-att-kk"), activations()
        heads = x.reshape(N_POS, 4, D_IN // 4)
        with torch.no_grad():
            reference = unfolded(SourceSpec("", "", folder=tmp_path / "2-att-kk"))
            expected = reference.encode(heads) * reference.W_dec.norm(dim=1)
        close(sae.encode(x), expected)
        close(sae.encode_feature(x, 9), expected[:, 9])
        assert sae.source.width == D_IN
        assert sae.source.layer == 2

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("2-att-kk", {}, True),
            ("2-z-kk", {}, False),
            ("2-z-kk", {"neuronpedia_id": "gpt2-small/2-att-kk"}, True),
            ("2-z-kk", {"neuronpedia_id": "gpt2-small/2-att_32k-oai"}, True),
            ("2-z-kk", {"neuronpedia_id": "gpt2-small/2-attention"}, False),
        ],
    )
    def test_attribution_goes_by_the_name(
        self, tmp_path: Path, name: str, options: dict[str, str], expected: bool
    ) -> None:
        assert self.load(tmp_path, name, **options).source.has_dfa is expected

    def test_no_attribution_off_hook_z(self, tmp_path: Path) -> None:
        sae = load(saved(tmp_path, build("standard", hook="blocks.2.hook_attn_out"), "2-att-kk"))
        assert not sae.source.has_dfa


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "topk", "abstopk"])
def test_reductions_in_blocks_equal_those_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = load(saved(tmp_path, build(kind))), activations()
    whole = sae.encode(x)
    monkeypatch.setattr(reduce, "block_of", lambda x: 7)
    expected = whole.sort(dim=1, descending=True, stable=True)
    found = result_of(top_features(sae, x, 6))
    assert found.indices.tolist() == expected.indices[:, :6].tolist()
    close(torch.tensor(found.values), expected.values[:, :6])
    n_active, active = result_of(active_features(sae, x, most=whole.numel()))
    assert active is not None
    assert n_active == int((whole != 0).sum())
    for index, positions, values in map(active.__getitem__, range(len(active))):
        assert positions == whole[:, index].nonzero()[:, 0].tolist()
        close(torch.tensor(values), whole[positions, index])
    ranker = FeatureRanker(Ranking(10))
    result_of(ranker.add(sae, x))
    ranked = ranker.result()
    order = whole[1:].amax(dim=0).clamp(min=0).sort(descending=True, stable=True)
    assert ranked.indices.tolist() == order.indices[:10].tolist()
    largest = [ranked[row].max_value for row in range(10)]
    assert largest == sorted(ranked.values.max(axis=1).tolist(), reverse=True)
    close(torch.tensor(ranked.values[:, 1:]), whole[1:, order.indices[:10]].T.contiguous())


class TestNearestRows:
    def test_against_float64(self, tmp_path: Path) -> None:
        sae = load(saved(tmp_path, build("standard")))
        query = torch.randn(D_IN, generator=torch.Generator().manual_seed(3))
        rows = sae.module.W_dec.detach().double()
        cosine = torch.nn.functional.cosine_similarity(rows, query.double()[None], dim=1)
        expected = sorted(enumerate(cosine.tolist()), key=lambda pair: -pair[1])[:10]
        found = sae.nearest_decoder_rows(query, 10)
        assert [value.index for value in found] == [index for index, _ in expected]
        assert [value.value for value in found] == pytest.approx([value for _, value in expected], abs=1e-6)

    def test_the_own_row_comes_first(self, tmp_path: Path) -> None:
        found = (sae := load(saved(tmp_path, build("gated")))).nearest_decoder_rows(sae.decoder_row(13), 3)
        assert found[0].index == 13
        assert found[0].value == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize(("k", "expected"), [(-3, 1), (0, 1), (1, 1), (20, 20), (48, 48), (5000, 48)])
    def test_the_number_of_results_is_cut(self, tmp_path: Path, k: int, expected: int) -> None:
        sae = load(saved(tmp_path, build("standard")))
        assert len(sae.nearest_decoder_rows(torch.ones(D_IN), k)) == expected

    def test_rows_with_nan_rank_last_as_zero(self, tmp_path: Path) -> None:
        sae = load(saved(tmp_path, build("standard")))
        with torch.no_grad():
            sae.module.W_dec[[4, 30], 2] = float("nan")
        found = sae.nearest_decoder_rows(torch.ones(D_IN), D_SAE)
        assert [(value.index, value.value) for value in found[-2:]] == [(4, 0.0), (30, 0.0)]
        assert found[-3].value < 0

    def test_a_zero_query_is_zero_everywhere(self, tmp_path: Path) -> None:
        found = load(saved(tmp_path, build("standard"))).nearest_decoder_rows(torch.zeros(D_IN), 4)
        assert [(value.index, value.value) for value in found] == [(i, 0.0) for i in range(4)]

    def test_a_query_of_another_width_is_refused(self, tmp_path: Path) -> None:
        sae = load(saved(tmp_path, build("standard")))
        with pytest.raises(InvalidRequest, match=rf"5 numbers.*3-res-t.*{D_IN}"):
            sae.nearest_decoder_rows(torch.ones(5), 3)


class TestNeurons:
    source = Source("3", "neurons", 3, "blocks.3.mlp.hook_post", D_IN, D_IN, "neurons")

    def test_the_tensor_is_the_activations(self) -> None:
        reader: FeatureReader = NeuronReader(self.source)
        x = activations().half()
        assert torch.equal(reader.encode(x), x.float())
        assert torch.equal(reader.encode_feature(x, 5), x[:, 5].float())
        assert torch.equal(reader.encode_features(x, [5, 5, 1]), x[:, [5, 5, 1]].float())
        parts = dict(reader.blocks(x, 5))
        assert list(parts) == [0, 5, 10, 15]
        assert torch.equal(torch.cat(list(parts.values()), dim=1), x.float())
        assert not reader.steerable

    def test_there_are_no_rows_and_columns(self) -> None:
        reader = NeuronReader(self.source)
        with pytest.raises(InvalidRequest, match="neurons: it has no decoder"):
            reader.decoder_row(0)
        with pytest.raises(InvalidRequest, match="no encoder"):
            reader.encoder_column(0)
        with pytest.raises(InvalidRequest, match="no decoder"):
            reader.nearest_decoder_rows(torch.ones(3), 1)
