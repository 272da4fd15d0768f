"""Every model that people run, from a folder to answers: read, steered, asked as a chat, against plain loops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

from neuronpedia_inference.domain import Sampling, Tokens
from neuronpedia_inference.edits.plan import Direction, Do, Edit, Plan
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings
from tests import architectures, models
from tests.rounding import CLOSE

PEOPLE_RUN = (
    "gpt2",
    "neox",
    "llama3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma4_text",
    "gpt_oss",
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "mistral",
    "phi3",
    "olmo2",
    "olmo3",
    "deepseek_v3",
    "smollm3",
    "bloom",
    "opt",
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
LAYER, N_FEATURES, WIDTH = 1, 24, 32
PLACE = f"blocks.{LAYER}.hook_resid_post"


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One standard SAE whose decoder rows have unit norm."""
    folder = tmp_path_factory.mktemp("saes") / f"{LAYER}-res"
    folder.mkdir()
    save_file(sae(), folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": N_FEATURES,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": PLACE, "sae_lens_version": "6.0.0"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder.parent


def sae() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N_FEATURES, WIDTH, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    biases = {"b_enc": torch.randn(N_FEATURES, generator=generator), "b_dec": torch.randn(WIDTH, generator=generator)}
    return {"W_enc": rows.T.contiguous(), "W_dec": rows, **biases}


def started(folder: Path, saes: Path) -> Runtime:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Runtime.load(Settings.read(model_id=str(folder), local_sae_dir=saes, num_threads=1, max_tokens=300))


@pytest.fixture(params=PEOPLE_RUN)
def served(request: pytest.FixtureRequest, saes: Path, tmp_path: Path) -> Iterator[tuple[str, Runtime]]:
    models.model(request.param).save_pretrained(tmp_path / "model")
    runtime = started(tmp_path / "model", saes)
    yield request.param, runtime
    runtime.close()


def ask(runtime: Runtime, operation: str, **body: Any) -> dict[str, Any]:
    return asyncio.run(answer(by_name[operation], {"model": "m", **body}, runtime))


def features(runtime: Runtime, prompt: str) -> torch.Tensor:
    """[pos, feature] of all that fire, by `activation_all`."""
    more = {"selected_sources": [], "sort_by_token_indexes": [], "ignore_bos": False, "num_results": N_FEATURES}
    found = ask(runtime, "activation_all", prompt=prompt, source_set="res", **more)
    values = torch.zeros(len(found["tokens"]), N_FEATURES)
    for row in found["activations"]:
        values[:, row["index"]] = torch.tensor(row["values"])
    return values


def by_hand(hidden: torch.Tensor) -> torch.Tensor:
    """[pos, width] -> [pos, feature]"""
    weights = sae()
    return torch.relu((hidden - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])


async def written(runtime: Runtime, prompt: Tokens, plans: list[Plan | None], n: int) -> list[tuple[int, ...]]:
    rows = await anext(runtime.generate(prompt, plans, Sampling(n), stream=False))
    return [tuple(row.token_ids) for row in rows]


def test_it_starts_answers_and_steers(served: tuple[str, Runtime]) -> None:
    family, runtime = served
    net = models.model(family)
    prompt = runtime.tokenize("The cat sat.", "once")
    hidden = models.read(net, family, prompt.ids, LAYER, "hook_resid_post")
    want = by_hand(hidden)
    assert want.max() > 0
    assert (features(runtime, "The cat sat.") - want).abs().max() <= CLOSE * want.max()

    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    size = float(hidden.norm(dim=-1).mean())
    coefficients = {
        Do.ADD: 4 * size / float(vector.norm()),
        Do.ORTHOGONAL: -90.0,
        Do.CAP: -8 * size,
    }
    plans = [Plan((Edit(method, Direction(PLACE, vector.tolist()), c),)) for method, c in coefficients.items()]
    *steered, plain = asyncio.run(written(runtime, prompt, [*plans, None], 5))
    n_compared = 0
    for tokens, (method, c) in zip([*steered, plain], [*coefficients.items(), (None, 0.0)], strict=True):
        with suppress(models.NearTie), ExitStack() as stack:
            if method is not None:
                edit = models.formula(method, vector, c)
                stack.enter_context(models.hooked(net, family, LAYER, "hook_resid_post", edit))
            assert list(tokens) == models.greedy(net, prompt.ids, 5), method
            n_compared += 1
    assert n_compared >= 3
    assert any(tokens != plain for tokens in steered)


def test_it_answers_a_chat(served: tuple[str, Runtime]) -> None:
    family, runtime = served
    messages = [{"role": "user", "content": "Hi"}]
    found = ask(runtime, "steer", prompt=messages, features=[], max_new_tokens=4, temperature=0)
    ids = runtime.tokenize("<user>Hi<bot>", "never").ids
    with suppress(models.NearTie):
        assert found["default"]["text"] == models.tokenizer().decode(models.greedy(models.model(family), ids, 4))
        assert found["default"]["text"] == found["steered"]["text"]


# Multimodal checkpoints, of which the text is served

VISION = {
    "qwen3_5": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    "gemma4": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
WHOLE = {
    "qwen3_5": lambda: t.Qwen3_5Config(
        text_config=architectures.CONFIGS["qwen3_5"].to_dict(), vision_config=VISION["qwen3_5"]
    ),
    "qwen3_5_moe": lambda: t.Qwen3_5MoeConfig(
        text_config=architectures.CONFIGS["qwen3_5_moe"].to_dict(), vision_config=VISION["qwen3_5"]
    ),
    "gemma4": lambda: t.Gemma4Config(
        text_config=architectures.CONFIGS["gemma4_text"].to_dict(), vision_config=VISION["gemma4"]
    ),
}


@pytest.mark.parametrize("family", WHOLE)
def test_the_text_of_a_multimodal_checkpoint_is_served(family: str, saes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole: Any = t.AutoModelForImageTextToText.from_config(WHOLE[family]()).eval().requires_grad_(False)
    for parameter in whole.model.language_model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(5)
    whole.save_pretrained(tmp_path / "model")
    runtime = started(tmp_path / "model", saes)
    try:
        prompt = runtime.tokenize("The cat sat.", "once")
        seen: list[torch.Tensor] = []
        block = whole.model.language_model.layers[LAYER]
        hook = block.register_forward_hook(lambda *a: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
        with torch.no_grad():
            logits = whole(input_ids=torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
        hook.remove()
        want = by_hand(seen[0].view(len(prompt.ids), WIDTH))
        assert want.max() > 0
        assert (features(runtime, "The cat sat.") - want).abs().max() <= CLOSE * want.max()
        ((token,),) = asyncio.run(written(runtime, prompt, [None], 1))
        assert logits[token] >= logits.max() - CLOSE * logits.abs().max()
    finally:
        runtime.close()


def test_labels_come_from_their_folder(saes: Path, tmp_path: Path) -> None:
    models.model("llama").save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "labels").mkdir()
    rows = [{"source": "1-res", "index": n, "label": f"number{n}", "density": n / 100} for n in range(N_FEATURES)]
    (tmp_path / "labels" / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Settings.read(
        model_id=str(tmp_path / "model"), local_sae_dir=saes, labels_dir=tmp_path / "labels", num_threads=1
    )
    runtime = Runtime.load(settings)
    try:
        found = ask(runtime, "activations", prompt="The cat sat.", num_results=3)["results"][0]["features"]
        assert [one["label"] for one in found] == [f"number{one['index']}" for one in found]
        card = asyncio.run(answer(by_name["feature"], {"source": "1-res", "index": 7}, runtime))
        assert (card["label"], card["density"], card["max"]) == ("number7", pytest.approx(0.07), None)
        assert card["neighbours"][0]["label"] == f"number{card['neighbours'][0]['index']}"
        words = asyncio.run(answer(by_name["search"], {"q": "number7"}, runtime))["features"]
        assert [one["index"] for one in words] == [7]
        texts = {"a": ["The cat sat."], "b": ["A dog ran off."], "max_density": 0.05}
        sides = asyncio.run(answer(by_name["contrast"], texts, runtime))
        assert all(one["index"] <= 5 for side in "ab" for one in sides[side])
    finally:
        runtime.close()
