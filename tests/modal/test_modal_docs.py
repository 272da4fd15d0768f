"""What docs/operating.md and the README say about choices, names and numbers is so."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import modal
import pytest
import typer

from neuronpedia_inference.cli import app as cli
from neuronpedia_inference.memory import GIB, Sizes
from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.scheduler.policy import Limits
from neuronpedia_inference.settings import Settings, variable
from service.jobs import PARAMETERS
from service.options import DEFAULTS, Options
from tests.modal.service_under_test import ROOT
from tests.modal.test_modal_commands import problem

GUIDE = ROOT / "docs" / "operating.md"
PAGES = (GUIDE, ROOT / "README.md")
METHODS = {
    *(operation.name for operation in OPERATIONS if not operation.off_modal_because),
    "steer_stream",
    "answer_many",
    "capabilities",
}
CALLS = {"remote", "remote_gen", "map", "spawn", "get", "with_options"}

SHAPES = {
    "smollm2-135m-instruct": (134_515_008, 2 * 30 * 3 * 64, 3, 576, 4096),
    "gpt2-small": (124_439_808, 2 * 12 * 12 * 64, 13, 768, 24576),
    "gemma-2-2b": (2_614_341_888, 2 * 26 * 4 * 256, 26, 2304, 16384),
    "gemma-2-9b": (9_241_705_984, 2 * 42 * 8 * 256, 42, 3584, 16384),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, 2 * 32 * 8 * 128, 1, 4096, 32768),
}
"""Published: parameters, numbers cached for a token, SAEs, their width and their features."""


def shell_lines() -> Iterator[str]:
    """Commands of fenced blocks, with continued lines joined."""
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield from filter(None, (line.strip() for line in block.replace("\\\n", " ").splitlines()))


def words(line: str) -> tuple[dict[str, str], list[str]]:
    """What the line sets for its command, and the command."""
    split = shlex.split(line, comments=True)
    place = next((i for i, word in enumerate(split) if re.match(r"[A-Z_]+=", word) is None), len(split))
    return dict(word.split("=", 1) for word in split[:place]), split[place:]


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_a_line_of_the_shell_can_be_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, command = words(line)
    assert chosen.keys() <= {*DEFAULTS, *map(variable, Settings.model_fields)}
    if command and command[0] == "modal":
        assert problem(shlex.join(command)) is None
    if command[:2] == ["modal", "deploy"]:
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)
        assert Options.read().env["MODEL_ID"] == chosen.get("MODEL_ID", DEFAULTS["MODEL_ID"])
    if command and command[0].endswith("neuronpedia-inference"):
        commands: Any = typer.main.get_command(cli)
        known = {option for param in commands.commands[command[1]].params for option in param.opts}
        assert {word for word in command[2:] if word.startswith("--")} <= known


def test_names_in_python_blocks_exist() -> None:
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "modal":
                assert hasattr(modal, node.attr), node.attr
            elif isinstance(node, ast.Attribute) and not ast.unparse(node.value).startswith("modal"):
                assert node.attr in METHODS | CALLS, node.attr
            elif isinstance(node, ast.Call) and any(key.arg == "model_id" for key in node.keywords):
                assert {key.arg for key in node.keywords} <= {*PARAMETERS, "requests"}


def test_every_choice_is_in_the_guide() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert [name for name in DEFAULTS if f"`{name}`" not in text] == []


def rows() -> list[list[str]]:
    """Cells of the memory table."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| model and SAEs"))
    table = [line.strip("|").split("|") for line in lines[start + 2 : lines.index("", start)]]
    return [[cell.strip() for cell in cells] for cells in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_the_memory_table_follows_from_the_published_sizes(row: list[str]) -> None:
    name, dtype, *numbers, gpu = row
    parameters, cached, n_saes, width, n_features = SHAPES[name.split("`")[1]]
    sae = 2 * width * n_features + width + 2 * n_features
    counted = Sizes(parameters, cached * 4096 * Limits().max_rows, n_saes * sae, n_saes).needs(dtype, dtype)
    parts = (counted.weights, counted.saes, counted.cache, counted.headroom, counted.total)
    for written, part in zip(numbers, parts, strict=True):
        assert float(written) == pytest.approx(part / GIB, abs=0.06 if part > GIB / 5 else 0.006)
    assert gpu.partition(",")[0] == counted.gpu
