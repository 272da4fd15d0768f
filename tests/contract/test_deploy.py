"""What `deploy/` and its page say is what the library does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from neuronpedia_inference import exits
from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from neuronpedia_inference.settings import Settings, variable

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DEFAULTS = Settings.read(_env_file=None)


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def seconds(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found[1])


def test_every_setting_that_is_named_is_one() -> None:
    page = (ROOT / "docs" / "self-hosting.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)+\b|\bSECRET\b", page))
    known = {variable(field) for field in Settings.model_fields} | {"HF_TOKEN", CACHE_VARIABLE}
    assert named >= {"SECRET", "SECRETS_FILE", "MAX_ROWS"}
    assert named <= known


def test_the_image_runs_what_is_committed_as_an_ordinary_user() -> None:
    lines = text("Dockerfile").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["neuronpedia"]
    assert lines.index("USER neuronpedia") < next(n for n, line in enumerate(lines) if line.startswith("CMD"))
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    kept = [line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    copied = {source.split("/")[0] for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    assert copied <= {*kept}
    python = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert python == ">=3.11"
    assert lines[1] == "FROM python:3.12-slim"


def test_running_requests_may_end() -> None:
    compose: Any = yaml.safe_load(text("compose.yaml"))
    service = compose["services"]["inference"]
    unit = text("neuronpedia-inference.service")
    least = DEFAULTS.drain_timeout_s + 5
    assert seconds(re.fullmatch(r"([0-9]+)s", service["stop_grace_period"])) > least
    assert seconds(re.search(r"^TimeoutStopSec=([0-9]+)$", unit, re.MULTILINE)) > least
    assert f"RestartPreventExitStatus={exits.FAILED} {exits.WRONG_USAGE}\n" in unit
    assert service["ports"] == [f"127.0.0.1:{DEFAULTS.server_port}:{DEFAULTS.server_port}"]
    gpu: Any = yaml.safe_load(text("compose.gpu.yaml"))
    assert gpu["services"].keys() == compose["services"].keys()


def test_proxies_pass_bodies_and_events_on() -> None:
    nginx, caddy = text("nginx.conf"), text("Caddyfile")
    assert seconds(re.search(r"client_max_body_size ([0-9]+)m;", nginx)) * 2**20 >= DEFAULTS.max_body_bytes
    assert "proxy_buffering off;" in nginx
    assert "flush_interval -1" in caddy
    for proxy in (nginx, caddy):
        assert f"127.0.0.1:{DEFAULTS.server_port}" in proxy
