"""Which SAEs the settings name: SAELens's directory, the embedded ones and local folders."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes import directory
from neuronpedia_inference.saes.catalogue import OfferedSet, SaeCatalogue, aliases, known_models, offered, resolve
from neuronpedia_inference.saes.listed import EMBEDDED_TOKENS, of_model
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
            for sae in of_model(model):
                if sae.neuronpedia_id is not None:
                    short = sae.neuronpedia_id.split("/")[0]
                    assert model in lookup_order(short), (model, short)

    def test_sets_of_many_kinds_are_reached_by_derived_names(self) -> None:
        found = asked(model_id="Qwen/Qwen3.5-27B", sae_sets=["qwen-scope-3.5-27b-w80k-l50"])
        assert [spec.sae_id for spec in found.specs] == [f"layer{n}" for n in range(64)]
        found = asked(model_id="gemma-3-4b", sae_sets=["gemma-scope-2-4b-pt-att-all__width_16k_l0_big"])
        assert names(found)[:2] == [f"{n}-gemma-scope-2-4b-pt-att-all__width_16k_l0_big" for n in (0, 1)]
        assert [spec.sae_id for spec in found.specs] == [f"layer_{n}_width_16k_l0_big" for n in range(34)]

    def test_one_source_is_a_set_of_one(self) -> None:
        found = asked(model_id="gemma-2-2b", sae_sets=["20-gemmascope-res-16k", "11-gemmascope-res-16k"])
        assert names(found) == ["20-gemmascope-res-16k", "11-gemmascope-res-16k"]

    def test_sources_sort_by_layer(self) -> None:
        for line in offered("pythia-70m-deduped"):
            layers = [spec.name.split("-")[0] for spec in line.specs]
            assert layers == sorted(layers, key=lambda layer: (layer == "e", layer != "e" and int(layer)))
        (res,) = (line for line in offered("pythia-70m-deduped") if line.source_set == "res-sm")
        assert [spec.name for spec in res.specs] == [*(f"{n}-res-sm" for n in range(6)), "e-res-sm"]


class TestDefaultSet:
    @pytest.mark.parametrize(
        ("model", "source_set", "count"),
        [
            ("gpt2-small", "res-jb", 13),
            ("gemma-2-2b", "gemmascope-res-16k", 26),
            ("google/gemma-2-2b-it", "gemmascope-res-16k", 26),
            ("gemma-2-9b-it", "gemmascope-res-16k", 3),
            ("llama3.1-8b", "llamascope-res-32k", 32),
            ("gemma-3-4b", "gemmascope-2-res-16k", 4),
            ("gemma-3-12b-it", "gemma-scope-2-12b-it-res-all__width_16k_l0_big", 48),
            ("Qwen/Qwen3.5-27B", "qwen-scope-3.5-27b-w80k-l50", 64),
            ("qwen3-1.7b", "qwen-scope-3-1.7b-base-w32k-l50", 28),
            ("openai/gpt-oss-20b", "resid-post-aa", 6),
        ],
    )
    def test_is_on_the_residual_stream(self, model: str, source_set: str, count: int) -> None:
        found = asked(model_id=model)
        assert found.source_sets == (source_set,)
        assert len(found.specs) == count
        assert [line.source_set for line in offered(model) if line.is_default] == [source_set]

    def test_every_model_starts_by_its_name_alone_or_says_why_not(self) -> None:
        without = [model for model in known_models() if not any(line.is_default for line in offered(model))]
        assert without == ["qwen3-4b", "qwen3-14b", "qwen3-0.6b"]
        for model in without:
            text = refused(model_id=model)
            assert f"{model} has no SAEs that read the residual stream" in text
            assert offered(model)[0].source_set in text


class TestBaseModel:
    def test_its_sets_are_offered_and_marked(self) -> None:
        by_base: dict[str | None, list[OfferedSet]] = {}
        for line in offered("google/gemma-3-12b-it"):
            by_base.setdefault(line.base, []).append(line)
        assert by_base.keys() == {None, "google/gemma-3-12b-pt"}
        assert sum(len(line.specs) for line in by_base[None]) == len(of_model("google/gemma-3-12b-it"))
        assert sum(len(line.specs) for line in by_base["google/gemma-3-12b-pt"]) == len(
            of_model("google/gemma-3-12b-pt")
        )
        found = asked(model_id="gemma-3-12b-it", sae_sets=["gemmascope-2-res-16k"])
        assert {spec.release for spec in found.specs} == {"gemma-scope-2-12b-pt-res"}
        assert {spec.base for spec in found.specs} == {"google/gemma-3-12b-pt"}

    def test_a_name_is_that_of_the_models_own(self) -> None:
        (own,) = (line for line in offered("gemma-2-9b-it") if line.source_set == "gemmascope-res-16k")
        assert (own.base, own.release, len(own.specs)) == (None, "gemma-scope-9b-it-res-canonical", 3)
        other = asked(model_id="gemma-2-9b-it", sae_sets=["gemma-scope-9b-pt-res-canonical__width_16k-canonical"])
        assert {spec.neuronpedia_id for spec in other.specs} == {
            f"gemma-2-9b/{n}-gemmascope-res-16k" for n in range(42)
        }

    @pytest.mark.parametrize("model", ["gemma-2-9b-it", "gemma-3-27b-it", "qwen3-8b", "llama3.1-8b-it"])
    def test_names_stay_unique(self, model: str) -> None:
        every = [spec.name for line in offered(model) for spec in line.specs]
        assert len(every) == len(set(every))


class TestAddresses:
    def test_release_and_id(self) -> None:
        found = asked(model_id="gpt2-small", sae_sets=["gpt2-small-res-jb/blocks.11.hook_resid_post"])
        assert (names(found), found.specs[0].release) == (["12-res-jb"], "gpt2-small-res-jb")
        assert found.specs == asked(model_id="gpt2-small", sae_sets=["12-res-jb"]).specs

    def test_an_id_with_slashes(self) -> None:
        word = "gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_69"
        (spec,) = asked(model_id="gemma-2-2b", sae_sets=[word]).specs
        assert (spec.release, f"{spec.release}/{spec.sae_id}", spec.address) == ("gemma-scope-2b-pt-res", word, word)

    def test_an_sae_of_another_model_goes_by_its_derived_name(self, tmp_path: Path) -> None:
        word = "gpt2-small-res-jb/blocks.7.hook_resid_pre"
        (spec,) = asked(model_id=str(tmp_path), sae_sets=[word]).specs
        assert (spec.name, spec.source_set) == (
            "7-gpt2-small-res-jb__hook_resid_pre",
            "gpt2-small-res-jb__hook_resid_pre",
        )

    def test_a_repository_of_the_hub(self) -> None:
        found = asked(model_id="gpt2-small", sae_sets=["hf://me/my-saes/run_3/blocks.7.hook_resid_pre"])
        (spec,) = found.specs
        assert (spec.name, spec.repo, spec.path) == (
            "7-me-my-saes__run_3_hook_resid_pre",
            "me/my-saes",
            "run_3/blocks.7.hook_resid_pre",
        )
        assert spec.release is spec.folder is None

    def test_a_repository_that_the_directory_lists_is_that_release(self) -> None:
        word = "hf://google/gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_medium"
        (spec,) = asked(model_id="gemma-3-4b", sae_sets=[word]).specs
        assert (spec.name, spec.release) == ("17-gemmascope-2-res-16k", "gemma-scope-2-4b-pt-res")

    def test_names_of_ones_own(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "checkpoint")
        words = [
            f"7-mine={folder}/checkpoint",
            "8-mine=hf://me/saes/final",
            "9-mine=gpt2-small-res-jb/blocks.7.hook_resid_pre",
        ]
        found = asked(model_id="gpt2-small", sae_sets=words)
        assert names(found) == ["7-mine", "8-mine", "9-mine"]
        assert (found.specs[0].folder, found.specs[1].path) == (folder / "checkpoint", "final")

    def test_folders(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "10-res-x", "2-res-x", "layer_3_best")
        assert names(asked(model_id="m", sae_sets=[f"{folder}/2-res-x"])) == ["2-res-x"]
        assert names(asked(model_id="m", sae_sets=[str(folder)])) == ["3-local__best", "2-res-x", "10-res-x"]
        assert names(asked(model_id="m", local_sae_dir=folder / "2-res-x")) == ["2-res-x"]

    def test_beside_names_and_once(self) -> None:
        words = ["res-jb", "gpt2-small-res-jb/blocks.7.hook_resid_pre", "7-res-jb"]
        assert asked(model_id="gpt2-small", sae_sets=words) == asked(model_id="gpt2-small", sae_sets=["res-jb"])

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("gpt2-small-res-jbb/blocks.7.hook_resid_pre", "Did you mean 'gpt2-small-res-jb'"),
            ("gpt2-small-res-jb/blocks.77.hook_resid_pre", "Unknown SAE of gpt2-small-res-jb 'blocks.77"),
            ("saes/7-res-x", "A folder is written ./saes/7-res-x"),
            ("./nowhere/at-all", "there is no folder 'nowhere/at-all'"),
            ("hf://me/my-saes", "not of the form hf://owner/repo/path"),
            ("hf://me/my-saes/../../etc", "not of the form hf://owner/repo/path"),
            ("hf://me/my-saes/final", "names no layer: give it a name, such as 7-my-set=hf://me/my-saes/final"),
            ("mine=hf://me/my-saes/final", "'mine' in 'mine=hf://me/my-saes/final' is not the name of a source"),
            ("3-neurons=hf://me/my-saes/final", "is not the name of a source"),
        ],
    )
    def test_mistakes_are_one_line(self, word: str, says: str) -> None:
        assert says in refused(model_id="gpt2-small", sae_sets=[word])

    def test_two_saes_of_one_name(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "7-res-jb")
        text = refused(model_id="gpt2-small", sae_sets=["7-res-jb", f"{folder}/7-res-jb"])
        assert "are both called '7-res-jb': give one another name" in text


class TestWhatIsNotServed:
    @pytest.mark.parametrize(
        ("word", "why"),
        [("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", EMBEDDED_TOKENS)],
    )
    def test_is_listed_and_refused_with_the_reason(self, word: str, why: str) -> None:
        assert f"is not served: {why}; EXCLUDE_SAE leaves it out." in refused(model_id="gemma-2-2b", sae_sets=[word])
        assert any(why in line.refused for line in offered("gemma-2-2b"))


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
        monkeypatch.setattr(directory, "_source", lambda: tmp_path / "nowhere")
        directory.releases.cache_clear()
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

    def test_the_folder_of_one_sae_is_that_one(self, tmp_path: Path) -> None:
        """Where the folder around it was meant, its files would be looked for in folders that they do not have."""
        folder = folder_of(tmp_path, "2-res-x", "3-res-x")
        found = asked(model_id="m", local_sae_dir=folder / "2-res-x")
        assert (names(found), found.specs[0].folder) == (["2-res-x"], folder / "2-res-x")

    def test_missing_and_empty_folders(self, tmp_path: Path) -> None:
        assert "there is no folder" in refused(model_id="m", local_sae_dir=tmp_path / "none")
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
    def test_lists_sets_with_their_sources(self) -> None:
        by_set = {line.source_set: line for line in offered("openai-community/gpt2")}
        assert len(by_set) == 25
        line = by_set["res-jb"]
        assert (line.release, line.base, line.refused) == ("gpt2-small-res-jb", None, {})
        assert [spec.name for spec in line.specs] == [f"{n}-res-jb" for n in range(13)]

    def test_embedded(self) -> None:
        (line,) = offered("smollm2-135m-instruct")
        assert (line.source_set, line.release, len(line.specs), line.is_default) == ("res-4k", "embedded", 3, True)

    def test_unknown_model(self) -> None:
        with pytest.raises(StartupError, match="Did you mean 'gemma-2-2b'"):
            offered("gemma-2-2bb")

    def test_known_models(self) -> None:
        known = known_models()
        assert known[0] == "smollm2-135m-instruct"
        assert {"gpt2-small", "gemma-2-2b", "meta-llama/Llama-3.1-8B"} <= set(known)
        assert "mistral-7b" in known


def test_aliases_begin_with_the_name_itself() -> None:
    assert aliases("gpt2") == ("gpt2", "gpt2-small", "openai-community/gpt2")
    assert aliases("google/gemma-2-2b") == ("google/gemma-2-2b", "gemma-2-2b")
    assert aliases("my/own") == ("my/own",)
