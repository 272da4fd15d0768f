"""What the service costs on top of plain Hugging Face, on the embedded model, in one process.

Each case runs ours and the floor in turn, so that whatever else the machine does falls on both. Reported: medians,
their ratio, and the machine's load. `make bench` prints the table and writes `benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import model_folder
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

RESULTS = Path(__file__).parent / "results" / "overhead.json"
SHORT = "The river bank was closed on Sunday, so we went to the other one."
LONG = " ".join([SHORT] * 11)
SOURCE, LAYER, INDEX = "15-res-4k", 15, 7
N_TOKENS = 32


@dataclass(frozen=True)
class Case:
    name: str
    floor: str
    ours_ms: float
    floor_ms: float
    ratio: float
    rounds: int
    bound: float


class StopError(Exception):
    """Ends a plain forward pass at the hook."""


@contextmanager
def hook(block: Any, run: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    handle = block.register_forward_hook(lambda _module, _args, output: run(output))
    try:
        yield
    finally:
        handle.remove()


class Plain:
    """Hugging Face with hooks written by hand: the least that the same work can cost here."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
        self.sae: Any = SAE.load_from_disk(embedded.sae_dir(SOURCE), device="cpu", dtype="float32")
        self.sae.fold_W_dec_norm()
        self.column = self.sae.W_enc[:, INDEX].clone()

    def resid(self, ids: list[int]) -> torch.Tensor:
        """[pos, d_model] after the layer; nothing behind it runs."""
        seen: list[torch.Tensor] = []

        def stop(output: torch.Tensor) -> None:
            seen.append(output[0])
            raise StopError

        with torch.inference_mode(), hook(self.model.model.layers[LAYER], stop), suppress(StopError):
            self.model(torch.tensor([ids]), use_cache=False)
        return seen[0]

    def one_feature(self, ids: list[int]) -> list[float]:
        with torch.inference_mode():
            before = (self.resid(ids) - self.sae.b_dec) @ self.column + self.sae.b_enc[INDEX]
            return (before.relu() * (before > self.sae.threshold[INDEX])).tolist()

    def all_features(self, ids: list[int]) -> list[list[float]]:
        with torch.inference_mode():
            acts = self.sae.encode(self.resid(ids))
            best = acts.amax(0).topk(25).indices
            return acts[:, best].T.tolist()

    def steer(self, ids: list[int], strength: float) -> list[list[int]]:
        """`generate` of batch 2, the first row steered."""
        row = torch.stack([strength * self.sae.W_dec[INDEX], torch.zeros_like(self.sae.W_dec[INDEX])])[:, None]
        batch = torch.tensor([ids, ids])
        with torch.inference_mode(), hook(self.model.model.layers[LAYER], lambda output: output + row):
            return self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=N_TOKENS,
                min_new_tokens=N_TOKENS,
                do_sample=False,
            ).tolist()


def compare(
    name: str, floor_name: str, ours: Callable[[], Any], floor: Callable[[], Any], n: int, bound: float
) -> Case:
    """Medians of n alternating rounds, after one of each to warm up."""
    ours()
    floor()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(n):
        # The order changes too: the second of a pair finds warmer caches.
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            (ours, floor)[which]()
            times[which].append(1000 * (time.perf_counter() - started))
    ours_ms, floor_ms = statistics.median(times[0]), statistics.median(times[1])
    case = Case(name, floor_name, round(ours_ms, 1), round(floor_ms, 1), round(ours_ms / floor_ms, 3), n, bound)
    print(
        f"{name:44} {ours_ms:8.1f} ms   floor {floor_ms:8.1f} ms   ratio {case.ratio:.3f} (at most {bound})", flush=True
    )
    return case


def run(rounds: int) -> list[Case]:
    runtime = Runtime.load(Settings.read(num_threads=1, max_tokens=512), print)
    plain = Plain()
    loop = asyncio.new_event_loop()

    def ask(operation: str, **body: Any) -> Any:
        return loop.run_until_complete(answer(by_name[operation], {"model": embedded.MODEL_ID, **body}, runtime))

    cases = []
    for label, text in (("short", SHORT), ("long", LONG)):
        ids = list(runtime.tokenize(text, "once").ids)
        where = f"{label}, {len(ids)} tokens"
        cases.append(
            compare(
                f"activation_single, {where}",
                "truncated forward and one encoder column",
                lambda text=text: ask("activation_single", prompt=text, source=SOURCE, index=str(INDEX)),
                lambda ids=ids: plain.one_feature(ids),
                rounds,
                1.25,
            )
        )
        cases.append(
            compare(
                f"activation_all of one source, {where}",
                "truncated forward, full encode and top 25",
                lambda text=text: ask(
                    "activation_all",
                    prompt=text,
                    source_set="res-4k",
                    selected_sources=[SOURCE],
                    sort_by_token_indexes=[],
                    ignore_bos=True,
                    num_results=25,
                ),
                lambda ids=ids: plain.all_features(ids),
                rounds,
                1.25,
            )
        )
    ids = list(runtime.tokenize("I think that", "once").ids)
    cases.append(
        compare(
            f"steer_completion, both types, {N_TOKENS} tokens",
            "generate of batch 2 with a hook",
            lambda: ask(
                "steer_completion",
                prompt="I think that",
                features=[{"model": embedded.MODEL_ID, "source": SOURCE, "index": INDEX, "strength": 20}],
                types=["STEERED", "DEFAULT"],
                steer_method="SIMPLE_ADDITIVE",
                normalize_steering=False,
                n_completion_tokens=N_TOKENS,
                temperature=0,
                strength_multiplier=1,
                freq_penalty=0,
                seed=1,
            ),
            lambda: plain.steer(ids, 20.0),
            max(3, rounds // 3),
            1.3,
        )
    )
    runtime.close()
    return cases


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": "float32",
    }


def main() -> None:
    torch.set_num_threads(1)
    before = machine()
    cases = run(rounds=15)
    RESULTS.parent.mkdir(exist_ok=True)
    body = {"before": before, "after": machine(), "cases": [asdict(case) for case in cases]}
    RESULTS.write_text(json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
