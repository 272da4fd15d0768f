"""Every SAE of SAELens's directory, offline: named once, found again, or refused for a reason of a closed list."""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from typing import Any

import pytest

from neuronpedia_inference.points import Point
from neuronpedia_inference.saes import listed
from neuronpedia_inference.saes.catalogue import known_models, offered
from neuronpedia_inference.saes.directory import releases
from neuronpedia_inference.saes.listed import REFUSALS, ListedSae, derived_name, of_model
from neuronpedia_inference.saes.originals import needed_files, weight_files
from neuronpedia_inference.saes.specs import is_source_name


def every() -> list[ListedSae]:
    return [sae for model in listed.models() for sae in of_model(model)]


def test_a_walk_over_all_entries() -> None:
    """Names are unique within a model, lead back to release and id, and nothing is lost."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for model in known_models()[1:]:
        for line in offered(model):
            for spec in line.specs:
                if spec.base is None:
                    assert spec.release is not None
                    assert spec.sae_id is not None
                    assert is_source_name(spec.name)
                    assert (spec.source_set, line.source_set) == (spec.name.split("-", 1)[1],) * 2
                    assert found.setdefault((model, spec.name), (spec.release, spec.sae_id)) == (
                        spec.release,
                        spec.sae_id,
                    )
    listed_there = {(release, sae_id) for release, about in releases().items() for sae_id in about.paths}
    assert set(found.values()) == listed_there
    assert len(found) == len(listed_there) == 13857


def test_the_counts() -> None:
    saes = every()
    assert Counter(sae.refused for sae in saes) == {None: 13849, listed.EMBEDDED_TOKENS: 8}
    assert {sae.refused for sae in saes} - {None} == set(REFUSALS)
    assert Counter(sae.limited for sae in saes) == {None: 13828, listed.ACROSS_LAYERS: 26, listed.WHOLE_TEXTS: 3}
    assert Counter(sae.neuronpedia_id is not None for sae in saes) == {True: 2439, False: 11418}


@pytest.mark.parametrize(
    ("loader", "repo", "count", "refused"),
    [
        ("gemma_2", "google/gemma-scope-", 2833, 8),
        ("gemma_3", "google/gemma-scope-2-", 8784, 0),
        ("llama_scope", "fnlp/Llama3_1-8B-Base-LX", 192, 0),
        ("qwen_scope", "Qwen/SAE-Res-Qwen3", 544, 0),
        ("dictionary_learning_1", "andyrdt/saes-gpt-oss-20b", 6, 0),
    ],
)
def test_the_great_releases_are_served_whole(loader: str, repo: str, count: int, refused: int) -> None:
    """All but the SAEs on Gemma 2's embeddings; each has files to fetch and reads at a place that is known here."""
    saes = [sae for sae in every() if sae.loader == loader and sae.repo.startswith(repo)]
    served = [sae for sae in saes if sae.refused is None]
    assert (len(saes), len(saes) - len(served)) == (count, refused)
    for sae in served:
        assert sae.hook is not None
        assert Point.parse(sae.hook).name == sae.hook
        assert len(weight_files(sae.loader, sae.path)) == 1


def test_the_formats_are_those_that_saelens_reads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    for sae in every():
        assert (sae.loader or "sae_lens") in loaders.NAMED_PRETRAINED_SAE_LOADERS
        assert needed_files(sae.loader, sae.path)


def configured(sae: ListedSae) -> dict[str, Any]:
    """What SAELens's own loader says, of formats whose configuration is in names alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    getter = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[sae.loader]
    return loaders.handle_config_defaulting(getter(sae.repo, sae.path, "cpu", False, None))


@pytest.mark.parametrize("loader", ["gemma_2", "gemma_2_transcoder", "qwen_scope", "goodfire", "deepseek_r1"])
def test_hooks_widths_and_kinds_are_those_of_saelens(loader: str) -> None:
    for sae in every():
        if sae.loader == loader:
            told = configured(sae)
            assert sae.hook == told["metadata"]["hook_name"], sae
            assert sae.n_features in (None, told["d_sae"]), sae
            assert sae.kind == told["architecture"], sae


def test_derived_names_depend_on_nothing_else() -> None:
    assert derived_name("gemma-scope-2-4b-pt-res-all", "layer_17_width_16k_l0_big") == (
        "17-gemma-scope-2-4b-pt-res-all__width_16k_l0_big"
    )
    assert derived_name("gemma-scope-2-4b-pt-transcoders", "transcoder/layer_9_width_65k_l0_big_affine") == (
        "9-gemma-scope-2-4b-pt-transcoders__transcoder_width_65k_l0_big_affine"
    )
    assert derived_name("gemma-scope-9b-pt-att", "layer_3/width_16k/average_l0_12") == (
        "3-gemma-scope-9b-pt-att__width_16k-average_l0_12"
    )
    assert derived_name("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6") == (
        "e-gemma-scope-2b-pt-res__width_4k-average_l0_6"
    )
    assert derived_name("qwen-scope-3.5-27b-w80k-l50", "layer63") == "63-qwen-scope-3.5-27b-w80k-l50"
    assert derived_name("llama_scope_lxr_8x", "l0r_8x") == "0-llama_scope_lxr_8x__r_8x"
    assert derived_name("mine", "final") is None
    derived = Counter(sae.derived for sae in every())
    assert max(derived.values()) == 1
    assert not derived.keys() & {sae.name for sae in every() if sae.neuronpedia_id}


def test_names_that_the_directory_gives_to_the_wrong_sae() -> None:
    """A layer in an id is that of the name, but where Neuronpedia counts the last residual stream as a layer more."""
    apart = []
    for sae in every():
        in_id = re.search(r"blocks\.(\d+)\.|layer_?(\d+)|^l(\d+)[arm]_", sae.sae_id)
        if in_id and sae.name.split("-")[0] not in in_id.groups():
            apart.append((sae.release, sae.name))
    assert apart == [("gpt2-small-res-jb", "12-res-jb"), ("pythia-70m-deduped-res-sm", "e-res-sm")]
    assert {sae.model for sae in every() if sae.release == "gemma-scope-9b-it-res"} == {"gemma-2-9b-it"}
