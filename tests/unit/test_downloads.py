"""Files that are on this machine are found without asking the hub; half of them are not enough."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from neuronpedia_inference import downloads
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.settings import Settings
from tests.modal.local_modal.hub import a_hub

NAME = "tests/model"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of a repository in the hub client's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--tests--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("f" * 40)
    folder = repo / "snapshots" / ("f" * 40)
    folder.mkdir(parents=True)
    return folder


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As HF_ENDPOINT does for a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def settings(name: str = NAME) -> Settings:
    return Settings.read(model_id=name, sae_sets=())


def test_a_model_in_the_cache(snapshot: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert downloads.found(settings()) is None
        (snapshot / name).write_text("{}")
    assert downloads.found(settings()) == snapshot
    assert downloads.fetch(settings()) == snapshot


def test_a_model_that_was_fetched_is_found_though_the_hub_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hub's client remembers that there is a readme which was not fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (repository := tmp_path / "repository").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (repository / name).write_text("{}")
    with a_hub({NAME: repository}) as (address, _):
        use_hub(monkeypatch, address)
        fetched = downloads.fetch(settings())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not (fetched / "README.md").exists()
    assert downloads.found(settings()) == fetched


def test_every_part_of_the_weights_is_needed(snapshot: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model-1.safetensors"):
        (snapshot / name).write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / downloads.INDEX).write_text(json.dumps(index))
    assert downloads.found(settings()) is None
    (snapshot / "model-2.safetensors").symlink_to(snapshot / "blob-that-is-gone")
    assert downloads.found(settings()) is None
    (snapshot / "blob-that-is-gone").touch()
    assert downloads.found(settings()) == snapshot
    (snapshot / downloads.INDEX).write_text("{")
    assert downloads.found(settings()) is None


def test_a_folder_is_itself_if_it_holds_a_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="holds no model: it needs config.json"):
        downloads.found(settings(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert downloads.found(settings(str(tmp_path))) == tmp_path


def test_what_is_not_there_and_cannot_be_had_is_one_line(snapshot: Path) -> None:
    with pytest.raises(StartupError, match=r"^MODEL_ID: 'tests/other' is not on this machine [^\n]+$"):
        downloads.fetch(settings("tests/other"))


def test_a_hub_that_cannot_be_asked_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine refuses; the hub's client alone would try for a minute."""
    use_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it tries again"))
    with pytest.raises(StartupError) as caught:
        downloads.check_hub(NAME, "MODEL_ID")
    line = str(caught.value)
    assert line.startswith(
        "MODEL_ID: 'tests/model' is not on this machine, and the hub at http://127.0.0.1:9 cannot be"
    )
    assert all(word in line for word in ("HF_HOME", "HF_ENDPOINT", "a local folder"))
    assert "\n" not in line


def test_offline_it_says_where_the_files_should_be(snapshot: Path) -> None:
    with pytest.raises(StartupError, match=r"is not on this machine \(HF_HOME is .*HF_HUB_OFFLINE keeps off the hub"):
        downloads.check_hub(NAME, "MODEL_ID")


def test_what_the_hub_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    with a_hub({"tests/sae": tmp_path}) as (address, _):
        use_hub(monkeypatch, address)
        downloads.check_hub("tests/sae", "SAE_SETS")  # it has the repository, if not this file
        with pytest.raises(StartupError, match=r"the hub has no 'gemma2-2b'.* Did you mean 'gemma-2-2b'"):
            downloads.check_hub("gemma2-2b", "MODEL_ID")


class Troubled(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_a_hub_in_trouble_is_left_to_those_who_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Troubled)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        downloads.check_hub(NAME, "MODEL_ID")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
