"""Measures how often, how strongly and where the features of the embedded SAEs fire, and keeps it as package data.

Stages: text (packages of pip and npm, and Python's own files), encode (the long one: it goes on where it stopped),
write. Everything, on one thread:

    python scripts/annotate_embedded_saes.py all --work ~/sae-contexts
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from embedded_saes import contexts  # noqa: E402 - the path is set above
from train_embedded_saes import Run, source  # noqa: E402

from neuronpedia_inference import embedded  # noqa: E402

LAYERS = (10, 15, 20)
N_FEATURES = 4096
NOTICE = """# Where the contexts come from

The contexts in this folder are short quotations, each with the document it is from. `MODEL_CARD.md` lists the texts
with their packages and licences. Contexts from Wikipedia are licensed under CC BY-SA 3.0. Python's sources and
documentation: copyright Python Software Foundation, all rights reserved, licensed under the PSF licence 2. WordNet's
notice follows.

```
{wordnet}
```
"""


def make_text(run: Run) -> None:
    run.work.mkdir(parents=True, exist_ok=True)
    contexts.make_texts(run.work / "packages", run.work / "texts.npz", run.tokenizer)


def encode(run: Run) -> None:
    contexts.encode(contexts.load_texts(run.work / "texts.npz"), run.work / "firings", run.model, run.saes)


def write(run: Run) -> None:
    texts = contexts.load_texts(run.work / "texts.npz")
    pieces = [run.tokenizer.decode([token]) for token in range(len(run.tokenizer))]
    folder = embedded.FEATURES_DIR
    for layer in run.layers:
        firings = contexts.load_firings(run.work / "firings", layer, N_FEATURES)
        contexts.write_numbers(firings, folder / f"{source(layer)}.json")
        contexts.write_contexts(firings, texts, pieces, folder / f"{source(layer)}.jsonl.gz")
    about = json.dumps(contexts.about(texts), indent=1)
    (folder / "about.json").write_text(about + "\n", encoding="utf-8")
    notice = NOTICE.format(wordnet=contexts.wordnet_notice(run.work / "packages"))
    (folder / "NOTICE.md").write_text(notice, encoding="utf-8")


STAGES = {"text": make_text, "encode": encode, "write": write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, text and what fires on it")
    args = parser.parse_args()
    run = Run(args.work, LAYERS)
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](run)


if __name__ == "__main__":
    main()
