"""Part 7: what is wrong with the machine or the configuration at a start."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.fire_tree import LOAD_S, MODEL, Tree, limited, short, tail, until, without_right_to_write

CACHE = "NEURONPEDIA_INFERENCE_CACHE"
SERVE = ("serve", "--port", "0")
UNFINISHED = ".smollm2-*"
WEIGHTS_BYTES = 2**28
BLOCKS = 2000
"""Of 512 bytes, that a file may have: less than the weights."""


def a_cache_that_is_read_only(tree: Tree) -> str:
    """A read-only cache is one line that says what to set."""
    folder = tree.new_folder()
    folder.chmod(0o500)
    return tree.run(*SERVE, before=without_right_to_write(), env={CACHE: str(folder)}).one_line(str(folder), CACHE)


def a_cache_that_is_full(tree: Tree) -> str:
    """A full cache is one line that says what to set, and holds nothing afterwards.

    The system refuses to make a file longer than a megabyte, as it refuses at the end of a disk.
    """
    folder = tree.new_folder()
    said = tree.run(*SERVE, before=limited("-f", BLOCKS), env={CACHE: str(folder)}).one_line(str(folder), CACHE)
    left = [path.name for path in folder.iterdir()]
    assert not left, f"it leaves {left}"
    return said


def a_cache_that_is_a_file(tree: Tree) -> str:
    """A file in place of the cache is one line that says what to set."""
    file = tree.new_folder() / "cache"
    file.touch()
    return tree.run(*SERVE, env={CACHE: str(file)}).one_line(str(file), CACHE)


def a_user_without_a_home(tree: Tree) -> str:
    """No HOME with an unknown user is one line that says what to set."""
    unset = {"HOME": None, "XDG_CACHE_HOME": None, CACHE: None}
    return tree.run(*SERVE, fault="nobody", env=unset).one_line(CACHE)


def _configured(tree: Tree, name: str, change: Callable[[Path], None]) -> str:
    """What a start says of a model's folder in which a file was changed."""
    folder = tree.new_folder()
    for file in tree.small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder / name)
    return tree.run(*SERVE, "--model-id", str(folder), "--sae-sets", "[]").one_line(str(folder))


def a_configuration_that_is_a_list(tree: Tree) -> str:
    """A model's configuration that is a list is one line that names its folder."""
    return _configured(tree, "config.json", lambda file: _write(file, "[]"))


def a_configuration_of_wrong_types(tree: Tree) -> str:
    """A model's configuration with wrong types is one line that names its folder."""
    return _configured(tree, "config.json", lambda file: _write(file, '{"model_type": "llama", "hidden_size": "many"}'))


def a_tokenizer_configuration_that_is_a_list(tree: Tree) -> str:
    """So is one of its tokenizer."""
    return _configured(tree, "tokenizer_config.json", lambda file: _write(file, "[]"))


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def a_closed_stdout(tree: Tree) -> str:
    """A server whose standard output is closed starts."""
    before = ["sh", "-c", 'exec "$@" >&-', "sh"]
    ended = tree.run("operations", "steer", before=before)
    assert ended.code == 0, f"exit code {ended.code}: {tail(ended.err)}"
    tree.run(*SERVE, *tree.small_words[:2], "--sae-sets", "none-of-this-name", before=before).one_line("SAE_SETS")
    return "a command ends with 0, and a start goes on to what is wrong with it"


def an_ascii_stdout(tree: Tree) -> str:
    """A standard output in ASCII gets what ASCII can say: help, steps of a start, JSON."""
    plain = {"PYTHONIOENCODING": "ascii"}
    ended = tree.run("--help", env=plain)
    assert ended.code == 0, f"--help: exit code {ended.code}: {tail(ended.err)}"
    body = json.dumps({"model": MODEL, "text": "’"})
    ended = tree.run("call", "tokenize", body, *tree.small_words, env=plain)
    assert ended.code == 0, f"call: exit code {ended.code}: {tail(ended.err)}"
    assert json.loads(ended.out)["tokens"], ended.out
    ended = tree.run("operations", "activations", env=plain)
    assert ended.code == 0, f"operations: exit code {ended.code}: {tail(ended.err)}"
    ended = tree.run("demo", "--tokens", "1", env=plain)
    assert ended.code == 0, f"demo: exit code {ended.code}: {tail(ended.err)}"
    return "--help, call, operations and demo end with 0"


def the_cache_is_documented(tree: Tree) -> str:
    """NEURONPEDIA_INFERENCE_CACHE is documented with the settings."""
    for line in (tree.root / "docs" / "reference.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and CACHE in line:
            return short(line)
    raise AssertionError(f"docs/reference.md has no row for {CACHE}")


def what_a_killed_start_left_is_removed(tree: Tree) -> str:
    """What SIGKILL leaves while de-quantising (513 MiB) is removed by the next start."""
    folder = tree.new_folder()
    with tree.loading(env={CACHE: str(folder)}) as served:
        until(lambda: _n_bytes(folder) > WEIGHTS_BYTES, LOAD_S, "the weights are written")
        served.interrupt(signal.SIGKILL)
        served.ended(60)
    left = _n_bytes(folder)
    with tree.loading(env={CACHE: str(folder)}) as served:
        served.wait_for("SAE 1")
    orphans = sorted(path.name for path in folder.glob(UNFINISHED))
    assert not orphans, f"{left // 2**20} MiB stay in {orphans}"
    return f"{left // 2**20} MiB were left, and went with the next start"


def _n_bytes(folder: Path) -> int:
    """Of what is not finished."""
    return sum(file.stat().st_size for part in folder.glob(UNFINISHED) for file in part.iterdir())


PROBES = {
    7: (
        a_cache_that_is_read_only,
        a_cache_that_is_full,
        a_cache_that_is_a_file,
        a_user_without_a_home,
        a_configuration_that_is_a_list,
        a_configuration_of_wrong_types,
        a_tokenizer_configuration_that_is_a_list,
        a_closed_stdout,
        an_ascii_stdout,
        the_cache_is_documented,
        what_a_killed_start_left_is_removed,
    )
}
