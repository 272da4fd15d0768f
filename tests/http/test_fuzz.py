"""Requests made at random from the OpenAPI document: whatever is sent, the server never fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fuzzing import as_json, errors_are_said
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from served import SOON_S, Served

EXAMPLES = 4
MANY_EXAMPLES = 54
"""Of each operation; 2,000 of all."""


@pytest.fixture(scope="module")
def base_url(server: Served) -> str:
    return server.url


api = schemathesis.openapi.from_dict(as_json())
# Thousands of cases, which would be made whenever the tests are collected.
api.config.phases.coverage.enabled = False


@api.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
def test_no_request_makes_the_server_fail(case: Any, base_url: str) -> None:
    case.validate_response(case.call(base_url=base_url), checks=[not_a_server_error, errors_are_said])


@pytest.mark.long
def test_nor_does_any_of_thousands(base_url: str, tmp_path: Path) -> None:
    """At the bounds of every field too, and beyond them."""
    (tmp_path / "openapi.json").write_text(json.dumps(as_json()), encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", base_url]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(MANY_EXAMPLES)]
    command += ["--checks", "not_a_server_error,errors_are_said", "--continue-on-failure", "--seed", "1"]
    command += ["--request-timeout", str(SOON_S)]
    command += ["--suppress-health-check", "all", "--generation-database", "none", "--warnings", "off"]
    command += ["--report", "json", "--report-json-path", "report.json"]
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "fuzzing", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
