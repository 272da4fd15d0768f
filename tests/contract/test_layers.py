"""Who may import whom. Arrows point down; a deploy, a `--help` and a schema check never wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "neuronpedia_inference"

# Longest name first wins: `edits.plan` is a fact, most of `edits` works on tensors.
LAYERS = {
    "": 0,
    "errors": 0,
    "domain": 0,
    "points": 0,
    "completion": 0,
    "schemas": 0,
    "edits.plan": 0,
    "edits.proof": 0,
    "edits.rows": 0,
    "edits.select": 0,
    "watches.plan": 0,
    "watches.rules": 0,
    "scheduler.jobs": 0,
    "scheduler.stay": 0,
    "annotations": 1,
    "settings": 1,
    "observability": 1,
    "metrics": 1,
    "prices": 1,
    "provenance": 5,
    "embedded": 1,
    "exits": 1,
    "folders": 1,
    "garbage": 1,
    "kept": 1,
    "digests": 1,
    "secrets_file": 1,
    "load_options": 1,
    "costs": 1,
    "kept_vectors": 1,
    "cuts": 0,
    "persona": 1,
    "pacing": 0,
    "recent": 0,
    "tensor_files": 0,
    "reproducible": 0,
    "engine.protocol": 0,
    "questions": 2,
    "operations": 2,
    "engine": 3,
    "saes": 3,
    "edits": 3,
    "watches": 3,
    "host_memory": 3,
    "resolving": 4,
    "embedded.weights": 3,
    "scheduler": 4,
    "downloads": 5,
    "jacobian_files": 5,
    "lenses": 3,
    "lensing": 5,
    "loading": 5,
    "newcomers": 5,
    "memory": 5,
    "inventory": 5,
    "offers": 5,
    "checks": 5,
    "room": 5,
    "capabilities": 5,
    "vitals": 5,
    "variants": 5,
    "texts": 5,
    "runtime": 5,
    "web": 6,
    "client": 6,
    "demo": 6,
    "cli": 7,
    "__main__": 7,
}
# Third-party packages that only some parts may know.
KEPT_TO = {
    "torch": (
        "engine",
        "saes",
        "edits",
        "watches",
        "resolving",
        "lenses",
        "host_memory",
        "scheduler.worker",
        "loading",
        "questions.contrast",
        "questions.likelihoods",
        "questions.states",
        "questions.weights",
        "room",
        "embedded.weights",
        "checks",
    ),
    "transformers": ("engine", "embedded.weights", "host_memory", "loading"),
    "transformer_lens": ("engine.description",),
    "sae_lens": ("saes.saelens",),
    "fastapi": ("web",),
    "starlette": ("web",),
    "uvicorn": ("web",),
    "sentry_sdk": ("observability",),
    "prometheus_client": ("metrics",),
    "typer": ("cli",),
    "rich": ("cli", "client", "demo"),
    "httpx": ("client.over_http",),
    "bm25s": ("annotations",),
    "Stemmer": ("annotations",),
    "pyarrow": ("annotations",),
    "modal": ("client.on_modal",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer_of(module: str) -> int:
    name = module
    while name not in LAYERS:
        assert "." in name, f"{module} is in no layer: add it to LAYERS"
        name = name.rpartition(".")[0]
    return LAYERS[name]


@cache
def imports(path: Path, *, everywhere: bool) -> list[str]:
    """Names that the file imports; only at module level (type checking aside) unless `everywhere`."""
    tree, found = parsed(path), []
    for node in ast.walk(tree) if everywhere else _at_module_level(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _at_module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node


def own_modules(path: Path) -> set[str]:
    known = {name for name, _ in modules()}
    found = set()
    for name in imports(path, everywhere=False):
        if name.split(".")[0] == PACKAGE.name:
            inner = name.partition(".")[2]
            found.add(inner if inner in known else inner.rpartition(".")[0])
    return found - {""}


@pytest.mark.parametrize(("module", "path"), [pytest.param(*each, id=each[0] or "package") for each in modules()])
def test_arrows_point_down(module: str, path: Path) -> None:
    mine = layer_of(module)
    higher = {name for name in own_modules(path) if layer_of(name) > mine}
    assert not higher, f"{module} (layer {mine}) imports {sorted(higher)}"


@pytest.mark.parametrize(("package", "homes"), KEPT_TO.items())
def test_a_package_is_known_only_where_it_belongs(package: str, homes: tuple[str, ...]) -> None:
    for module, path in modules():
        if any(name.split(".")[0] == package for name in imports(path, everywhere=True)):
            assert any(module == home or module.startswith(f"{home}.") for home in homes), f"{module} imports {package}"


def test_nothing_but_the_settings_reads_the_environment() -> None:
    readers = {"settings", "observability", "embedded.weights"}  # tokens to hide; the user's cache folder
    for module, path in modules():
        text = path.read_text(encoding="utf-8")
        if "os.environ" in text or "os.getenv" in text or "getenv(" in text:
            assert module in readers, module


@pytest.mark.parametrize(
    "module",
    [
        "operations",
        "schemas.steer",
        "settings",
        "web.app",
        "web.openapi",
        "cli",
        "client",
        "client.over_http",
        "embedded",
        "observability",
    ],
)
def test_importing_brings_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, neuronpedia_inference.{module}\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'modal', 'sentry_sdk'}\n"
        "print(*heavy & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_two_broad_handlers_and_no_more() -> None:
    """What the worker and its lanes catch, and the web boundary; elsewhere they would hide what went wrong."""
    found = []
    for module, path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                found.append(module)
    assert sorted(found) == ["engine.faults", "web.boundary"]


def _is_broad(kind: ast.expr | None) -> bool:
    return kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))


def test_no_circle_of_imports() -> None:
    """Of modules; what only type checkers read is left out, what a function imports is not."""
    assert not _in_a_circle(_imported())


def test_no_two_modules_know_each_other() -> None:
    """What only type checkers read included; a package and what is inside it are one."""
    paths = dict(modules())
    known = {module: _known_by(path, set(paths)) for module, path in paths.items()}
    mutual = {tuple(sorted((one, other))) for one, of in known.items() for other in of if one in known.get(other, ())}
    assert not {pair for pair in mutual if not f"{pair[1]}.".startswith(f"{pair[0]}.")}


def test_no_circle_of_packages() -> None:
    """Neither two that import each other, nor a longer way back: whoever reads one reads what is below it first."""
    graph: dict[str, set[str]] = {}
    for module, found in _imported().items():
        graph.setdefault(_package(module), set()).update(map(_package, found))
    assert not _in_a_circle(graph)


def test_a_steered_completion_enters_the_runtime_once() -> None:
    """What the operations ask of it besides is how tokens are written."""
    called = [
        node.func.attr
        for name in ("steer", "friendly")
        for node in ast.walk(parsed(PACKAGE / "operations" / f"{name}.py"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "rt"
    ]
    assert sorted(called) == ["complete", "complete", "decode"]  # of a text, and of a chat


def _imported() -> dict[str, set[str]]:
    paths = dict(modules())
    return {module: _all_imports(path, set(paths)) for module, path in paths.items()}


def _in_a_circle(graph: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """What is left once everything has gone that imports nothing of what is left, with what it imports of that."""
    left = set(graph)
    while leaves := {name for name in left if not graph[name] & left - {name}}:
        left -= leaves
    return {name: sorted(graph[name] & left - {name}) for name in sorted(left)}


def _package(module: str) -> str:
    return module.partition(".")[0]


def _all_imports(path: Path, known: set[str]) -> set[str]:
    found = set()
    for name in _names_outside_type_checking(parsed(path)):
        package, _, inner = name.partition(".")
        if package == PACKAGE.name:
            found.add(inner if inner in known else inner.rpartition(".")[0])
    return found - {""}


def _known_by(path: Path, known: set[str]) -> set[str]:
    inner = {name.partition(".")[2] for name in imports(path, everywhere=True) if name.split(".")[0] == PACKAGE.name}
    return {name if name in known else name.rpartition(".")[0] for name in inner} - {""}


def _names_outside_type_checking(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _names_outside_type_checking(child)
