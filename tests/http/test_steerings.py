"""The same steering through every operation and every door: what `steer` does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from neuronpedia_inference.client.in_process import InProcess
from neuronpedia_inference.client.session import Client
from neuronpedia_inference.client.steering import Steering
from neuronpedia_inference.operations import answer, by_name
from neuronpedia_inference.runtime import Runtime
from service import batch
from tests.steerings import N_NEW, POINT, PROMPT, STEERING, check, expect_close

OPERATIONS = ["sweep", "capture", "score", "lens_prompt", "completions"]


def test_routes(http: httpx.Client) -> None:
    def ask(operation: str, body: dict[str, Any]) -> dict[str, Any]:
        response = http.post(by_name[operation].path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    assert check(ask) == OPERATIONS


def test_lines_of_batch_files(runtime: Runtime, tmp_path: Path) -> None:
    """The steering is what all lines share, where the operation has it on top."""

    async def service(operation: str, bodies: list[dict[str, Any]]) -> list[Any]:
        return [await answer(by_name[operation], body, runtime) for body in bodies]

    def ask(operation: str, body: dict[str, Any]) -> dict[str, Any]:
        shared = {name: body[name] for name in body.keys() & STEERING.keys()}
        line = {name: value for name, value in body.items() if name not in shared}
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        target.unlink(missing_ok=True)
        source.write_text(json.dumps(line) + "\n", encoding="utf-8")
        asyncio.run(batch.run(str(source), str(target), operation, json.dumps(shared) if shared else "", service))
        return json.loads(target.read_text(encoding="utf-8"))["answer"]

    assert check(ask) == OPERATIONS


def test_the_client(runtime: Runtime) -> None:
    """Its own value is made of the same JSON."""
    transport = InProcess(runtime)
    more = {name: STEERING[name] for name in ("strength_multiplier", "max_dose")}
    steering = Steering.from_body({name: STEERING[name] for name in ("features", "vectors", "edits")})
    plain = {"strength_multiplier": 1.0, "max_dose": more["max_dose"]}
    client = Client(transport)
    # A value of the client's is edits in order, in which a multiplier has no part.
    one = Steering.from_body({"features": STEERING["features"], "vectors": STEERING["vectors"]}) * 1.2
    whole = Steering(one.edits + steering.edits[2:])
    by_json = transport.ask("steer", {"prompt": PROMPT, "max_new_tokens": N_NEW, **STEERING})
    assert by_json["steered"]["text"] != by_json["default"]["text"], "the control: it steers"
    found = client.steer(PROMPT, whole, max_new_tokens=N_NEW, **plain)
    assert found.steered.text == by_json["steered"]["text"]
    [captured] = client.capture(PROMPT, POINT, whole, **plain)
    [untouched] = client.capture(PROMPT, POINT)
    [told] = transport.ask("capture", {"prompt": PROMPT, "points": [POINT], **STEERING})["results"]
    expect_close(captured[POINT].tolist(), told["states"][POINT])
    assert float(np.abs(np.subtract(untouched[POINT], captured[POINT])).max()) > 1
    swept = client.sweep(PROMPT, whole, [1], max_new_tokens=N_NEW)
    assert [one.text for one in swept] == [client.steer(PROMPT, whole, max_new_tokens=N_NEW).steered.text]
    scores = client.score(PROMPT, [found.steered.text], whole, **plain)
    [expected] = transport.ask("score", {"prompt": PROMPT, "continuations": [found.steered.text], **STEERING})[
        "results"
    ]
    assert [one.logprob for one in scores] == [pytest.approx(expected["logprob"], abs=2e-3)]
