"""Which SAEs the settings name: SAELens's directory, the embedded ones and local folders."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes import catalogue
from neuronpedia_inference.saes.catalogue import SaeCatalogue, aliases, known_models, offered, resolve
from neuronpedia_inference.saes.directory import Release
from neuronpedia_inference.saes.names import lookup_order
from neuronpedia_inference.settings import Settings


@pytest.fixture(autouse=True, scope="module")
def _saelens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens imports a deprecated module of TransformerLens
        importlib.import_module("sae_lens")


def asked(**fields: Any) -> SaeCatalogue:
    return resolve(Settings(_env_file=None, **fields))  # pyright: ignore[reportCallIssue]


def names(found: SaeCatalogue) -> list[str]:
    return [spec.name for spec in found.specs]


def refused(**fields: Any) -> str:
    with pytest.raises(StartupError) as caught:
        asked(**fields)
    text = str(caught.value)
    assert "\n" not in text
    return text


def folder_of(tmp_path: Path, *sources: str) -> Path:
    for source in sources:
        (tmp_path / source).mkdir(parents=True)
        (tmp_path / source / "cfg.json").write_text("{}")
    return tmp_path


class TestDirectory:
    @pytest.mark.parametrize("model", ["gpt2-small", "openai-community/gpt2", "gpt2"])
    def test_gpt2(self, model: str) -> None:
        found = asked(model_id=model, sae_sets=["res-jb"])
        assert names(found) == [f"{n}-res-jb" for n in range(13)]
        assert found.source_sets == ("res-jb",)
        assert found.model_key == "gpt2-small"
        for layer, spec in enumerate(found.specs[:12]):
            assert spec.release == "gpt2-small-res-jb"
            assert spec.sae_id == f"blocks.{layer}.hook_resid_pre"
            assert spec.neuronpedia_id == f"gpt2-small/{layer}-res-jb"
            assert spec.folder is None
        assert found.specs[12].sae_id == "blocks.11.hook_resid_post"

    def test_res_jb_is_the_default_set(self) -> None:
        assert asked(model_id="gpt2-small") == asked(model_id="gpt2-small", sae_sets=["res-jb"])

    @pytest.mark.parametrize("model", ["gemma-2-2b", "google/gemma-2-2b", "gemma-2-2b-it", "google/gemma-2-2b-it"])
    def test_gemma_and_its_instruct_fallback(self, model: str) -> None:
        found = asked(model_id=model, sae_sets=["gemmascope-res-16k"])
        assert names(found) == [f"{n}-gemmascope-res-16k" for n in range(26)]
        assert {spec.release for spec in found.specs} == {"gemma-scope-2b-pt-res-canonical"}
        assert [spec.sae_id for spec in found.specs] == [f"layer_{n}/width_16k/canonical" for n in range(26)]

    def test_instruct_models_with_saes_of_their_own_use_them(self) -> None:
        found = asked(model_id="google/gemma-2-9b-it", sae_sets=["gemmascope-res-16k"])
        assert {spec.release for spec in found.specs} == {"gemma-scope-9b-it-res-canonical"}

    @pytest.mark.parametrize(
        ("model", "source_set", "release", "count"),
        [
            ("gpt2-small", "att-kk", "gpt2-small-hook-z-kk", 12),
            ("gemma-2-2b", "gemmascope-mlp-16k", "gemma-scope-2b-pt-mlp-canonical", 26),
            ("gemma-2-2b", "gemmascope-att-16k", "gemma-scope-2b-pt-att-canonical", 26),
            ("gemma-2-2b", "gemmascope-transcoder-16k", "gemma-scope-2b-pt-transcoders", 26),
            ("llama3.1-8b-it", "resid-post-aa", "llama-3.1-8b-instruct-andyrdt", 7),
            ("openai/gpt-oss-20b", "resid-post-aa", "gpt-oss-20b-andyrdt", 6),
            ("gemma-3-270m-it", "gemmascope-2-res-16k", "gemma-scope-2-270m-it-res", 4),
            ("Qwen/Qwen3-4B", "transcoder-hp", "mwhanna-qwen3-4b-transcoders", 36),
        ],
    )
    def test_other_sets(self, model: str, source_set: str, release: str, count: int) -> None:
        found = asked(model_id=model, sae_sets=[source_set])
        assert {spec.release for spec in found.specs} == {release}
        assert len(found.specs) == count

    def test_attention_sources_carry_the_id_that_enables_attribution(self) -> None:
        found = asked(model_id="gpt2-small", sae_sets=["att-kk"])
        assert found.specs[5].neuronpedia_id == "gpt2-small/5-att-kk"

    def test_sets_come_in_the_order_asked_for(self) -> None:
        found = asked(model_id="gpt2-small", sae_sets="res-jb att-kk")
        assert found.source_sets == ("res-jb", "att-kk")
        assert len(found.specs) == 25

    def test_the_override_keeps_the_saes(self) -> None:
        found = asked(model_id="gemma-2-2b", override_model_id="gemma-2-2b-it", sae_sets=["gemmascope-res-16k"])
        assert len(found.specs) == 26

    def test_the_custom_model_looks_up_its_own(self) -> None:
        found = asked(
            model_id="meta-llama/Llama-3.1-8B",
            override_model_id="meta-llama/Llama-3.1-8B",
            custom_hf_model_id="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            sae_sets=["llamascope-slimpj-res-32k"],
            include_sae=["^15-llamascope-slimpj-res-32k$"],
        )
        assert names(found) == ["15-llamascope-slimpj-res-32k"]
        assert found.specs[0].release == "llama_scope_r1_distill"

    def test_no_sets_no_sources_whatever_the_model(self) -> None:
        assert asked(model_id="nobody/nothing", sae_sets=[]) == SaeCatalogue()

    def test_every_alias_group_with_saes_is_found_from_each_name(self) -> None:
        listed = set(known_models())
        for model in listed - {"smollm2-135m-instruct"}:
            for name in aliases(model):
                assert offered(name) == offered(model)

    def test_every_short_name_of_the_directory_is_an_alias(self) -> None:
        """Neuronpedia's short name stands before the slash of every id."""
        for model in known_models()[1:]:
            for spec in catalogue._directory()[model].values():
                short = str(spec[0].neuronpedia_id).split("/")[0]
                assert model in lookup_order(short), (model, short)

    def test_names_are_unique_within_a_model(self) -> None:
        for model, sets in catalogue._directory().items():
            every = [spec.name for group in sets.values() for spec in group]
            assert len(every) == len(set(every)), model
            assert sum(map(len, sets.values())) == len(every)
        total = sum(len(group) for sets in catalogue._directory().values() for group in sets.values())
        assert total == 2441

    def test_missing_ids_are_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = {"a": None, "c": "m/3-res-x", "d": "m/4-res-x__l0-9"}
        monkeypatch.setattr(catalogue, "releases", lambda: {"r": Release("m", "repo", {}, ids)})
        catalogue._directory.cache_clear()
        try:
            assert names(asked(model_id="m", sae_sets=["res-x"])) == ["3-res-x"]
            assert names(asked(model_id="m", sae_sets=["res-x__l0-9"])) == ["4-res-x__l0-9"]
        finally:
            catalogue._directory.cache_clear()


class TestFilters:
    def test_include_is_unanchored(self) -> None:
        found = asked(model_id="gpt2-small", include_sae=["1-res-jb"])
        assert names(found) == ["1-res-jb", "11-res-jb"]

    def test_any_include_is_enough_and_exclude_comes_after(self) -> None:
        found = asked(model_id="gpt2-small", include_sae=["^1", "^7-"], exclude_sae=["^1[01]-", "^1-"])
        assert names(found) == ["7-res-jb", "12-res-jb"]

    def test_exclude_alone(self) -> None:
        assert len(asked(model_id="gpt2-small", exclude_sae=["^12-"]).specs) == 12

    def test_an_emptied_set_is_an_error(self) -> None:
        text = refused(model_id="gpt2-small", include_sae=["^99-res-jb$"])
        assert "INCLUDE_SAE keeps no source of the set 'res-jb'" in text
        assert "9-res-jb" in text
        text = refused(model_id="gpt2-small", exclude_sae=["res"])
        assert text == "EXCLUDE_SAE leaves no source of the set 'res-jb'."

    def test_one_emptied_set_of_two_is_an_error(self) -> None:
        assert "'att-kk'" in refused(model_id="gpt2-small", sae_sets=["res-jb", "att-kk"], exclude_sae=["att"])


class TestUnknown:
    def test_model(self) -> None:
        text = refused(model_id="gpt2-smal")
        assert "Unknown model 'gpt2-smal'. Did you mean 'gpt2-small'" in text
        assert "SAE_SETS='[]'" in text

    def test_set(self) -> None:
        text = refused(model_id="gpt2-small", sae_sets=["res-jbb"])
        assert "Unknown source set 'res-jbb'. Did you mean 'res-jb'" in text

    def test_default_set_that_a_model_lacks(self) -> None:
        assert "'res-jb'" in refused(model_id="gemma-2-2b")

    def test_model_that_is_listed_without_named_saes(self) -> None:
        assert "has no SAE sets; SAE_SETS='[]'" in refused(model_id="mistral-7b", sae_sets=["res-x"])


class TestLocalFolder:
    def test_every_set_by_default_in_the_order_of_layers(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "10-res-x", "2-res-x", "0-mlp-y", "e-res-x")
        (tmp_path / "notes").mkdir()
        found = asked(model_id="nobody/nothing", local_sae_dir=folder)
        assert names(found) == ["0-mlp-y", "2-res-x", "10-res-x", "e-res-x"]
        assert found.source_sets == ("mlp-y", "res-x")
        assert found.specs[1].folder == tmp_path / "2-res-x"
        assert found.specs[1].release is found.specs[1].sae_id is found.specs[1].neuronpedia_id is None
        assert found.model_key is None

    def test_needs_no_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sae_lens.loading.pretrained_saes_directory", None)
        catalogue._directory.cache_clear()
        assert len(asked(model_id="gpt2-small", local_sae_dir=folder_of(tmp_path, "2-res-x")).specs) == 1

    def test_local_sets_win_over_the_directory(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "2-res-jb")
        found = asked(model_id="gpt2-small", local_sae_dir=folder, sae_sets=["res-jb", "att-kk"])
        assert names(found) == ["2-res-jb", *(f"{n}-att-kk" for n in range(12))]
        assert found.specs[0].folder is not None

    def test_a_set_asked_for_by_name(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "2-res-x", "2-mlp-x")
        assert names(asked(model_id=str(tmp_path), local_sae_dir=folder, sae_sets=["mlp-x"])) == ["2-mlp-x"]

    @pytest.mark.parametrize("model", ["nobody/nothing", "FOLDER"])
    def test_an_unknown_set_names_the_local_ones(self, tmp_path: Path, model: str) -> None:
        folder = folder_of(tmp_path, "2-res-x")
        model = str(tmp_path) if model == "FOLDER" else model
        text = refused(model_id=model, local_sae_dir=folder, sae_sets=["res-y"])
        assert "Unknown source set 'res-y'. Did you mean 'res-x'" in text

    def test_filters_may_empty_a_set_that_was_not_asked_for(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "2-res-x", "2-mlp-x")
        assert asked(model_id="m", local_sae_dir=folder, include_sae=["mlp"]).source_sets == ("mlp-x",)
        assert "INCLUDE_SAE" in refused(model_id="m", local_sae_dir=folder, include_sae=["att"])

    @pytest.mark.parametrize("bad", ["res", "3", "3-neurons", "-res-x"])
    def test_names_that_are_no_sources(self, tmp_path: Path, bad: str) -> None:
        assert repr(str(tmp_path / bad)) in refused(model_id="m", local_sae_dir=folder_of(tmp_path, "2-res-x", bad))

    def test_missing_and_empty_folders(self, tmp_path: Path) -> None:
        assert "is not a folder" in refused(model_id="m", local_sae_dir=tmp_path / "none")
        assert "holds no SAE folder" in refused(model_id="m", local_sae_dir=tmp_path)


class TestModelInAFolder:
    def test_has_no_saes_by_default(self, tmp_path: Path) -> None:
        assert asked(model_id=str(tmp_path)) == SaeCatalogue()

    def test_cannot_name_sets(self, tmp_path: Path) -> None:
        text = refused(model_id=str(tmp_path), sae_sets=["res-jb"])
        assert "LOCAL_SAE_DIR is needed" in text


class TestEmbedded:
    def test_is_the_default(self) -> None:
        from neuronpedia_inference import embedded

        found = asked()
        assert found.source_sets == (embedded.SOURCE_SET,) == ("res-4k",)
        assert tuple(names(found)) == embedded.SOURCES
        assert [spec.folder for spec in found.specs] == [embedded.sae_dir(name) for name in embedded.SOURCES]
        assert found.model_key == "smollm2-135m-instruct"

    def test_other_weights_keep_the_embedded_saes(self, tmp_path: Path) -> None:
        assert asked(override_model_id=str(tmp_path)) == asked()
        assert asked(model_id="HuggingFaceTB/SmolLM2-135M-Instruct") == asked()

    def test_sets_and_filters_apply(self) -> None:
        assert asked(sae_sets=["res-4k"]) == asked()
        assert names(asked(include_sae=["^15-"])) == ["15-res-4k"]
        assert "Available: res-4k." in refused(sae_sets=["res-jb"])


class TestOffer:
    def test_lists_sets_with_their_ends(self) -> None:
        by_set = {line.source_set: line for line in offered("openai-community/gpt2")}
        assert len(by_set) == 24
        line = by_set["res-jb"]
        assert (line.release, line.n_sources) == ("gpt2-small-res-jb", 13)
        assert (line.first_source, line.last_source) == ("0-res-jb", "12-res-jb")

    def test_a_set_from_two_releases_names_both(self) -> None:
        line = next(line for line in offered("pythia-70m-deduped") if line.source_set == "att-sm")
        assert line.release == "pythia-70m-deduped-att-sm, pythia-70m-deduped-res-sm"

    def test_embedded(self) -> None:
        (line,) = offered("smollm2-135m-instruct")
        assert (line.source_set, line.release, line.n_sources) == ("res-4k", "embedded", 3)

    def test_unknown_model(self) -> None:
        with pytest.raises(StartupError, match="Did you mean 'gemma-2-2b'"):
            offered("gemma-2-2bb")

    def test_known_models(self) -> None:
        known = known_models()
        assert known[0] == "smollm2-135m-instruct"
        assert {"gpt2-small", "gemma-2-2b", "meta-llama/Llama-3.1-8B"} <= set(known)
        assert "mistral-7b" not in known


def test_aliases_begin_with_the_name_itself() -> None:
    assert aliases("gpt2") == ("gpt2", "gpt2-small", "openai-community/gpt2")
    assert aliases("google/gemma-2-2b") == ("google/gemma-2-2b", "gemma-2-2b")
    assert aliases("my/own") == ("my/own",)
