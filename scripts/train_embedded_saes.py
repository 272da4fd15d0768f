"""Makes the SAEs, labels, steering examples and model card of the embedded default model.

Stages: text, collect, train, scan, label, evaluate, steer-search, card. The long ones (text samples chats
from the model, collect runs it over all text, train) go on where they stopped. Everything, on one thread:

    python scripts/train_embedded_saes.py all --work ~/sae-work
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from neuronpedia_inference import embedded  # noqa: E402 - the path is set above
from neuronpedia_inference.embedded.weights import model_folder  # noqa: E402

CHAT_TOKENS = 120_000


class Run:
    """What the stages share: the work folder, and the model and SAEs, loaded when first needed."""

    def __init__(self, work: Path, layers: tuple[int, ...]) -> None:
        self.work, self.layers = work, layers

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_folder())

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()

    @cached_property
    def saes(self) -> dict[int, Any]:
        import torch
        from sae_lens import SAE

        torch.set_num_threads(1)
        return {layer: SAE.load_from_disk(embedded.sae_dir(source(layer))) for layer in self.layers}


def source(layer: int) -> str:
    return f"{layer}-{embedded.SOURCE_SET}"


def make_text(run: Run) -> None:
    from embedded_saes import chats, text

    run.work.mkdir(parents=True, exist_ok=True)
    if not (run.work / "text" / "packages-0.npz").exists():
        text.make_packages_part(run.work, run.tokenizer)
    if not (run.work / "text" / "chats.npz").exists():
        chats.sample_chats(model_folder(), run.work / "chats.jsonl", CHAT_TOKENS)
        text.make_chats_part(run.work, run.tokenizer)


def collect(run: Run) -> None:
    from embedded_saes.collect import collect

    collect(run.work, run.model)


def train(run: Run) -> None:
    from embedded_saes.export import export
    from embedded_saes.train import Recipe, train

    for layer in run.layers:
        if not (run.work / "trained" / f"{layer}.npz").exists():
            train(run.work, layer, Recipe())
        export(run.work, layer, Recipe(), embedded.sae_dir(source(layer)))


def scan(run: Run) -> None:
    from embedded_saes.scan import scan

    for layer, sae in run.saes.items():
        scan(run.work, layer, sae)


def label(run: Run) -> None:
    from embedded_saes.label import label_all, write_labels

    for layer in run.layers:
        labels = label_all(run.work, layer, run.tokenizer)
        write_labels(embedded.LABELS_DIR / f"{source(layer)}.json", labels)


def evaluate(run: Run) -> None:
    from embedded_saes.card import METRICS, about_data
    from embedded_saes.evaluate import evaluate
    from embedded_saes.train import Recipe

    metrics = {
        "sources": evaluate(run.work, run.model, run.saes),
        "recipe": asdict(Recipe()),
        "training": {
            source(layer): json.loads((run.work / "trained" / f"{layer}.json").read_text()) for layer in run.layers
        },
        "data": about_data(run.work),
    }
    METRICS.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def steer_search(run: Run) -> None:
    from embedded_saes import steer

    for layer, sae in run.saes.items():
        if not (run.work / "steer" / f"{layer}.jsonl").exists():
            steer.search(run.work, run.model, run.tokenizer, layer, sae.W_dec.detach())
            print(f"steer-search: layer {layer} done", flush=True)
    chosen = steer.choose(steer.load_trials(run.work))
    labels = {layer: list(embedded.labels(source(layer))) for layer in run.layers}
    found = steer.examples(run.model, run.tokenizer, chosen, run.saes, labels)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    embedded.STEERING_EXAMPLES.write_text(text + "\n", encoding="utf-8")


def card(_: Run) -> None:
    from embedded_saes.card import write_card

    write_card()


STAGES: dict[str, Callable[[Run], None]] = {
    "text": make_text,
    "collect": collect,
    "train": train,
    "scan": scan,
    "label": label,
    "evaluate": evaluate,
    "steer-search": steer_search,
    "card": card,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for text, activations and trained weights")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 15, 20], choices=[10, 15, 20])
    args = parser.parse_args()
    run = Run(args.work, tuple(args.layers))
    for name in STAGES if args.stage == "all" else [args.stage]:
        began = time.monotonic()
        STAGES[name](run)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
