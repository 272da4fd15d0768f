"""Every `modal` command in the documentation exists in the modal that is installed, with the options it is given."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from modal.cli.entry_point import entrypoint_cli

from tests.modal.service_under_test import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "service").glob("*.py")]
COMMAND = re.compile(r"(?:^|[`$]|\b[A-Z_]+=\S+)\s*(modal [a-z][^`\n]*)", re.MULTILINE)
SERVICE = ROOT / "service" / "inference_cls.py"
OF_A_PROGRAM = ("run", "deploy", "serve", "shell")
"""Commands whose words from the file's name on are for the file."""


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        current = page.read_text(encoding="utf-8").partition("\n## Old names")[0]
        for match in COMMAND.finditer(current):
            yield page.name, match.group(1).partition("#")[0].strip().removesuffix('"')


def problem(command: str) -> str | None:
    """What modal, or the service's own entry points, would not understand."""
    group: Any = click.Group(commands={"modal": entrypoint_cli})
    words = shlex.split(command)
    while words and isinstance(group, click.Group) and group.name not in OF_A_PROGRAM:
        found = group.get_command(click.Context(group), words[0])
        if found is None:
            return f"there is no command {words[0]!r}"
        group, words = found, words[1:]
    options = {name for param in group.params for name in (*param.opts, *param.secondary_opts)}
    for place, word in enumerate(words):
        if group.name in OF_A_PROGRAM and ".py" in word:
            return _problem_of_program(word, words[place + 1 :])
        if word.startswith("-") and word.partition("=")[0] not in options:
            return f"there is no option {word!r}"
    return None


def _problem_of_program(name: str, words: list[str]) -> str | None:
    file, _, entry = name.partition("::")
    if ROOT / file != SERVICE:
        return None if (ROOT / file).exists() else f"there is no file {file!r}"
    known = _entry_points()
    if (entry or "main") not in known:
        return f"there is no entry point {entry!r}"
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    unknown = given - known[entry or "main"]
    return f"{entry or 'main'} has no option {unknown}" if unknown else None


def _entry_points() -> dict[str, set[str]]:
    """Options by name of every function that `modal run` can run."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(SERVICE.read_text(encoding="utf-8"))
    made = {one.name: {arg.arg for arg in one.args.args} for one in tree.body if isinstance(one, functions)}
    return {**made, "batch": made["main"]}


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_command_exists(page: str, command: str) -> None:
    assert problem(command) is None, page


@pytest.mark.parametrize(
    "command",
    [
        "modal logs my-app",
        "modal secret update x A=b",
        "modal deploy --keep-warm 1 service/inference_cls.py",
        "modal run service/inference_cls.py::train",
        "modal run service/inference_cls.py --sae-set x",
        "modal app logs x --forever",
    ],
)
def test_commands_that_are_gone_would_be_noticed(command: str) -> None:
    assert problem(command)


def test_commands_are_found() -> None:
    found = {command for _, command in commands()}
    assert "modal deploy service/inference_cls.py" in found
    assert Path(__file__).name not in {page for page, _ in commands()}
