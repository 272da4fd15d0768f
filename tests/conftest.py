"""Settings of the whole test run: a cache folder of its own, no settings of the machine, interrupts that arrive,
variables of libraries that are read at import, no time limits of Hypothesis's own. Every test begins as in a fresh
process, and no error is answered that docs/errors.md does not have."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from neuronpedia_inference.embedded.weights import CACHE_VARIABLE, default_cache_dir, model_folder
from neuronpedia_inference.errors import StartupError
from neuronpedia_inference.web.answers import Problem
from tests.documented import documented_errors
from tests.fresh import forget_settings, freshen

PREFIX = "neuronpedia-inference-tests-"

# A shell's background job ignores it, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

forget_settings()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# An example may take as long as it does: a busy machine is no fault of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def own_cache() -> Path:
    """A cache folder for this run and its subprocesses. The embedded model's weights and the directory of SAEs are the
    user's own, because making them takes seconds; what is measured about the tests' small models goes with the run."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with suppress(StartupError, OSError):  # the tests that need the weights say what is wrong with them
        (folder / model_folder().name).symlink_to(model_folder(), target_is_directory=True)
    for copy in default_cache_dir().glob("sae-directory-*.json"):
        (folder / copy.name).symlink_to(copy)
    return folder


CACHE = own_cache()
os.environ[CACHE_VARIABLE] = str(CACHE)


@pytest.fixture(scope="session", autouse=True)
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No `.env` reaches the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Whatever ran before, fixtures of the whole run and of a file among it."""
    freshen()
    yield
    freshen()


@pytest.fixture(scope="session")
def errors_seen() -> Iterator[set[tuple[str, int]]]:
    """(code, status) of every error that this process has answered, on whatever door."""
    seen: set[tuple[str, int]] = set()
    make = Problem.__init__

    def noted(problem: Problem, status: int, code: str, *rest: Any, **more: Any) -> None:
        seen.add((code, int(status)))
        make(problem, status, code, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "__init__", noted)
        yield seen


@pytest.fixture(autouse=True)
def only_documented_errors(errors_seen: set[tuple[str, int]]) -> Iterator[None]:
    """Every error that a test produces is in docs/errors.md, with its status."""
    yield
    unknown = errors_seen - set(documented_errors().items())
    errors_seen.clear()
    assert not unknown, f"docs/errors.md does not have {unknown}"
