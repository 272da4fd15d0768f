"""Fits the Jacobians of the embedded model, checks them, and keeps those whose lens says more than the logit lens.

J_l is the mean, over prompts and positions, of the derivative of the last block's output at a position by block l's
output at that same position.

Stages: text (packages of pip, and Python's own files), fit (the long one: it goes on where it stopped), check (against
finite differences of the plain model), evaluate, write. Everything, on one thread:

    python scripts/fit_jacobians.py all --work ~/jacobians
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from embedded_jacobians import fit, measure, texts  # noqa: E402 - the path is set above
from embedded_jacobians.write import write_jacobians  # noqa: E402

from neuronpedia_inference.embedded.weights import model_folder  # noqa: E402

LAYERS = range(22, 29)
"""Of the last block there is none: its output is read out as it is. Below, its lens says less than the logit lens."""
LOOKED_AT = 32
"""Tokens of the held-out text on which finite differences are taken."""


class Run:
    """What the stages share: the work folder, the texts, and the model, loaded when first needed."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_folder())

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(model_folder(), **how).eval().requires_grad_(False)

    @cached_property
    def texts(self) -> texts.Texts:
        return texts.load(self.work / "texts.npz")


def make_text(run: Run) -> None:
    run.work.mkdir(parents=True, exist_ok=True)
    texts.make(run.work / "packages", run.work / "texts.npz", run.tokenizer)


def fit_all(run: Run) -> None:
    fit.fit(run.model, run.texts.fitted, LAYERS, run.work / "sums")


def check(run: Run) -> None:
    found = measure.against_differences(
        run.model, fit.load(run.work / "sums"), run.texts.held_out[0][:LOOKED_AT], LAYERS
    )
    (run.work / "differences.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def evaluate(run: Run) -> None:
    jacobians = fit.load(run.work / "sums")
    found = measure.agreement(run.model, jacobians, run.texts.held_out)
    (run.work / "agreement.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def write(run: Run) -> None:
    measured = {
        name: json.loads((run.work / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("differences", "agreement")
    }
    write_jacobians(fit.load(run.work / "sums"), measured, run.texts, fit.n_positions(run.work / "sums"))


STAGES = {"text": make_text, "fit": fit_all, "check": check, "evaluate": evaluate, "write": write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, texts and sums")
    args = parser.parse_args()
    run = Run(args.work)
    for name in STAGES if args.stage == "all" else [args.stage]:
        began = time.monotonic()
        STAGES[name](run)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
