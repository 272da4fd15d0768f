"""The deployed class and its web app, used by processes that have modal and nothing of this project."""

# The client re-exports its names without saying so.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import neuronpedia_inference_client as np_client
import pytest

from neuronpedia_inference import embedded
from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.web.fields import example_of
from service.jobs import PARAMETERS
from tests.modal.service_under_test import NAMED, Deployed
from tests.rounding import differences

FRIENDLY = ("activations", "top_k", "steer")
SHORT: dict[str, dict[str, Any]] = {
    "steer": {"max_new_tokens": 4},
    "steer_completion": {"n_completion_tokens": 4},
    "steer_completion_chat": {"n_completion_tokens": 4},
}
NOT_SERVED = "util_similarity_matrix_pred"
"""It is for temporal SAEs, and the embedded model has none."""
BODIES = {
    op.name: {**example_of(op.request), **SHORT.get(op.name, {})}
    for op in OPERATIONS
    if not op.off_modal_because and op.name != NOT_SERVED
}
STEERING = {"features": [{"source": "15-res-4k", "index": 42, "strength": 60}], "max_new_tokens": 6}


@pytest.fixture(scope="module")
def answers(deployed: Deployed) -> dict[str, Any]:
    """The answer of every method, each called as it is meant to be called."""
    return deployed.python(
        """
        service, bodies, friendly = Inference(), *map(json.loads, sys.argv[1:])
        result = {}
        for name, body in bodies.items():
            method = getattr(service, name)
            if name in friendly:
                prompt = body.pop("prompt")
                result[name] = method.remote(prompt, **body)
            else:
                result[name] = method.remote(body)
        """,
        json.dumps(BODIES),
        json.dumps(FRIENDLY),
    )


@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op.name in BODIES], ids=lambda op: op.name)
def test_methods_and_routes_give_the_same_answers(deployed: Deployed, answers: dict[str, Any], operation: Any) -> None:
    path, body = operation.address(BODIES[operation.name])
    response = httpx.request(operation.method, deployed.url + path, json=body, timeout=600)

    assert response.status_code == 200, response.text
    told, said = answers[operation.name], response.json()
    if operation.name == "steer_health":  # of another moment
        assert (said["stats"].keys(), said["stats"]["model_name"]) == (
            told["stats"].keys(),
            told["stats"]["model_name"],
        )
    else:
        assert differences(told, said) == []


def test_other_ways_to_call(deployed: Deployed) -> None:
    result = deployed.python(
        """
        service = Inference()
        texts = ["The cat sat.", "A court heard it.", "Sugar and salt."]
        kwargs = {"num_results": 1}
        hi = {"model": "x", "text": "hi"}
        one_by_one = [service.activations.remote(text, **kwargs) for text in texts]
        result = {
            "one by one": one_by_one,
            "mapped": list(service.activations.map(texts, kwargs=kwargs)),
            "as bodies": list(service.activations.map([{"prompt": text, **kwargs} for text in texts])),
            "as keywords": service.tokenize.remote(**hi) == service.tokenize.remote(hi),
            "both": service.tokenize.remote(hi, prepend_bos=False)["tokens"],
            "by words": service.search.remote("moon", limit=1) == service.search.remote({"q": "moon", "limit": 1}),
            "by name": service.feature.remote("15-res-4k", 3)["index"] == 3,
            "two lists": len(service.contrast.remote(["The moon."], ["A cat."], limit=1)["a"]) == 1,
            "model": service.capabilities.remote()["model"],
            "sources": service.capabilities.remote()["sources"],
        }
        """
    )
    one_by_one = result.pop("one by one")
    assert {way: differences(result.pop(way), one_by_one) for way in ("mapped", "as bodies")} == {
        "mapped": [],
        "as bodies": [],
    }
    assert result.pop("both") == [6004]
    assert result.pop("model") == embedded.MODEL_ID
    assert tuple(result.pop("sources")) == embedded.SOURCES
    assert all(result.values()), result


def test_tensors_come_as_bytes_or_as_arrays(deployed: Deployed) -> None:
    result = deployed.python(
        """
        from safetensors.numpy import load
        service, body = Inference(), {"prompts": ["The cat sat."], "layers": [15], "model": "m"}
        hook = "blocks.15.hook_resid_post"
        name = f"0/{hook}"
        told = service.activation_raw.remote(body)
        arrays = service.activation_raw.remote(body, format="numpy")
        result = {
            "told": told["results"][0]["activations"][0]["values"],
            "bytes": load(service.activation_raw.remote(body, format="safetensors"))[name].tolist(),
            "arrays": arrays["tensors"][name].tolist(),
            "tokens": arrays["answer"]["results"][0]["tokenIds"] == told["results"][0]["tokenIds"],
            "captured": list(service.capture.remote("The cat sat.", [hook], format="numpy")["tensors"]),
        }
        """
    )
    assert result["bytes"] == result["arrays"]
    assert len(result["told"][0]) == 576
    assert result["told"][0] == pytest.approx(result["bytes"][0], abs=0.51e-4)
    assert (result["tokens"], result["captured"]) == (True, ["blocks.15.hook_resid_post"])


def test_a_stream_arrives_as_it_is_written_and_ends_as_the_whole(deployed: Deployed) -> None:
    result = deployed.python(
        """
        service, fields = Inference(), json.loads(sys.argv[1])
        events = list(service.steer_stream.remote_gen("I think that", **fields))
        whole = service.steer.remote("I think that", **fields)
        long = service.steer_stream.remote_gen("I think that", **{**fields, "max_new_tokens": 60})
        next(long)
        result = [events, whole, service.capabilities.remote()["running"], len(list(long))]
        """,
        json.dumps(STEERING),
    )
    events, whole, n_running, n_left = result
    assert 1 < len(events) <= STEERING["max_new_tokens"]
    assert differences(events[-1], whole) == []
    assert n_running == 1, "the first event was held back to the end"
    assert n_left > 1
    assert whole["steered"]["text"] != whole["default"]["text"]


def test_bad_input_arrives_as_built_in_errors(deployed: Deployed) -> None:
    result = deployed.python(
        """
        service = Inference()
        result = [
            error_of(service.top_k.remote, "The cat sat.", source="15-res-4k", top_k="three"),
            error_of(service.activations.remote, "a", source="15-res-4k", index=10**6),
            error_of(service.activations.remote, "word " * 500),
            error_of(service.top_k.remote, "The cat sat.", source="16-res-4k"),
            error_of(service.util_similarity_matrix_pred.remote, modelId="x", sourceId="15-res-4k", text="a cat"),
            error_of(service.activation_single.remote, model="x", prompt="a", vector=[1.0], hook="blocks.1.nope"),
            error_of(service.tokenize.remote, "not a body"),
            error_of(service.tokenize.remote, "not a body", prepend_bos=True),
            error_of(lambda: list(service.steer_stream.remote_gen("a", features=[], max_new_tokens=10**6))),
        ]
        """
    )
    assert [(kind, text.partition(":")[0]) for kind, text in result] == [
        ("ValueError", "invalid_body"),
        ("ValueError", "invalid_request"),
        ("ValueError", "limit_exceeded"),
        ("LookupError", "unknown_source"),
        ("ValueError", "invalid_request"),
        ("LookupError", "unknown_hook"),
        ("ValueError", "invalid_body"),
        ("ValueError", "invalid_request"),
        ("ValueError", result[-1][1].partition(":")[0]),
    ]
    assert "'15-res-4k'" in result[3][1]
    assert "max is 200" in result[2][1]
    assert "SAE architecture is not temporal" in result[4][1]


def test_web_errors_are_those_of_the_library(deployed: Deployed) -> None:
    response = httpx.post(deployed.url + "/v1/top-k", json={"prompt": "a", "source": "16-res-4k"}, timeout=600)
    assert response.status_code == 400
    assert response.json()["code"] == "unknown_source"
    assert httpx.get(deployed.url + "/health", timeout=600).json() == {"status": "healthy"}
    assert httpx.get(deployed.url + "/ready", timeout=600).json()["model"] == embedded.MODEL_ID


def test_server_sent_events_arrive_one_by_one(deployed: Deployed) -> None:
    body = {"prompt": "I think that", **STEERING, "stream": True}
    with httpx.stream("POST", deployed.url + "/v1/steer", json=body, timeout=600) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert 1 < len(lines) <= STEERING["max_new_tokens"]
    assert json.loads(lines[-1].removeprefix("data: "))["default"]["text"]


def test_a_caller_that_hangs_up_frees_its_row(deployed: Deployed) -> None:
    body = {"prompt": "I think that", **STEERING, "max_new_tokens": 500, "stream": True}
    before = _cancelled(deployed)
    with httpx.stream("POST", deployed.url + "/v1/steer", json=body, timeout=600) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 300
    while _cancelled(deployed) == before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _cancelled(deployed) == before + 1


def _cancelled(deployed: Deployed) -> int:
    return httpx.get(deployed.url + "/v1/capabilities", timeout=600).json()["requests"].get("cancelled", 0)


def test_the_published_client_works(deployed: Deployed) -> None:
    api = np_client.DefaultApi(np_client.ApiClient(np_client.Configuration(host=f"{deployed.url}/v1")))
    request = np_client.TokenizePostRequest(model=embedded.MODEL_ID, text="The cat", prepend_bos=True)
    assert api.tokenize_post(request).token_strings == ["<|im_start|>", "The", " cat"]


def test_one_container_has_32_inputs_in_flight(deployed: Deployed) -> None:
    deployed.python(
        """
        texts = [f"Number {i} of many." for i in range(64)]
        kwargs = {"features": [], "max_new_tokens": 16, "compare": False}  # longer than it takes to hand out the inputs
        result = len(list(Inference().steer.map(texts, kwargs=kwargs)))
        """
    )
    container = deployed.containers()[-1]
    assert container.n_answered >= 64
    assert container.most_running == 32


def test_large_bodies_go_both_ways(deployed: Deployed) -> None:
    """Over 2 MiB they travel as blobs."""
    asked, steered_by_nothing, answered = deployed.python(
        """
        numbers = [k / 7 for k in range(576)]
        nothing = [{"hook": "blocks.1.hook_resid_post", "vector": numbers, "strength": 0.0}] * 300
        # Equal objects are sent once.
        nothing = json.loads(json.dumps(nothing))
        steered = Inference().steer.remote("I think that", vectors=nothing, max_new_tokens=2)
        features = Inference().activations.remote("many words " * 90, source_set="neurons", num_results=1000)
        result = [len(str(nothing)), steered["steered"] == steered["default"], len(str(features))]
        """
    )
    assert asked > 2 * 2**20
    assert steered_by_nothing
    assert answered > 2 * 2**20


def test_no_web_request_can_make_another_pool(deployed: Deployed) -> None:
    """Fifty strangers, each with parameters of their own: the pool that there is, and no other."""
    assert httpx.get(deployed.url + "/health", timeout=600).status_code == 200
    before = set(deployed.plane.calls.pools)
    for number in range(50):
        query = {PARAMETERS[number % len(PARAMETERS)]: str(number + 1), "model_id": NAMED, "token_limit": str(number)}
        answer = httpx.get(deployed.url + "/ready", params=query, timeout=600).json()
        assert answer["model"] == embedded.MODEL_ID
    assert set(deployed.plane.calls.pools) == before
    assert len({container.pool.id for container in deployed.containers()}) == 1
    assert not deployed.function().definition.class_parameter_info.schema


def test_another_model_has_containers_of_its_own_and_no_web_address(deployed: Deployed) -> None:
    result = deployed.python(
        """
        AnyModel = modal.Cls.from_name("neuronpedia-inference", "AnyModel")
        tiny = AnyModel(model_id="tests/tiny", sae_sets="[]", token_limit=66)
        about = tiny.capabilities.remote()
        wrong = error_of(tiny.top_k.remote, "a", source="15-res-4k")
        result = [about["model"], about["num_layers"], about["token_limit"], wrong]
        """
    )
    assert result[:3] == [NAMED, 3, 66]
    assert result[3][0] == "LookupError"
    made = deployed.function("AnyModel.*")
    assert not made.urls
    assert made.definition.method_definitions.keys() ^ deployed.function().definition.method_definitions == {"serve"}


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"model_id": "/etc"}, "Paths are not accepted"),
        ({"model_id": "../cache/tiny"}, "Paths are not accepted"),
        ({"override_model_id": "/cache/tiny"}, "override_model_id '/cache/tiny' is not the name of a model"),
        ({"custom_hf_model_id": "~/tiny"}, "Paths are not accepted"),
        ({"model_id": "gpt2-small"}, "The deployment's MODELS lists them"),
        ({"model_id": NAMED, "override_model_id": "tests/tinny"}, "Did you mean 'tests/tiny'"),
    ],
)
def test_models_that_callers_may_not_have(deployed: Deployed, chosen: dict[str, str], why: str) -> None:
    """Refused in the container of the job, before there is any of the model's."""
    n_pools = len(deployed.plane.calls.pools)
    kind, text = deployed.python(
        """
        run = modal.Function.from_name("neuronpedia-inference", "run_inference_with_config")
        result = error_of(run.remote, **json.loads(sys.argv[1]))
        """,
        json.dumps(chosen),
    )
    assert kind == "ValueError"
    assert why in text
    assert len(deployed.plane.calls.pools) <= n_pools + 1


def test_a_model_that_is_not_allowed_is_not_looked_for(deployed: Deployed) -> None:
    """By a caller of the class itself: its container says why, and reads nothing."""
    kind, text = deployed.python(
        """
        AnyModel = modal.Cls.from_name("neuronpedia-inference", "AnyModel")
        result = error_of(AnyModel(model_id="/cache/broken").tokenize.remote, model="x", text="a")
        """
    )
    assert (kind, text.partition(":")[0]) == ("ValueError", "invalid_request")
    said = deployed.containers("AnyModel.*")[-1].text
    assert said.count("This container does not serve. invalid_request: model_id '/cache/broken'") == 1
    assert "Loading" not in said


def test_run_inference_with_config(deployed: Deployed) -> None:
    """Loads exactly this, answers everything, and says of itself what it is."""
    result = deployed.python(
        """
        run = modal.Function.from_name("neuronpedia-inference", "run_inference_with_config")
        body = {"model": "x", "text": "abc"}
        asked = [["tokenize", body], {"operation": "top_k", "body": {"prompt": "a", "source": "9"}}]
        result = run.remote(model_id="tests/tiny", sae_sets=[], model_dtype="float32", token_limit=77, requests=asked)
        """
    )
    assert result["status"] == "healthy"
    assert (result["capabilities"]["token_limit"], result["capabilities"]["model"]) == (77, NAMED)
    tokens, refused = result["answers"]
    assert tokens["tokens"][0] == 0
    assert refused["error"].startswith("unknown_source: ")


def test_exit_says_what_was_answered(deployed: Deployed) -> None:
    """Last, because it ends the containers."""
    for container in list(deployed.containers()):
        text = deployed.stop(container)
        assert text.count("Ready: ") == 1
        assert "Stopped after" in text
        assert "answered" in text
        assert container.exit_code == 0
    assert deployed.plane.objects.volume("hf-cache-neuronpedia").commits
