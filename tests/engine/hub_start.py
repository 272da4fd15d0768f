"""Run by test_hub.py in a process of its own: start a Runtime from the environment, answer, print JSON."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from neuronpedia_inference.domain import Ranking, Sampling
from neuronpedia_inference.edits.plan import Do, Edit, Feature, Plan
from neuronpedia_inference.errors import NoJacobianLens, StartupError
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.questions import OneFeature, Strongest
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.settings import Settings

PROMPT = "Hello, hub!"
WAIT_S = 600.0


async def answers(runtime: Runtime) -> dict[str, Any]:
    prompt = runtime.tokenize(PROMPT, "once")
    source = runtime.shelf.sources[-1]
    plan = Plan((Edit(Do.ADD, Feature(source.name, 3), 40.0),))
    texts = runtime.generate(prompt, [plan, None], Sampling(8), stream=False)
    [ranked] = await runtime.ask(Strongest([prompt], runtime.shelf.sources, Ranking(4)))
    return {
        "ids": prompt.ids,
        "sources": [asdict(s) for s in runtime.shelf.sources],
        "values": (await runtime.ask(OneFeature([prompt], source, 3)))[0].values.tolist(),
        "ranked": [(row.source, row.index, row.values.tolist()) for row in map(ranked.__getitem__, range(4))],
        "generated": [row.token_ids for row in await anext(texts)],
        "known_names": runtime.model.known_names,
        "lens": await lens(runtime),
    }


async def lens(runtime: Runtime) -> dict[str, Any]:
    """What the Jacobian lens says of the prompt, or why there is none."""
    body = {"model": "m", "type": ["JACOBIAN_LENS"], "prompt": PROMPT, "top_n": 3, "filter_non_word_tokens": False}
    try:
        said = await answer(by_name["lens_prompt"], {**body, "stream": False}, runtime)
    except NoJacobianLens as exc:
        return {"refused": exc.message, "because": runtime.lenses.jacobians.off_because}
    tokens = [one["results"][0] for one in said["tokens"]]
    return {"layers": said["meta"]["layers_by_type"]["JACOBIAN_LENS"], "probs": [one["top_probs"] for one in tokens]}


def wait_for_all(runtime: Runtime) -> None:
    """For what a start does not wait for, so that the next one finds everything."""
    end_s = time.monotonic() + WAIT_S
    while runtime.shelf.coming:
        assert time.monotonic() < end_s, f"{runtime.shelf.coming} are still to come"
        time.sleep(0.05)


def main() -> None:
    try:
        runtime = Runtime.load(Settings.read())
    except StartupError as exc:
        print(json.dumps({"stopped": str(exc)}))
        sys.exit(1)
    wait_for_all(runtime)
    print(json.dumps(asyncio.run(answers(runtime))))
    runtime.close()


if __name__ == "__main__":
    main()
