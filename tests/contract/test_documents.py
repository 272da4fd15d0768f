"""What is said twice is said alike: operations, routes, command line, OpenAPI, documents."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi.routing import APIRoute
from typer.testing import CliRunner

from neuronpedia_inference import exits
from neuronpedia_inference.cli import app as cli
from neuronpedia_inference.errors import NotReady
from neuronpedia_inference.operations import OPERATIONS, Operation, by_name, validate
from neuronpedia_inference.settings import Settings, variable
from neuronpedia_inference.web.app import create_app
from neuronpedia_inference.web.explained import EXPLAINED, classes_by_code
from neuronpedia_inference.web.fields import example_of, fields_of
from neuronpedia_inference.web.openapi import document, openapi_path
from tests.documented import documented_errors

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CLIENT_METHODS = {
    "activation_single",
    "activation_single_batch",
    "activation_all",
    "activation_all_batch",
    "activation_topk_by_token",
    "activation_topk_by_token_batch",
    "activation_source",
    "steer_completion",
    "steer_completion_chat",
    "tokenize",
    "util_sae_vector",
    "util_sae_topk_by_decoder_cossim",
}

BESIDE = {
    *("activation_attention", "activation_raw", "apply_chat_template", "lens_prompt", "steer_health"),
    "persona_monitor",
    "util_similarity_matrix_pred",
}
"""Routes of the wire that the published client has no method for."""
OUR_OWN = {"activations", "top_k", "steer", "search", "feature", "contrast", "capture", "put_vectors", "score", "sweep"}
OPENAI = {"chat_completions", "completions", "models", "model"}


@pytest.fixture
def render_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("render_docs")


def test_derived_documents_are_up_to_date(render_docs: ModuleType) -> None:
    assert render_docs.outdated() == [], "run python scripts/render_docs.py"


def test_every_error_code_is_explained() -> None:
    by_class = set(classes_by_code())
    by_http = {code for code, explained in EXPLAINED.items() if explained.status is not None}
    assert set(EXPLAINED) == by_class | by_http
    assert by_http == {"not_found", "method_not_allowed"}


def test_openapi_has_every_status_of_an_error() -> None:
    """405 is of a way to ask that is not there; 409 is of a path that is no operation."""
    documented = {str(status) for status in documented_errors().values()}
    paths = document()["paths"]
    asked = [paths[openapi_path(operation)][operation.method.lower()] for operation in OPERATIONS]
    of_operations = {status for about in asked for status in about["responses"]}
    everywhere = {status for item in paths.values() for about in item.values() for status in about["responses"]}
    assert of_operations == documented - {"405", "409"} | {"200"}
    assert everywhere == of_operations | {"409"}


def test_every_exit_code_is_explained() -> None:
    explained = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "operating.md").read_text(encoding="utf-8"), re.MULTILINE)
    codes = (exits.STOPPED, exits.FAILED, exits.WRONG_USAGE, exits.ENGINE_DIED, exits.DIFFERS, exits.NOT_COMPARABLE)
    assert explained == [str(code) for code in (*codes, exits.by_signal(signal.SIGINT))]


def test_operations_are_the_client_s_methods_and_the_friendly_ones() -> None:
    assert {operation.name for operation in OPERATIONS} == CLIENT_METHODS | BESIDE | OPENAI | OUR_OWN
    assert len({operation.path for operation in OPERATIONS}) == len(OPERATIONS) == len(by_name)


def never() -> Any:
    raise NotReady("not loaded")


def test_routes_and_openapi_are_made_from_the_operations() -> None:
    routes = [route for route in create_app(Settings.read(), never).routes if isinstance(route, APIRoute)]
    served = {
        (method.lower(), route.path_format) for route in routes for method in route.methods or () if method != "HEAD"
    }
    documented = {(method, path) for path, item in document()["paths"].items() for method in item}
    assert served == documented
    assert {(operation.method.lower(), openapi_path(operation)) for operation in OPERATIONS} <= served


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_can_be_understood(operation: Operation[Any]) -> None:
    assert operation.summary
    assert not operation.summary.endswith(".")
    assert all(field.meaning for field in fields_of(operation.request))
    validate(operation, example_of(operation.request))
    for example in operation.request.model_json_schema()["examples"]:
        validate(operation, example)


def test_the_document_resolves() -> None:
    text = json.dumps(document())
    known = set(document()["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= known


def test_the_command_line_knows_every_operation() -> None:
    runner = CliRunner()
    listed = runner.invoke(cli, ["operations"])
    assert listed.exit_code == 0
    for operation in OPERATIONS:
        assert operation.name in listed.stdout
        described = runner.invoke(cli, ["operations", operation.name])
        assert described.exit_code == 0
        assert operation.path in described.stdout


@pytest.mark.parametrize("command", ["serve", "demo", "call", "models", "sae", "operations", "plan", "verify"])
def test_help_says_what_a_command_does(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "--help"])
    assert shown.exit_code == 0
    assert len(shown.stdout.split()) > 20


def test_every_setting_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for field in Settings.model_fields:
        assert f"| `{variable(field)}` |" in text


# README and the other prose


def prose() -> list[Path]:
    return [path for path in [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]


def commands_in(text: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL)
    joined = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ").strip() for line in joined]


@pytest.mark.parametrize("path", prose(), ids=lambda path: path.name)
def test_commands_in_prose_exist(path: Path) -> None:
    names = {command.name or command.callback.__name__ for command in cli.registered_commands if command.callback}
    for command in commands_in(path.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        program = next((place for place, word in enumerate(words) if "=" not in word), len(words))
        if words[program : program + 1] and words[program].rpartition("/")[2] == "neuronpedia-inference":
            following = words[program + 1 :]
            assert following[:1] == ["--help"] or following[0] in names, command
            if following[:1] == ["call"] and following[1] in by_name and following[2].startswith("{"):
                validate(by_name[following[1]], json.loads(following[2]))
        for served in re.findall(r"(/v1/[a-z0-9/-]+)", command):
            assert served in document()["paths"], command


@pytest.mark.parametrize("path", prose(), ids=lambda path: path.name)
def test_python_in_prose_compiles(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("path", prose(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target


def project_texts() -> list[Path]:
    suffixes = {".py", ".md", ".toml", ".json", ".txt", ".ipynb", ".cfg"}
    caches = {"__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    skipped = {".git", ".venv", ".venv-peer", "node_modules", "saes", *caches}
    found = [path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file()]
    return [path for path in found if not skipped & set(path.relative_to(ROOT).parts)]


def test_no_file_holds_a_path_of_a_machine_or_a_token() -> None:
    private = re.compile(
        r"/(?:home|Users)/\w+/|/root/|hf_[A-Za-z0-9]{30,}|https://[0-9a-f]{32}@|-----BEGIN [A-Z ]*PRIVATE KEY"
    )
    for path in project_texts():
        if path != Path(__file__).resolve():
            found = private.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)}: {found}"
