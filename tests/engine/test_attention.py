"""Direct feature attribution and neurons of the whole service, against plain Hugging Face modules."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuronpedia_inference.errors import LimitExceeded, UnknownPoint
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import (
    architectures,  # noqa: F401  its models are added to those of `models`
    models,
)

TEXT = "grouped heads"
SOURCE, LAYER, D_SAE = "1-tiny-att-16", 1, 40


def attention_sae() -> StandardSAE:
    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.attn.hook_z", neuronpedia_id=f"tiny/{SOURCE}")
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=D_SAE, metadata=metadata))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A llama with two query heads per key-value head, and an SAE on its hook_z."""
    folder = tmp_path_factory.mktemp("tiny")
    models.save("llama", folder / "model")
    attention_sae().save_model(folder / "saes" / SOURCE)
    settings = Settings.read(model_id=str(folder / "model"), local_sae_dir=folder / "saes", num_threads=1)
    loaded = Runtime.load(settings)
    yield loaded
    loaded.close()


def test_a_model_whose_attention_is_not_read_says_so(tmp_path: Path) -> None:
    """GPT-J attends by a function of its own: an attribution is refused by name, and activations elsewhere are not."""
    models.save("gptj", tmp_path / "model")
    attention_sae().save_model(tmp_path / "saes" / SOURCE)
    loaded = Runtime.load(
        Settings.read(model_id=str(tmp_path / "model"), local_sae_dir=tmp_path / "saes", num_threads=1)
    )
    try:
        for body in ({"source": SOURCE, "index": "3"}, {"source": SOURCE, "index": "39"}):
            with pytest.raises(UnknownPoint, match=r"attn\.hook_pattern.*attention is not read"):
                ask(loaded, "activation_single", prompt=TEXT, **body)
        neurons = ask(loaded, "activation_single", prompt=TEXT, source="1", index="3")
        assert max(neurons["activation"]["values"]) > 0
    finally:
        loaded.close()


def ask(runtime: Runtime, operation: str, **body: Any) -> dict[str, Any]:
    return asyncio.run(answer(by_name[operation], {"model": "tiny", **body}, runtime))


def attention(runtime: Runtime, ids: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern [head, pos, pos], values [pos, kv head, d_head] and z [pos, head * d_head] of the layer."""
    net: Any = AutoModelForCausalLM.from_pretrained(runtime.model.name, attn_implementation="eager").eval()
    block = models.blocks(net)[LAYER]
    values: list[Tensor] = []
    module: Any = block.self_attn
    handle = module.v_proj.register_forward_hook(lambda _m, _a, out: values.append(out[0]))
    with torch.no_grad():
        pattern = net(torch.tensor([ids]), output_attentions=True).attentions[LAYER][0]
    handle.remove()
    return pattern, values[0].view(len(ids), 2, 8), models.read(net, "llama", ids, LAYER, "attn.hook_z")


def test_attribution_names_what_each_position_gave(runtime: Runtime) -> None:
    ids = runtime.tokenize(TEXT, "once").ids
    pattern, values, z = attention(runtime, ids)
    sae = attention_sae()
    with torch.no_grad():
        acts = sae.encode(z) * sae.W_dec.norm(dim=1)
    index = int(acts[1:].amax(0).argmax())
    target = 1 + int(acts[1:, index].argmax())
    column = (sae.W_enc[:, index] * sae.W_dec[index].norm()).detach()
    expected = [
        sum(float(pattern[h, target, s] * (values[s, h // 2] @ column[8 * h : 8 * h + 8])) for h in range(4))
        for s in range(len(ids))
    ]
    assert sum(expected) == pytest.approx(float(z[target] @ column), rel=1e-4)  # nothing is left unattributed

    ranked = ask(
        runtime,
        "activation_all",
        prompt=TEXT,
        source_set="tiny-att-16",
        selected_sources=[],
        sort_by_token_indexes=[],
        ignore_bos=True,
        num_results=1,
    )["activations"][0]
    assert (ranked["source"], ranked["index"], ranked["dfa_target_index"]) == (SOURCE, index, target)
    assert ranked["dfa_values"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert ranked["dfa_max_value"] == pytest.approx(max(expected), rel=1e-3)

    single = ask(runtime, "activation_single", prompt=TEXT, source=SOURCE, index=str(index))["activation"]
    assert single["values"] == pytest.approx(acts[1:, index].tolist(), rel=1e-4, abs=1e-4)
    assert single["dfa_target_index"] == target - 1 == single["max_value_index"]
    assert single["dfa_values"] == pytest.approx(expected[1:], rel=1e-3, abs=1e-4)


def test_neurons_are_what_the_mlp_writes_with(runtime: Runtime) -> None:
    """mlp.hook_post is the input of the down projection: gate and branch multiplied."""
    net: Any = models.model("llama")
    ids = runtime.tokenize(TEXT, "once").ids
    seen: list[Tensor] = []
    block: Any = models.blocks(net)[2]
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].clone()))
    with torch.no_grad():
        net(torch.tensor([ids]))
    handle.remove()
    found = ask(runtime, "activation_single", prompt=TEXT, source="2", index="7")["activation"]["values"]
    assert found == pytest.approx(seen[0][:, 7].tolist(), rel=1e-4, abs=1e-5)
    assert min(found) < 0  # not rectified
    top = ask(runtime, "activation_topk_by_token", prompt=TEXT, source="2", top_k=3, ignore_bos=False)["results"]
    for row, wanted in zip(top, seen[0], strict=True):
        assert [f["feature_index"] for f in row["top_features"]] == wanted.topk(3).indices.tolist()


def test_a_prompt_may_not_be_longer_than_the_model_s_context(tmp_path: Path) -> None:
    models.save("gpt2", tmp_path)
    runtime = Runtime.load(Settings.read(model_id=str(tmp_path), token_limit=4000, max_tokens=5000, num_threads=1))
    try:
        assert len(runtime.tokenize("a" * 511, "once")) == 512 == runtime.describe()["token_limit"]
        with pytest.raises(LimitExceeded, match="513 tokens, max is 512"):
            runtime.tokenize("a" * 512, "once")
        assert runtime.describe()["max_tokens"] == 512
    finally:
        runtime.close()
