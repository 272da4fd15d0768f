"""What the logit lens costs: all blocks over a hundred tokens, beside a plain forward pass and the products it needs.

`python -m benchmarks.lens` prints the numbers and writes `benchmarks/results/lens.json`. `needed` is Hugging Face's
forward pass with every hidden state, and for each of them the final norm and the unembedding: no softmax, no choice of
tokens. `lens` is the whole operation, answer included. They take turns in one process, with one thread.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import Load, description
from benchmarks.sampling import alternating, over
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.engine.linear import choose_products
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

RESULTS = Path(__file__).parent / "results" / "lens.json"
N_TOKENS, N_ROUNDS, TOP_N = 100, 11, 8


def measured() -> dict[str, Any]:
    runtime = Runtime.load(Settings.read(num_threads=1, sae_sets="[]", reuse_memory_gib=0))
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    choose_products(model)
    ids = torch.randint(5, 40_000, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    body = {"model": "", "type": ["LOGIT_LENS"], "input_token_ids": ids[0].tolist(), "top_n": TOP_N, "stream": False}

    @torch.inference_mode()
    def forward() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    @torch.inference_mode()
    def needed() -> None:
        states = model(ids, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states
        for one in states[1:]:
            model.lm_head(model.model.norm(one))

    async def asked() -> None:
        answered = await answer(by_name["lens_prompt"], body, runtime)
        assert len(answered["tokens"]) == N_TOKENS

    try:
        with asyncio.Runner() as runner:
            contenders = {"needed": needed, "forward": forward, "lens": lambda: runner.run(asked())}
            return over("needed", alternating(contenders, N_ROUNDS))
    finally:
        runtime.close()


def main() -> None:
    torch.set_num_threads(1)
    load = Load()
    found = {"tokens": N_TOKENS, "top_n": TOP_N, "over_needed": measured()}
    body = {"machine": {**description(), **load.since()}, **found}
    print(json.dumps(body, indent=2))
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
