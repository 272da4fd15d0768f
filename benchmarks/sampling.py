"""What drawing costs: beside `argmax` on a large vocabulary, and in a decode step of the embedded model.

`python -m benchmarks.sampling` prints the numbers and writes `benchmarks/results/sampling.json`. Contenders take
turns in one process; a ratio is the median of the ratios of each round, and `of medians` the ratio of the medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import Load, description
from neuronpedia_inference.domain import Sampling
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.engine.cache import MaskForm
from neuronpedia_inference.engine.decoder import Decoder
from neuronpedia_inference.engine.generation import Lane
from neuronpedia_inference.engine.linear import choose_products
from neuronpedia_inference.engine.protocol import RowId, RowSpec
from neuronpedia_inference.engine.sampling import Sampler, draw
from neuronpedia_inference.engine.tree import Tree

RESULTS = Path(__file__).parent / "results" / "sampling.json"
N_ROWS, N_VOCAB, N_ROUNDS, N_STEPS = 16, 131_072, 41, 60
KINDS = {
    "sampled": Sampling(4000, temperature=0.8),
    "penalised": Sampling(4000, temperature=0.8, freq_penalty=0.5),
    "top_p": Sampling(4000, temperature=0.8, top_p=0.9),
    "reported": Sampling(4000, temperature=0.8, n_logprobs=5),
}


def alternating(contenders: Mapping[str, Callable[[], object]], n_rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one to warm up; in every round another begins."""
    names = [*contenders]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(n_rounds + 1):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            started = time.perf_counter()
            contenders[name]()
            if number:
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def over(base: str, taken: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(ms) for name, ms in taken.items()}
    return {
        name: {
            "ms": round(medians[name], 2),
            "ratio": round(statistics.median(a / b for a, b in zip(ms, taken[base], strict=True)), 3),
            "of medians": round(medians[name] / medians[base], 3),
        }
        for name, ms in taken.items()
    }


def drawing() -> dict[str, dict[str, float]]:
    """Sampling alone."""
    logits = 4 * torch.randn(N_ROWS, N_VOCAB, generator=torch.Generator().manual_seed(0))
    prompt = tuple(range(0, 400))
    rows = {name: [Sampler(sampling, prompt) for _ in range(N_ROWS)] for name, sampling in KINDS.items()}
    contenders: dict[str, Callable[[], object]] = {"argmax": lambda: logits.argmax(-1).tolist()}
    contenders |= {name: lambda of=of: draw(logits, of) for name, of in rows.items()}
    return over("argmax", alternating(contenders, N_ROUNDS))


def steps() -> dict[str, dict[str, float]]:
    """Decode steps of lanes that hold as many rows at the same lengths."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    choose_products(model)
    decoder = Decoder(Tree(model), frozenset())
    kinds = {"greedy": Sampling(4000)} | {name: KINDS[name] for name in ("sampled", "penalised")}
    lanes = {name: Lane.merging(decoder, MaskForm.ADDITIVE) for name in kinds}
    for name, lane in lanes.items():
        prompts = torch.randint(5, 40_000, (N_ROWS, 8), generator=torch.Generator().manual_seed(1)).tolist()
        lane.prefill([(RowId(n, 0), RowSpec(tuple(ids), kinds[name])) for n, ids in enumerate(prompts)])
    return over("greedy", alternating({name: lane.decode for name, lane in lanes.items()}, N_STEPS))


def main() -> None:
    torch.set_num_threads(1)
    load = Load()
    with torch.inference_mode():
        measured: dict[str, Any] = {"drawing_over_argmax": drawing(), "step_over_greedy": steps()}
    body = {"machine": {**description(), **load.since()}, **measured}
    print(json.dumps(body, indent=2))
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
