"""More SAEs than the device may hold: 40 are served within the bytes of 8, over a real port and in process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from served import MODEL, TEXT, WIDTH, Served, running, small_settings
from transformers import AutoModelForCausalLM

from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.runtime import Runtime
from tests.rounding import same_choices

N_SAES, N_RESIDENT, N_FEATURES = 40, 8, 64
SET = "res-many"
BYTES = 4 * (2 * WIDTH * N_FEATURES + WIDTH + N_FEATURES)
NAMES = [f"{number}-{SET}" for number in range(N_SAES)]
GREEDY = {"temperature": 0, "strength_multiplier": 1, "freq_penalty": 0, "seed": 1}
STEER = {**GREEDY, "n_completion_tokens": 3, "n_logprobs": 2}


def layer(number: int) -> int:
    return number % 12


def sae(number: int) -> Any:
    """Seeded, with decoder rows of unit norm, so that nothing is folded."""
    metadata = SAEMetadata(hook_name=f"blocks.{layer(number)}.hook_resid_post", model_name=MODEL)
    made = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=N_FEATURES, metadata=metadata, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / noise.norm(dim=-1, keepdim=True) if name == "W_dec" else 0.05 * noise)
    return made


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Runtime]]:
    folder: Path = tmp_path_factory.mktemp("saes")
    for number in range(N_SAES):
        sae(number).save_model(folder / NAMES[number])
    settings = small_settings(
        local_sae_dir=folder,
        sae_sets=SET,
        sae_memory_gib=(N_RESIDENT + 0.5) * BYTES / 2**30,
        max_concurrent_requests=128,
    )
    runtime = Runtime.load(settings)
    with running(settings, lambda: runtime) as served:
        yield served, runtime
    runtime.close()


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """[source] -> [pos, feature]: plain Hugging Face, and the encoder written out."""
    net: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with torch.no_grad():
        runtime_ids = tokens()
        hidden = net(torch.tensor([runtime_ids]), output_hidden_states=True).hidden_states
        saes = [sae(number) for number in range(N_SAES)]
        return [(hidden[layer(n) + 1][0] @ s.W_enc + s.b_enc).relu() for n, s in enumerate(saes)]


def tokens() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return [tokenizer.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]


def close(values: list[float], wanted: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(values), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max() + 1))


def test_all_answer_correctly_within_the_budget(many: tuple[Served, Runtime], expected: list[torch.Tensor]) -> None:
    """Singles of every source in random order, rankings over all 40 and steering, at the same time."""
    served, _ = many
    order = random.Random(7).sample(range(N_SAES), N_SAES)

    async def single(client: httpx.AsyncClient, number: int) -> None:
        index = number % N_FEATURES
        body = {"prompt": TEXT, "model": MODEL, "source": NAMES[number], "index": str(index)}
        answer = await client.post("/v1/activation/single", json=body)
        assert answer.status_code == 200, answer.text
        # A single feature is told without the beginning-of-sequence token.
        assert close(answer.json()["activation"]["values"], expected[number][1:, index]), NAMES[number]

    async def ranking(client: httpx.AsyncClient) -> None:
        body = {
            "prompt": TEXT,
            "model": MODEL,
            "source_set": SET,
            "selected_sources": NAMES,
            "sort_by_token_indexes": [],
            "ignore_bos": False,
            "num_results": 20,
        }
        answer = await client.post("/v1/activation/all", json=body)
        assert answer.status_code == 200, answer.text
        best = sorted((float(v) for each in expected for v in each.amax(0)), reverse=True)[:20]
        assert close([one["max_value"] for one in answer.json()["activations"]], torch.tensor(best))

    async def steered(client: httpx.AsyncClient, number: int) -> None:
        feature = {"model": MODEL, "source": NAMES[number], "index": 3, "strength": 300}
        vector = {"hook": f"blocks.{layer(number)}.hook_resid_post", "strength": 300}
        own = {**vector, "steering_vector": sae(number).W_dec[3].tolist()}
        common = {"prompt": "I think", "model": MODEL, "types": ["STEERED"], "normalize_steering": False, **STEER}
        chosen = []
        for steers in ({"features": [feature]}, {"vectors": [own]}, {"vectors": [{**own, "strength": 0}]}):
            body = {**common, **steers, "steer_method": "SIMPLE_ADDITIVE"}
            answer = await client.post("/v1/steer/completion", json=body)
            assert answer.status_code == 200, answer.text
            chosen.append(answer.json()["outputs"][0]["logprobs"])
        assert same_choices(chosen[0], chosen[1])
        assert not same_choices(chosen[0], chosen[2])

    async def everything() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:
            singles = [single(client, number) for number in (*order, *reversed(order[:20]))]
            await asyncio.gather(ranking(client), *singles, ranking(client), *(steered(client, n) for n in (1, 17, 33)))

    asyncio.run(everything())
    metrics = scraped(served)
    assert metrics["neuronpedia_sae_sources"] == N_SAES
    assert metrics["neuronpedia_sae_evictions_total"] >= N_SAES - N_RESIDENT
    assert metrics["neuronpedia_sae_peak_bytes"] <= metrics["neuronpedia_sae_budget_bytes"] < 9 * BYTES
    assert metrics["neuronpedia_sae_peak_bytes"] == N_RESIDENT * BYTES
    assert metrics["neuronpedia_sae_leased"] == 0


def scraped(served: Served) -> dict[str, float]:
    """Metrics without labels."""
    with served.client() as client:
        lines = client.get("/metrics").text.splitlines()
    pairs = [line.split() for line in lines if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in pairs}


def test_a_budget_too_small_for_one_still_serves_features(
    many: tuple[Served, Runtime], expected: list[torch.Tensor]
) -> None:
    settings = many[1].settings.model_copy(update={"sae_memory_gib": 0.5 * BYTES / 2**30})
    runtime = Runtime.load(settings)
    with running(settings, lambda: runtime) as served, served.client() as client:
        body = {"prompt": TEXT, "model": MODEL, "source": NAMES[7]}
        one = client.post("/v1/activation/single", json={**body, "index": "5"})
        assert one.status_code == 200, one.text
        assert close(one.json()["activation"]["values"], expected[7][1:, 5])
        every = client.post("/v1/activation/topk-by-token", json={**body, "top_k": 3, "ignore_bos": True})
        assert every.status_code == 400, every.text
        assert f"All features of '{NAMES[7]}' take" in every.json()["error"]
        assert "SAE_MEMORY_GIB" in every.json()["error"]
    runtime.close()
