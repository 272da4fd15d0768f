"""What one forward pass costs by rows, tokens, precision and threads: the choices behind the defaults.

`python -m benchmarks.steps` prints tables and writes `benchmarks/results/steps.json`. Embedded model, plain Hugging
Face; `chosen products` is the same model after `engine/linear.py` has timed its layers, and `large pages` after
`host_memory.py` has moved its weights there from the file that they are mapped to.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.machine import Load, description
from benchmarks.plain import StopError, hooked
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.engine.linear import choose_products
from neuronpedia_inference.host_memory import moving

RESULTS = Path(__file__).parent / "results" / "steps.json"
ROWS = (1, 2, 3, 4, 8, 16)
LENGTHS = (16, 32, 64, 128, 256, 500)
N_STEPS, ROUNDS, LAYER = 12, 5, 15


def load_model(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype).eval()


def step_ms(model: Any, n_rows: int) -> float:
    """One decode step, cache of 5 to 17 positions."""
    ids = torch.randint(5, 40_000, (n_rows, 5))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for _ in range(N_STEPS):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    return 1000 * (time.perf_counter() - started) / N_STEPS


def capture_ms(model: Any, n_prompts: int, length: int) -> float:
    """A forward pass that ends at the layer."""

    def stop(_: Any) -> None:
        raise StopError

    ids = torch.randint(5, 40_000, (n_prompts, length))
    started = time.perf_counter()
    with hooked(model.model.layers[LAYER], stop), suppress(StopError):
        model(ids, use_cache=False)
    return 1000 * (time.perf_counter() - started)


def alternating(contenders: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of rounds in turns, after one of each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, run in contenders.items():
            ms = run()
            if number:
                taken[name].append(ms)
    return {name: round(statistics.median(ms), 1) for name, ms in taken.items()}


def with_threads(n_threads: int, run: Callable[[], float]) -> float:
    torch.set_num_threads(n_threads)
    ms = run()
    torch.set_num_threads(1)
    return ms


def decode_steps() -> dict[int, dict[str, float]]:
    usual, chosen, half = load_model(torch.float32), load_model(torch.float32), load_model(torch.bfloat16)
    moved = load_model(torch.float32)
    for model in (chosen, moved):
        choose_products(model)
    for _ in moving(moved):
        pass
    return {
        n: alternating(
            {
                "float32": lambda n=n: step_ms(usual, n),
                "float32, chosen products": lambda n=n: step_ms(chosen, n),
                "float32, chosen products, large pages": lambda n=n: step_ms(moved, n),
                "bfloat16": lambda n=n: step_ms(half, n),
                "float32, 2 threads": lambda n=n: with_threads(2, lambda: step_ms(usual, n)),
            }
        )
        for n in ROWS
    }


def captures() -> dict[int, dict[str, float]]:
    """Time of prompts together over the same prompts one by one."""
    model = load_model(torch.float32)
    ratios = {}
    for length in LENGTHS:
        cases = {n: n * length for n in (1, 2, 4, 8) if n * length <= 1024}
        ms = alternating({str(n): lambda n=n, length=length: capture_ms(model, n, length) for n in cases})
        ratios[length] = {f"{n} together": round(ms[str(n)] / (n * ms["1"]), 2) for n in cases if n > 1}
    return ratios


def main() -> None:
    torch.set_num_threads(1)
    load = Load()
    with torch.inference_mode():
        measured = {"decode_step_ms": decode_steps(), "together_over_alone": captures()}
    body = {"machine": {**description(), **load.since()}, **measured}
    print(json.dumps(body, indent=2))
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
