"""The calls of Neuronpedia's web application, as it makes them, and what it reads of the answers (contract, column W).

The similarity matrix needs a temporal SAE: its call is in `test_temporal.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import MODEL, SECRET, SOURCE, TEXT, WIDTH, Served

TEXTS = [TEXT, "The court heard the case."]
HOOK = "blocks.15.hook_resid_post"
NUMBER = (int, float)
SINGLE = {"values": [NUMBER], "maxValue": NUMBER, "maxValueIndex": int}
RANKED = {
    "source": str,
    "index": int,
    "values": [NUMBER],
    "maxValue": NUMBER,
    "maxValueIndex": int,
    "sumValues": NUMBER,
}
AT_TOKEN = {"tokenPosition": int, "token": str, "topFeatures": [{"featureIndex": int, "activationValue": NUMBER}]}
LOGPROB = {"token": str, "logprob": NUMBER, "top_logprobs": [{"token": str, "logprob": NUMBER}]}
MESSAGE = {"role": str, "content": str}
AXIS = {"type": str, "pcTitles": [str], "turns": [{"pcValues": dict, "snippet": str}]}

ALL = {
    "model": MODEL,
    "sourceSet": "res-4k",
    "selectedSources": [SOURCE],
    "sortByTokenIndexes": [],
    "ignoreBos": True,
    "numResults": 50,
}
TOPK = {"model": MODEL, "source": SOURCE, "topK": 10, "ignoreBos": True}
FEATURE = {"model": MODEL, "source": SOURCE, "index": 1113}
STEER = {
    "model": MODEL,
    "steerMethod": "SIMPLE_ADDITIVE",
    "normalizeSteering": False,
    "nCompletionTokens": 4,
    "temperature": 0.5,
    "strengthMultiplier": 2,
    "freqPenalty": 1,
    "seed": 16.5,
    "nLogprobs": 5,
}
CHAT = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Who are you?"}]

READ = {
    "activation/single",
    "activation/single-batch",
    "activation/all",
    "activation/all-batch",
    "activation/topk-by-token",
    "activation/topk-by-token-batch",
    "activation/source",
    "activation/attention",
    "activation/raw",
    "steer/completion",
    "steer/completion-chat",
    "tokenize",
    "lens/prompt",
    "util/sae-vector",
    "util/sae-topk-by-decoder-cossim",
    "util/similarity-matrix-pred",
}
"""The routes that the contract names a caller in the web application for, written down by hand."""
ELSEWHERE = {"util/similarity-matrix-pred": "test_temporal.py", "lens/prompt": "below, frame by frame"}

CALLS: list[tuple[str, dict[str, Any], Any]] = [
    (
        "activation/single",
        {"prompt": TEXT, "model": MODEL, "source": SOURCE, "index": "1113"},
        {"activation": SINGLE, "tokens": [str]},
    ),
    (
        "activation/single",
        {"prompt": TEXT, "model": MODEL, "vector": [0.1] * WIDTH, "hook": HOOK},
        {"activation": SINGLE, "tokens": [str]},
    ),
    (
        "activation/single-batch",
        {"prompts": TEXTS, "model": MODEL, "source": SOURCE, "index": "1113"},
        {"results": [{"activation": SINGLE, "tokens": [str]}]},
    ),
    ("activation/all", {"prompt": TEXT, **ALL}, {"activations": [RANKED], "tokens": [str]}),
    ("activation/all-batch", {"prompts": TEXTS, **ALL}, {"results": [{"activations": [RANKED], "tokens": [str]}]}),
    ("activation/topk-by-token", {"prompt": TEXT, **TOPK}, {"results": [AT_TOKEN], "tokens": [str]}),
    (
        "activation/topk-by-token-batch",
        {"prompts": TEXTS, **TOPK},
        {"results": [{"results": [AT_TOKEN], "tokens": [str]}]},
    ),
    (
        "activation/source",
        {"prompts": TEXTS, "model": MODEL, "source": SOURCE},
        {"results": [{"tokens": [str], "activeFeatures": dict}]},
    ),
    (
        "activation/attention",
        {"prompt": TEXT, "model": MODEL, "layer": 3, "head": 1},
        {
            "seqLen": int,
            "attentionIndices": [int],
            "attentionValues": [NUMBER],
            "maxActivation": NUMBER,
            "tokens": [str],
        },
    ),
    (
        "activation/raw",
        {"prompts": TEXTS, "layers": [3], "model": MODEL, "hook_point": "residual_stream"},
        {
            "results": [{"token_strings": [str], "activations": [{"layer": int, "values": [[NUMBER]]}]}],
            "hook_point": str,
        },
    ),
    ("tokenize", {"model": MODEL, "text": TEXT, "prependBos": False}, {"tokens": [int], "tokenStrings": [str]}),
    ("util/sae-vector", FEATURE, {"vector": [NUMBER], "hookName": str}),
    (
        "util/sae-topk-by-decoder-cossim",
        {"feature": FEATURE, "model": MODEL, "source": "20-res-4k", "numResults": 10},
        {"topkDecoderCossimFeatures": [{"feature": {"source": str, "index": int}, "cosineSimilarity": NUMBER}]},
    ),
    (
        "steer/completion",
        {"prompt": TEXT, **STEER, "types": ["STEERED"], "features": [{**FEATURE, "strength": 10}]},
        {"outputs": [{"type": str, "output": str, "logprobs": [LOGPROB]}]},
    ),
    (
        "steer/completion",
        {
            "prompt": TEXT,
            **STEER,
            "types": ["STEERED"],
            "vectors": [{"steeringVector": [0.1] * WIDTH, "hook": HOOK, "strength": 2.5}],
        },
        {"outputs": [{"type": str, "output": str, "logprobs": [LOGPROB]}]},
    ),
    (
        "steer/completion-chat",
        {"prompt": CHAT, **STEER, "types": ["DEFAULT"], "features": [], "steerSpecialTokens": False},
        {
            "outputs": [{"type": str, "raw": str, "chatTemplate": [MESSAGE], "logprobs": [LOGPROB]}],
            "input": {"raw": str, "chatTemplate": [MESSAGE]},
        },
    ),
]


def unread(shape: Any, value: Any, where: str = "") -> Iterator[str]:
    """Where a value has not the shape: a type or several, a dictionary of at least these keys, a list of one."""
    if isinstance(shape, dict):
        missing = shape.keys() - value.keys() if isinstance(value, dict) else shape.keys()
        yield from (f"{where}.{key} is missing" for key in missing)
        for key in shape.keys() - missing:
            yield from unread(shape[key], value[key], f"{where}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is no list with something in it"
            return
        for number, item in enumerate(value):
            yield from unread(shape[0], item, f"{where}.{number}")
    elif not isinstance(value, shape) or isinstance(value, bool):
        yield f"{where} is {value!r}"


@pytest.fixture(scope="module")
def web(locked_server: Served) -> Iterator[httpx.Client]:
    with locked_server.client(SECRET) as client:
        client.headers["Accept-Encoding"] = "gzip"
        yield client


@pytest.mark.parametrize(("route", "body", "shape"), CALLS, ids=[f"{n}-{call[0]}" for n, call in enumerate(CALLS)])
def test_an_answer_is_read(web: httpx.Client, route: str, body: dict[str, Any], shape: Any) -> None:
    answer = web.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    assert list(unread(shape, answer.json())) == []


def test_every_call_of_the_application_is_here() -> None:
    assert {route for route, _, _ in CALLS} | ELSEWHERE.keys() == READ


TOKEN = {"position": int, "token": str, "id": int}
FRAMES: dict[str, Any] = {
    "meta": {"types": [str], "layers_by_type": {"LOGIT_LENS": [int]}, "top_n": int, "prompt_len": int},
    "prompt": {"tokens": [TOKEN]},
    "token": {**TOKEN, "results": [{"type": str, "top_tokens": [[str]], "top_probs": [[NUMBER]]}]},
    "done": {"seq_len": int, "prompt_len": int, "vocab_size": int, "completion": str},
}


@pytest.mark.parametrize("asked", [{"prompt": TEXT}, {"chat": CHAT}], ids=["text", "chat"])
def test_every_frame_of_a_lens_is_read(web: httpx.Client, asked: dict[str, Any]) -> None:
    body = {"model": MODEL, "type": ["LOGIT_LENS", "JACOBIAN_LENS"], **asked, "topN": 8, "stream": True}
    body |= {"numCompletionTokens": 2, "temperature": 0.5, "failIfBusy": True, "layers": [12, 20]}
    with web.stream("POST", "/v1/lens/prompt", json=body) as response:
        assert response.headers["content-type"].startswith("application/x-ndjson")
        assert response.headers.get("content-encoding", "identity") == "identity"
        frames = [json.loads(line) for line in response.iter_lines()]
    kinds = [frame["kind"] for frame in frames]
    assert kinds == ["meta", "prompt", *["token"] * (len(frames) - 3), "done"]
    assert len(frames) - 3 == frames[-1]["seq_len"]
    for frame in frames:
        assert list(unread(FRAMES[frame["kind"]], frame)) == []


def test_the_shapes_can_tell() -> None:
    assert list(unread({"a": [int]}, {"a": [1, "x"]})) == [".a.1 is 'x'"]
    assert list(unread({"a": int, "b": str}, {"a": True})) == [".b is missing", ".a is True"]


@pytest.mark.parametrize("route", ["steer/completion", "steer/completion-chat"])
@pytest.mark.parametrize("kind", ["STEERED", "DEFAULT"])
def test_every_event_of_a_stream_is_read(web: httpx.Client, route: str, kind: str) -> None:
    """The application asks for one type at a time, and merges what comes by it."""
    body = {**STEER, "types": [kind], "features": [{**FEATURE, "strength": 10}], "stream": True}
    is_chat = route.endswith("chat")
    body |= {"prompt": CHAT, "steerSpecialTokens": False, "isAssistantAxis": True} if is_chat else {"prompt": TEXT}
    with web.stream("POST", f"/v1/{route}", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in response.headers
        events = [json.loads(line[len("data: ") :]) for line in response.iter_lines() if line.startswith("data: ")]
    shape = {"type": str, **({"raw": str, "chatTemplate": [MESSAGE]} if is_chat else {"output": str})}
    for event in events:
        assert list(unread({"outputs": [shape]}, event)) == []
        assert [output["type"] for output in event["outputs"]] == [kind]
    if is_chat:
        assert list(unread({"assistantAxis": [AXIS]}, events[-1])) == []
        [axis] = events[-1]["assistantAxis"]
        assert (axis["type"], "pcValuesPostCap" in axis["turns"][-1]) == (kind, kind == "STEERED")
    else:
        texts = [event["outputs"][0]["output"] for event in events]
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))


def test_the_health_of_steering_is_read(web: httpx.Client) -> None:
    shape = {"stats": {"num_running_requests": int, "system_ram_percent": NUMBER, "model_name": str}, "summary": str}
    assert list(unread(shape, web.get("/v1/steer/health").json())) == []
