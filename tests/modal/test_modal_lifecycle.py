"""How a container starts, through a snapshot or not, what keeps it from serving, and how it ends."""

# The client re-exports its names without saying so.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import neuronpedia_inference_client as np_client
import pytest
from neuronpedia_inference_client.exceptions import UnauthorizedException

from tests.modal.local_modal import Plane
from tests.modal.local_modal.containers import Container
from tests.modal.service_under_test import BROKEN, NAMED, TINY, Deployed, fill_volume

SECRET = "sésame"
NEURON: dict[str, Any] = {"model": TINY, "prompt": "The cat sat.", "source": "1", "index": "3"}

FAILING_DEVICE = """
import pathlib, threading, time

def fail():
    while not pathlib.Path({poison!r}).exists():
        time.sleep(0.1)
    for one in threading.enumerate():
        if one.name == "inference-worker":
            one._target.__self__.healthy = False

threading.Thread(target=fail, daemon=True).start()
"""
"""Does to a container what an error that poisons CUDA does: its worker takes nothing more."""


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A control plane that takes containers through the steps of a snapshot, with weights on its volume."""
    folder = tmp_path_factory.mktemp("snapshots")
    with Plane(folder / "plane", snapshots=True) as plane:
        fill_volume(plane)
        yield Deployed(plane, folder)


@pytest.fixture(scope="module")
def locked(snapshots: Deployed) -> str:
    """Address of a deployment whose secret holds SECRET, and a setting that was made at deploy time too."""
    made = snapshots.modal("secret", "create", "locked", f"SECRET={SECRET}", "TOKEN_LIMIT=55")
    assert made.code == 0, made.text
    snapshots.deploy(APP_NAME="locked", SECRET_NAME="locked", TOKEN_LIMIT="99", MODEL_ID=TINY, SAE_SETS="[]", GPU="L4")
    return snapshots.function(app="locked").urls["serve"]


def test_the_secret_locks_the_web_app(locked: str) -> None:
    body = {"prompt": "a", "source": "1"}
    assert httpx.get(f"{locked}/health", timeout=600).status_code == 200
    assert httpx.post(f"{locked}/v1/top-k", json=body, timeout=600).status_code == 401
    key = {b"X-SECRET-KEY": SECRET.encode()}
    assert httpx.post(f"{locked}/v1/top-k", json=body, headers=key, timeout=600).status_code == 200


def test_settings_in_the_secret_win_over_those_of_the_deployment(locked: str) -> None:
    capabilities = httpx.get(
        f"{locked}/v1/capabilities", headers={b"X-SECRET-KEY": SECRET.encode()}, timeout=600
    ).json()
    assert capabilities["token_limit"] == 55
    assert capabilities["model"] == TINY


def test_the_published_client_needs_the_secret(locked: str) -> None:
    configuration = np_client.Configuration(host=f"{locked}/v1")
    request = np_client.ActivationSinglePostRequest(**NEURON)
    with pytest.raises(UnauthorizedException):
        np_client.DefaultApi(np_client.ApiClient(configuration)).activation_single_post(request)
    configuration.api_key["SimpleSecretAuth"] = SECRET
    answer = np_client.DefaultApi(np_client.ApiClient(configuration)).activation_single_post(request)
    assert answer.activation.max_value


def test_a_container_that_is_scaled_down_finishes_what_it_runs(snapshots: Deployed, locked: str) -> None:
    assert httpx.get(f"{locked}/health", timeout=600).status_code == 200
    (container,) = _containers(snapshots, "locked")
    with ThreadPoolExecutor() as pool:
        key = {b"X-SECRET-KEY": SECRET.encode()}
        asked = pool.submit(httpx.post, f"{locked}/v1/steer", json=_steering(300), headers=key, timeout=600)
        assert snapshots.plane.wait(lambda: container.running)
        text = snapshots.stop(container)
    assert asked.result().status_code == 200
    assert text.count("Ready: ") == 1
    assert "Stopped after" in text
    assert container.exit_code == 0


def test_an_interrupted_container_still_runs_its_exit_hook(snapshots: Deployed, locked: str) -> None:
    assert httpx.get(f"{locked}/health", timeout=600).status_code == 200
    (container,) = _containers(snapshots, "locked")
    assert snapshots.plane.wait(lambda: not container.running), "it answers first, then it is interrupted"
    snapshots.plane.call(container.interrupt)
    assert snapshots.plane.wait(lambda: container.exit_code is not None), container.text
    assert "Stopped after" in container.text


def test_a_gpu_snapshot_holds_the_loaded_model(snapshots: Deployed) -> None:
    chosen = {"APP_NAME": "whole", "GPU_SNAPSHOT": "1", "MODEL_ID": TINY, "SAE_SETS": "[]"}
    assert snapshots.modal("deploy", "-m", "service.inference_cls", **chosen).code == 0
    assert httpx.get(snapshots.function(app="whole").urls["serve"] + "/ready", timeout=600).status_code == 200
    (container,) = _containers(snapshots, "whole")
    snapshots.stop(container)
    assert container.text.count(f"Loading {TINY}") == 1
    assert container.text.count("Ready: ") == 1


@pytest.mark.parametrize(
    ("app", "model", "line"),
    [
        ("broken", BROKEN, "Self-test failed: steering has no effect"),
        ("missing", "/cache/nowhere", "/cache/nowhere"),
    ],
)
def test_a_container_that_cannot_serve_says_why_in_one_line(
    snapshots: Deployed, app: str, model: str, line: str
) -> None:
    snapshots.deploy(APP_NAME=app, MODEL_ID=model, SAE_SETS="[]")
    error = snapshots.python(
        f"""
        service = modal.Cls.from_name({app!r}, "Inference")()
        result = error_of(service.tokenize.remote, model="x", text="a")
        """
    )
    assert error[0] == "RuntimeError"
    assert error[1].startswith("startup_failed: ")
    assert line in error[1]
    (container,) = _containers(snapshots, app)
    (said,) = [text for text in container.log if text.startswith("This container does not serve. ")]
    assert line in said
    assert container.n_answered == 0
    assert "Ready: " not in container.text


def test_a_container_whose_device_fails_is_replaced(snapshots: Deployed, locked: str) -> None:
    poison = snapshots.folder / "poison"
    for started_before in _containers(snapshots, "locked"):
        snapshots.stop(started_before)
    snapshots.plane.fault = FAILING_DEVICE.format(poison=str(poison))
    assert httpx.get(f"{locked}/health", timeout=600).status_code == 200
    (container,) = _containers(snapshots, "locked")
    poison.touch()
    assert snapshots.plane.wait(lambda: container.exit_code is not None), container.text
    snapshots.plane.fault = ""
    assert "The device has failed" in container.text
    assert httpx.get(f"{locked}/health", timeout=600).status_code == 200
    assert _containers(snapshots, "locked") != [container]


def test_run_prints_a_first_activation_as_proof(snapshots: Deployed) -> None:
    said = snapshots.modal("run", "service/inference_cls.py", "--model-id", NAMED, "--sae-sets", "[]", MODELS=NAMED)
    assert said.code == 0, said.text
    assert "Strongest feature: " in said.out


def test_download_fills_the_volume_and_commits(snapshots: Deployed) -> None:
    volume = snapshots.plane.objects.volume("hf-cache-neuronpedia")
    before = volume.commits
    said = snapshots.modal("run", "service/inference_cls.py::download", "--model-id", "smollm2-135m-instruct")
    assert said.code == 0, said.text
    assert "SAE 3 of 3: 20-res-4k" in said.out
    assert volume.commits > before


def _steering(n_tokens: int) -> dict[str, object]:
    vector = {"hook": "blocks.1.hook_resid_post", "vector": [1.0] * 32, "strength": 1.0}
    return {"prompt": "The cat sat.", "vectors": [vector], "max_new_tokens": n_tokens}


def _containers(deployed: Deployed, app: str) -> list[Container]:
    """Of one app, those that run, else the last that did."""
    function = deployed.function(app=app)
    mine = [one for one in deployed.plane.containers if one.pool.function is function]
    return [one for one in mine if one.exit_code is None] or mine[-1:]
