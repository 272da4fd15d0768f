"""What a thousand large SAEs cost a start, and what one feature of them costs a request.

    python -m benchmarks.many_saes [--saes 1000] [--rounds 15]

A tiny model of width 2,560 and SAEs of 65,536 features in float32, 1.3 TB on paper: files with holes, in which the rows
and columns that are used are written. Starts with and without them take turns, each in a process of its own, with one
thread and warm caches. Then a text is steered by a feature that has not been used, whose pages have been dropped from
the kernel's cache, in turns with one that is kept; and pages are counted (Linux only). Ends with 1 beyond the
bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import pages, sparse
from benchmarks.machine import Load, description
from benchmarks.process import Process

START_S, START_MIB, ADD_MS = 2.0, 100.0, 50.0
READY_S = 600.0
USED = tuple(range(1000, 64_000, 3000))
"""Features that are written in the SAE that is steered by."""
SET = "res-wide"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--saes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--start", nargs=2, metavar=("MODEL", "SAES"), help="one start, for the processes of this one")
    chosen = parser.parse_args()
    if chosen.start:
        return _start(*chosen.start, rounds=chosen.rounds)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), chosen.saes, chosen.rounds)
    print(json.dumps(found, indent=2))
    return int(
        found["start_more_s"] > START_S
        or found["start_more_mib"] > START_MIB
        or found["add_more_ms"] > ADD_MS
        or found["pages_of_a_row"] > found["pages_that_a_row_lies_on"]
        or found["more_pages_of_a_feature"] > sparse.WIDTH + found["pages_of_vectors"]
    )


def measure(folder: Path, n_saes: int, rounds: int) -> dict[str, Any]:
    """Medians of starts and answers."""
    model = _model(folder / "model")
    for number in range(n_saes):
        sparse.write(folder / "saes" / f"{number}-{SET}", "blocks.0.hook_resid_post", USED if number == 0 else ())
    for saes in ("", folder / "saes"):
        _run(model, saes, 0)  # caches are warm from here on
    load = Load()
    starts = [(_run(model, "", 0), _run(model, folder / "saes", 0)) for _ in range(5)]
    asked = _run(model, folder / "saes", rounds)
    return {
        **description(),
        **load.since(),
        "saes": n_saes,
        "start_s": round(statistics.median(one["seconds"] for one, _ in starts), 3),
        "start_more_s": round(statistics.median(many["seconds"] - one["seconds"] for one, many in starts), 3),
        "start_more_mib": round(statistics.median(many["mib"] - one["mib"] for one, many in starts), 1),
        **asked["asked"],
    }


def _model(folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.models import GROUPED, tokenizer

    config = LlamaConfig(**{**GROUPED, "hidden_size": sparse.WIDTH, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _run(model: Path, saes: Path | str, rounds: int) -> dict[str, Any]:
    process = Process("benchmarks.many_saes", "--start", str(model), str(saes), "--rounds", str(rounds))
    try:
        return json.loads(process.line(READY_S))
    finally:
        process.close()


def _start(model: str, saes: str, *, rounds: int) -> int:
    """In a process of its own: what a start takes beyond importing, and what requests take then."""
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings

    settings = Settings.read(model_id=model, sae_sets=None if saes else (), local_sae_dir=saes or None, num_threads=1)
    before = _mib("VmRSS")
    started = time.perf_counter()
    runtime = Runtime.load(settings)
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "mib": _mib("VmRSS") - before}
    if rounds:
        found["asked"] = asyncio.run(_ask(runtime, Path(saes) / f"0-{SET}" / "sae_weights.safetensors", rounds))
    runtime.close()
    print(json.dumps(found), flush=True)
    return 0


async def _ask(runtime: Any, file: Path, rounds: int) -> dict[str, Any]:
    more: list[float] = []
    kept, *unread_features = USED
    unread = iter(unread_features)
    await _seconds(runtime, kept)
    assert rounds < len(unread_features), f"at most {len(unread_features) - 1} rounds"
    for _ in range(rounds):
        pages.forget(file)
        decoding = await _seconds(runtime, kept)
        more.append(1000 * (await _seconds(runtime, next(unread)) - decoding))
    index = next(unread)
    pages.forget(file)
    await _seconds(runtime, index)
    of_row = pages.cached_pages(file)
    await _answer(runtime, "activation_single", model="", prompt="a cat", source=f"0-{SET}", index=str(index))
    place = sparse.starts()["W_dec"] + sparse.ITEM * index * sparse.WIDTH
    return {
        "add_more_ms": round(statistics.median(more), 2),
        "pages_of_a_row": len(of_row),
        "pages_that_a_row_lies_on": len(pages.pages_of(place, sparse.ITEM * sparse.WIDTH)),
        "more_pages_of_a_feature": len(pages.cached_pages(file) - of_row),
        "pages_of_vectors": len(pages.pages_of(sparse.starts()["b_dec"], sparse.ITEM * sparse.WIDTH)) + 2,
    }


async def _seconds(runtime: Any, index: int) -> float:
    """Of a text that is steered by a feature."""
    features = [{"source": f"0-{SET}", "index": index, "strength": 3}]
    started = time.perf_counter()
    await _answer(runtime, "steer", prompt="a cat", max_new_tokens=8, compare=False, temperature=0, features=features)
    return time.perf_counter() - started


async def _answer(runtime: Any, operation: str, **body: Any) -> Any:
    from neuronpedia_inference.operations import answer, by_name

    return await answer(by_name[operation], body, runtime)


def _mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) / 1024


if __name__ == "__main__":
    sys.exit(main())
