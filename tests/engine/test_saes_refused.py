"""SAEs that are not served, each with its reason in one line, and what SAELens's directory is asked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.saes.catalogue import CONFIG_NAME, WEIGHTS_NAME, SourceSpec, hub_location
from neuronpedia_inference.saes.files import Files
from neuronpedia_inference.saes.originals import loaders_of
from tests.engine.test_saes_load import build, close, load, saved


class TestRefusals:
    def refused(self, spec: SourceSpec) -> str:
        with pytest.raises(StartupError) as caught:
            load(spec)
        text = str(caught.value)
        assert "\n" not in text
        assert repr(spec.name) in text
        return text

    def edit(self, spec: SourceSpec, **changes: Any) -> None:
        path = (spec.folder or Path()) / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_unheard_of_architecture(self, tmp_path: Path) -> None:
        spec = saved(tmp_path, build("standard"))
        self.edit(spec, architecture="crosscoder")
        assert "'crosscoder'" in self.refused(spec)

    @pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
    def test_another_activation_than_relu(self, tmp_path: Path, key: str) -> None:
        spec = saved(tmp_path, build("standard"))
        self.edit(spec, **{key: "relu"})
        load(spec)
        self.edit(spec, **{key: "tanh-relu"})
        assert "its activation 'tanh-relu' is not served" in self.refused(spec)

    @pytest.mark.parametrize("hook", [None, "hook_embed", "", "blocks.x.hook_resid_post"])
    def test_hook_without_a_layer(self, tmp_path: Path, hook: str | None) -> None:
        assert "hook_name" in self.refused(saved(tmp_path, build("standard", hook=hook)))

    def test_misspelt_hook_key(self, tmp_path: Path) -> None:
        spec = saved(tmp_path, build("standard"))
        self.edit(spec, metadata={"hook_nane": "blocks.3.hook_resid_post", "sae_lens_version": "6.0.0"})
        assert "hook_name" in self.refused(spec)

    def test_single_head(self, tmp_path: Path) -> None:
        module = build("standard", hook="blocks.3.attn.hook_q")
        module.cfg.metadata.hook_head_index = 2
        assert "one attention head" in self.refused(saved(tmp_path, module))

    @pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
    def test_scaling_that_was_never_folded(self, tmp_path: Path, normalisation: str) -> None:
        spec = saved(tmp_path, build("standard", normalize_activations=normalisation))
        assert normalisation in self.refused(spec)

    @pytest.mark.parametrize("file", [CONFIG_NAME, WEIGHTS_NAME])
    def test_missing_file(self, tmp_path: Path, file: str) -> None:
        spec = saved(tmp_path, build("standard"))
        path = (spec.folder or Path()) / file
        path.unlink()
        assert str(path) in self.refused(spec)

    @pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "pickle"])
    def test_broken_weights(self, tmp_path: Path, damage: str) -> None:
        spec = saved(tmp_path, build("standard"))
        path = (spec.folder or Path()) / WEIGHTS_NAME
        whole = path.read_bytes()
        marker = tmp_path / "executed"
        path.write_bytes(
            {
                "truncate": whole[: len(whole) // 2],
                "garbage": b"\xff" * 400,
                "empty": b"",
                "pickle": pickle.dumps(_Bomb(str(marker))),
            }[damage]
        )
        assert str(path) in self.refused(spec)
        assert not marker.exists()

    def test_weights_only_as_pickle_are_not_looked_at(self, tmp_path: Path) -> None:
        spec = saved(tmp_path, build("standard"))
        path = (spec.folder or Path()) / WEIGHTS_NAME
        torch.save(load_file(path), path.with_suffix(".pt"))
        path.unlink()
        assert str(path) in self.refused(spec)

    def test_weights_of_another_shape(self, tmp_path: Path) -> None:
        spec = saved(tmp_path, build("standard"))
        path = (spec.folder or Path()) / WEIGHTS_NAME
        save_file({k: v[..., :10].contiguous() for k, v in load_file(path).items()}, path)
        assert str(path) in self.refused(spec)

    def test_weights_of_another_architecture(self, tmp_path: Path) -> None:
        spec = saved(tmp_path, build("gated"))
        self.edit(spec, architecture="jumprelu")
        self.refused(spec)

    @pytest.mark.parametrize("text", ["{", "[]", "null", '{"architecture": "standard"}'])
    def test_broken_config(self, tmp_path: Path, text: str) -> None:
        spec = saved(tmp_path, build("standard"))
        ((spec.folder or Path()) / CONFIG_NAME).write_text(text)
        assert str(spec.folder) in self.refused(spec)


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


class TestDirectory:
    spec = SourceSpec(
        "12-res-jb", "res-jb", "gpt2-small-res-jb", "blocks.11.hook_resid_post", None, "gpt2-small/12-res-jb"
    )

    @pytest.fixture(autouse=True)
    def _is_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def found(spec: SourceSpec) -> Files:
            return Files(tmp_path, hub_location(spec)[1], loaders_of(spec)[0])

        monkeypatch.setattr("neuronpedia_inference.saes.describe.files_of", found)

    def test_asks_saelens_for_release_and_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from sae_lens import SAE

        module = build("standard", hook="blocks.11.hook_resid_post")
        asked: list[Any] = []

        def from_pretrained(release: str, sae_id: str, **options: Any) -> Any:
            asked.append((release, sae_id, options))
            return module

        monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
        sae = load(self.spec)
        assert asked == [(self.spec.release, self.spec.sae_id, {"device": "cpu", "dtype": "float32"})]
        assert (sae.source.layer, sae.source.name) == (11, "12-res-jb")
        close(sae.decoder_row(3).norm(), torch.tensor(1.0))

    def test_attribution_goes_by_the_neuronpedia_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from sae_lens import SAE

        spec = SourceSpec("5-att-kk", "att-kk", "gpt2-small-hook-z-kk", "blocks.5.hook_z", None, "gpt2-small/5-att-kk")
        (tmp_path / hub_location(spec)[1]).touch()
        module = build("standard", hook="blocks.5.hook_z", reshape_activations="hook_z")
        monkeypatch.setattr(SAE, "from_pretrained", lambda *args, **kwargs: module)
        assert load(spec).source.has_dfa

    def test_a_failed_download_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sae_lens import SAE

        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
        with pytest.raises(StartupError, match=r"^SAE '12-res-jb': 'gpt2-small-res-jb/.*no route to host$"):
            load(self.spec)
