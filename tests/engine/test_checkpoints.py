"""Folders as people have them: without a tokenizer, with another one, GGUF only, quantised, in the hub's cache."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuronpedia_inference import downloads, loading
from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from scripts.render_starts import said_at_start
from tests import models
from tests.engine.gguf_files import write_gguf

REPO = "tests/model"
IDS = models.tokenizer().encode("The cat sat on the mat.")


def settings(model: Path | str, **options: Any) -> Settings:
    return Settings.read(model_id=str(model), sae_sets=(), num_threads=1, model_from_pretrained_kwargs=options)


def start(model: Path | str, **options: Any) -> loading.HostWeights:
    return loading.load_on_host(settings(model, **options), lambda line: None)


def stopped(model: Path | str, **options: Any) -> str:
    """The line that ends a start."""
    with pytest.raises(StartupError) as ended:
        start(model, **options)
    line = str(ended.value)
    assert "\n" not in line
    return line


def logits(net: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.tensor([ids])).logits[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save("llama", tmp_path / "model")


# Tokenizers


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "neox"])
def test_a_folder_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    """For some families an empty one is made of nothing."""
    models.model(family).save_pretrained(tmp_path)
    assert said_at_start("no tokenizer", stopped(tmp_path))


def test_a_tokenizer_that_turns_every_text_into_one_unknown_token(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(kinds.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    assert said_at_start("no tokenizer", stopped(folder))


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    other = models.tokenizer()
    other.add_tokens([f"<{n}>" for n in range(9)] + ["The cat sat on the mat."])
    other.save_pretrained(folder)
    assert said_at_start("tokenizer of another model", stopped(folder))


def test_a_bos_without_an_embedding(folder: Path) -> None:
    other = models.tokenizer()
    other.add_special_tokens({"bos_token": "<|start|>"})
    other.save_pretrained(folder)
    line = stopped(folder)
    assert said_at_start("tokenizer of another model", line)
    assert "BOS" in line


def test_some_tokens_without_an_embedding_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests with them are refused: test_unknown_tokens.py."""
    larger = models.tokenizer()
    larger.add_tokens(["<|extra|>", "<|more|>"])
    larger.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        start(folder)
    assert said_at_start("tokenizer larger than the embedding", caplog.messages[-1])


# Options


def test_where_files_are_reaches_weights_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    host = start(tmp_path / "outer", subfolder="inner")
    assert host.tokenizer.encode("The") == IDS[:3]
    assert torch.equal(logits(host.model), logits(models.model("llama")))
    assert said_at_start("a subfolder that is not there", stopped(tmp_path / "outer", subfolder="iner"))


def test_an_option_that_nothing_takes(folder: Path) -> None:
    assert said_at_start("an unknown option", stopped(folder, attn_implementaton="eager"))
    host = start(folder, attn_implementation="eager")
    assert host.model is not None
    assert host.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"torch_dtype": "float16"}, {"use_safetensors": False}, {"subfolder": 3}]
)
def test_an_option_that_is_decided_elsewhere(options: dict[str, Any]) -> None:
    with pytest.raises(StartupError) as ended:
        settings("gpt2-small", **options)
    assert said_at_start("an option that is not taken", str(ended.value)) or "has to be a text" in str(ended.value)


# The hub's cache


@contextmanager
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Online, with a cache, and with nobody there: whoever asks is told so by a failing test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    from huggingface_hub.utils import _http

    def asked(*words: Any, **more: Any) -> None:
        pytest.fail(f"the hub is asked: {words} {more}")

    monkeypatch.setattr(_http, "http_backoff", asked)
    monkeypatch.setattr("httpx2.Client.send", asked)
    yield
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def in_cache(cache: Path, folder: Path, revision: str, commit: str) -> None:
    repo = cache / "models--tests--model"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


def test_files_in_the_cache_are_used_without_asking_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(tmp_path / "hub", folder, "main", "a" * 40)
    with unreachable_hub(monkeypatch, tmp_path / "hub"):
        host = start(REPO)
    assert torch.equal(logits(host.model), logits(models.model("llama")))


def test_the_revision_that_is_asked_for_is_the_one_that_is_looked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(tmp_path / "hub", models.save("qwen2", tmp_path / "other"), "main", "a" * 40)
    in_cache(tmp_path / "hub", folder, "v2", "b" * 40)
    with unreachable_hub(monkeypatch, tmp_path / "hub"):
        assert downloads.found(settings(REPO, revision="v2")) == (
            tmp_path / "hub" / "models--tests--model" / "snapshots" / ("b" * 40)
        )
        assert downloads.found(settings(REPO, revision="v3")) is None
        assert downloads.found(settings(REPO, force_download=True)) is None
        assert torch.equal(logits(start(REPO, revision="v2").model), logits(models.model("llama")))
        assert not torch.equal(logits(start(REPO).model), logits(models.model("llama")))


# GGUF


def test_gguf_only(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert said_at_start("GGUF only", stopped(tmp_path))
    assert said_at_start("another GGUF file", stopped(tmp_path, gguf_file="tinny.gguf"))
    runtime = Runtime.load(settings(tmp_path, gguf_file="tiny.gguf"))
    try:
        from transformers import AutoModelForCausalLM

        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype="auto")
        prompt = runtime.tokenize("The cat", "once")
        assert asyncio.run(written(runtime, prompt)) == models.greedy(plain, prompt.ids, 3)
    finally:
        runtime.close()


async def written(runtime: Runtime, prompt: Tokens) -> list[int]:
    (row,) = await anext(runtime.generate(prompt, [None], Sampling(3), stream=False))
    return list(row.token_ids)


# Quantised weights


def as_fp8(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """The folder's linear layers in 8 bit, a scale for each square; what they stand for, by name."""
    file = folder / "model.safetensors"
    tensors, meant = load_file(file), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        squares = tensors[name].unfold(0, block, block).unfold(1, block, block)
        scale = squares.abs().amax(dim=(2, 3)) / 448
        each = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        tensors[f"{name}_scale_inv"] = scale
        packed = (tensors[name] / each).to(torch.float8_e4m3fn)
        meant[name] = packed.float() * each
        tensors[name] = packed
    save_file(tensors, file, metadata={"format": "pt"})
    quantised_by(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]})
    return meant


def quantised_by(folder: Path, about: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies 8-bit weights themselves")
def test_fp8_weights_mean_what_their_scales_say(folder: Path) -> None:
    meant = as_fp8(folder)
    loaded = loading.load(settings(folder), lambda line: None)
    weights = loaded.engine._model.state_dict()
    for name, value in meant.items():
        torch.testing.assert_close(weights[name].float(), value, rtol=2**-8, atol=0)  # bfloat16 has 8 bits
        assert value.abs().max() > 0
    plain = logits(models.model("llama"))
    assert (logits(loaded.engine._model).float() - plain).norm() < 0.3 * plain.norm()
    loaded.store.close()


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, of the OCP Microscaling Formats specification 1.0."""


def as_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """The experts of a gpt-oss folder, drawn in 4 bit with a power of two for each 32; what they stand for, by name."""
    file = folder / "model.safetensors"
    tensors, meant = load_file(file), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, n_in, n_out = tensors.pop(name).shape
        shape = (n_experts, n_out, n_in // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 127, shape[:3], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.tensor([*FP4, *(-value for value in FP4)])
        both = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), dim=-1).flatten(-2)
        meant[name] = (both * 2.0 ** (scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    quantised_by(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return meant


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies 4-bit weights themselves")
def test_mxfp4_weights_mean_what_their_blocks_say(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    sizes = {**models.GROUPED, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(GptOssConfig(**sizes)).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    meant = as_mxfp4(tmp_path)
    loaded = loading.load(settings(tmp_path), lambda line: None)
    weights = loaded.engine._model.state_dict()
    assert len(meant) == 2 * sizes["num_hidden_layers"]
    for name, value in meant.items():
        assert torch.equal(weights[name].float(), value)  # 3 bits and a power of two: bfloat16 holds them
        assert value.abs().max() > 0
    loaded.store.close()


@pytest.mark.parametrize(
    ("about", "situation", "names"),
    [
        ({"quant_method": "awq", "bits": 4}, "packages", "AWQ.*gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "packages", "GPTQ.*optimum gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "packages", "bitsandbytes.*bitsandbytes"),
        ({"load_in_8bit": True}, "packages", "bitsandbytes"),
        ({"quant_method": "hqq"}, "another way to quantise", "'hqq'"),
        ({"quant_method": "abc"}, "another way to quantise", "'abc'"),
        ({"bits": 3}, "another way to quantise", "'None'"),
    ],
)
def test_weights_that_cannot_be_read_here_are_refused_by_name(
    folder: Path, about: dict[str, Any], situation: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronpedia_inference.engine.quantised.find_spec", lambda package: None)
    quantised_by(folder, about)
    with pytest.raises(StartupError, match=names) as ended:
        loading.load(settings(folder), lambda line: None)
    assert said_at_start(situation, str(ended.value))


def test_weights_that_options_quantise_are_refused_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuronpedia_inference.engine.quantised.find_spec", lambda package: None)
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(StartupError) as ended:
        loading.load(settings(folder, quantization_config=about), lambda line: None)
    assert said_at_start("packages", str(ended.value))
    assert "bitsandbytes" in str(ended.value)


# Paths


def test_a_typo_in_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_at_start("a typo in the path", stopped(f"{folder.parent}/modle"))
    monkeypatch.chdir(folder.parent)
    assert said_at_start("a typo in the path", stopped("./modle"))
    assert "Did you mean './model'?" in stopped("modle")


@pytest.mark.parametrize("kept", [("config.json",), ("tokenizer.json", "tokenizer_config.json"), ()])
def test_half_a_folder(folder: Path, kept: tuple[str, ...]) -> None:
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    line = stopped(folder)
    assert "no model" in line or said_at_start("no tokenizer", line)
