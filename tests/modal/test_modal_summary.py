"""What `modal deploy` says: one summary, word for word, and what it refuses or points out before."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from neuronpedia_inference import embedded
from tests.modal.service_under_test import Deployed

SECRET = "neuronpedia-inference"
SMALL = {"MODEL_ID": embedded.MODEL_ID, "GPU": "T4"}
SUMMARY = """\
{app} is online.
  model     smollm2-135m-instruct, 3 SAEs (res-4k)
  GPU       T4, 16 GB, 0.59 dollars an hour (seen 2026); paid from a start to 300 s after the last request
  memory    5.2 GiB needed (weights 0.5, SAEs 0.1, cache 2.8, headroom 1.8), 14.9 had
  access    {access}
  AnyModel  methods only: every model of the directory of SAELens
  address   {address}
Next:
  curl {address}/ready
  modal app logs {app} -f
"""
OPEN = (
    "OPEN to everybody who knows the address, at your expense. To guard it: "
    "modal secret create neuronpedia-inference SECRET=... HF_TOKEN=... and deploy again"
)
GUARDED = "guarded: callers need the header X-SECRET-KEY"


class Hub(BaseHTTPRequestHandler):
    """A hub that has no model at all."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def empty_hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def summary(fresh: Deployed, *command: str, **chosen: str) -> str:
    """Everything after Modal's own lines."""
    said = fresh.modal("deploy", "service/inference_cls.py", *command, **chosen)
    assert said.code == 0, said.text
    app = chosen.get("APP_NAME", SECRET)
    assert said.out.count("is online.") == 1
    return said.out[said.out.index(f"{app} is online.") :]


def expected(fresh: Deployed, access: str, app: str = SECRET) -> str:
    return SUMMARY.format(app=app, access=access, address=fresh.function(app=app).urls["serve"])


def refused(fresh: Deployed, *command: str, **chosen: str) -> str:
    """The one line, and nothing made."""
    said = fresh.modal("deploy", "service/inference_cls.py", *command, **chosen)
    assert said.code == 1, said.text
    (line,) = said.text.strip().splitlines()
    assert line.startswith("Nothing was deployed. ")
    assert fresh.plane.objects.n_requests_that_create == 0
    return line


def test_no_secret(fresh: Deployed) -> None:
    assert summary(fresh, **SMALL) == expected(fresh, OPEN)


def test_a_secret_with_a_token_for_the_hub_only(fresh: Deployed) -> None:
    fresh.modal("secret", "create", SECRET, "HF_TOKEN=x")
    assert summary(fresh, **SMALL) == expected(fresh, OPEN)


def test_a_full_secret(fresh: Deployed) -> None:
    fresh.modal("secret", "create", SECRET, "HF_TOKEN=x", "SECRET=y", "SENTRY_DSN=https://a@b.example/1")
    assert summary(fresh, **SMALL) == expected(fresh, GUARDED)


def test_two_apps_beside_each_other(fresh: Deployed) -> None:
    first, second = (summary(fresh, APP_NAME=app, **SMALL) for app in ("one", "two"))
    assert (first, second) == (expected(fresh, OPEN, "one"), expected(fresh, OPEN, "two"))
    assert fresh.function(app="one").urls != fresh.function(app="two").urls


def test_modal_s_own_door(fresh: Deployed) -> None:
    said = summary(fresh, PROXY_AUTH="1", MODELS="gpt2-small gemma-2-2b", MIN_CONTAINERS="1", **SMALL)
    assert "access    guarded: callers need a proxy token of the workspace\n" in said
    assert "AnyModel  methods only: gpt2-small, gemma-2-2b\n" in said
    assert "(seen 2026); paid at all hours\n" in said
    assert '/ready -H "Modal-Key: $TOKEN_ID" -H "Modal-Secret: $TOKEN_SECRET"\n' in said


def test_nearly_right_variables_and_secrets_that_stay_behind(fresh: Deployed) -> None:
    fresh.modal("secret", "create", SECRET, "SECRET=y")
    chosen = {"SAE_SET": "x", "MAX_CONTAINER": "9", "TOKENLIMIT": "5", "SECRET": "abc", "HF_TOKEN": "hf", "PATHS": "/"}
    said = fresh.modal("deploy", "service/inference_cls.py", **SMALL, **chosen)
    assert said.code == 0
    assert said.err.splitlines() == [
        "Note: MAX_CONTAINER is ignored: did you mean MAX_CONTAINERS?",
        "Note: SAE_SET is ignored: did you mean SAE_SETS?",
        "Note: TOKENLIMIT is ignored: did you mean TOKEN_LIMIT?",
        f"Note: HF_TOKEN is set in this shell and not in the Modal secret '{SECRET}': containers do not see the shell",
    ]


def test_a_model_that_is_in_no_directory(fresh: Deployed) -> None:
    line = refused(fresh, MODEL_ID="gemma-2-2bb")
    assert "Unknown model 'gemma-2-2bb'. Did you mean 'gemma-2-2b'" in line


def test_a_model_that_the_hub_does_not_have(fresh: Deployed, empty_hub: str, tmp_path: Path) -> None:
    hub = {"HF_ENDPOINT": empty_hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    line = refused(fresh, MODEL_ID="tests/nowhere", SAE_SETS="[]", **hub)
    assert "MODEL_ID 'tests/nowhere': neither SAELens's directory nor the hub has it" in line


def test_a_hub_that_cannot_be_asked_is_no_reason_to_refuse(fresh: Deployed, tmp_path: Path) -> None:
    said = summary(fresh, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert "  model     gpt2-small, 13 SAEs (res-jb)\n" in said
    assert "  memory    not counted: The hub's metadata of 'openai-community/gpt2' cannot be read: " in said


def test_another_name_on_the_command_line(fresh: Deployed) -> None:
    line = refused(fresh, "--name", "other")
    assert "APP_NAME=other modal deploy service/inference_cls.py" in line
    assert "other is online." in summary(fresh, "--name", "other", APP_NAME="other", **SMALL)


def test_a_model_that_no_chosen_gpu_can_hold(fresh: Deployed, tmp_path: Path) -> None:
    """30 GB of weights, of which only the header is there."""
    cached = tmp_path / "hub" / "models--tests--large"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    folder = cached / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [15_000, 1_000_000], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    chosen = {"MODEL_ID": "tests/large", "SAE_SETS": "[]", "HF_HOME": str(tmp_path)}

    line = refused(fresh, GPU="H100,A10", **chosen)
    assert "GPU A10: tests/large needs 27.9 GiB without its SAEs; GPU=L40S has the memory" in line
    said = summary(fresh, GPU="H100!", **chosen)
    assert "H100!, 80 GB, 3.95 dollars an hour" in said
    requested = fresh.function().definition.resources
    assert requested.memory_mb == (30 * 10**9 + 3 * 2**30) // 2**20
