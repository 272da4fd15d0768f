"""The service deployed to a local control plane, and other processes that use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronpedia_inference import embedded
from neuronpedia_inference.embedded.weights import default_cache_dir, model_folder
from neuronpedia_inference.settings import Settings, variable
from service.options import DEFAULTS
from tests import models
from tests.modal.local_modal import Plane
from tests.modal.local_modal.containers import Container
from tests.modal.local_modal.records import Function

ROOT = Path(__file__).resolve().parents[2]
APP = "neuronpedia-inference"
VOLUME = "hf-cache-neuronpedia"
MODAL = Path(sys.executable).with_name("modal")
START_S = 600

EMBEDDED = {"MODEL_ID": embedded.MODEL_ID, "NUM_THREADS": "1"}
TINY = "/cache/tiny"
NAMED = "tests/tiny"
"""The same model under a name of the hub, as if it had been downloaded."""
BROKEN = "/cache/broken"


@dataclass
class Ran:
    """What another process said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Deployed:
    """A control plane, and the shell in front of it."""

    plane: Plane
    folder: Path

    def env(self, **chosen: str) -> dict[str, str]:
        """A shell's environment with these deploy-time choices and no others."""
        known = {*DEFAULTS, *map(variable, Settings.model_fields)}
        kept = {name: value for name, value in os.environ.items() if name not in known}
        return {**kept, "COLUMNS": "200", **self.plane.env, **chosen}

    def modal(self, *command: str, **chosen: str) -> Ran:
        """The `modal` command, in the project's root."""
        return _run([str(MODAL), *command], self.env(**chosen), ROOT)

    def deploy(self, **chosen: str) -> Ran:
        ran = self.modal("deploy", "service/inference_cls.py", **chosen)
        assert ran.code == 0, ran.text
        return ran

    def python(self, code: str, *arguments: str) -> Any:
        """What `code` assigns to `result`, run by a Python that has modal and does not see this project."""
        program = f"{CALLER}\n{textwrap.dedent(code)}\nprint('result:' + json.dumps(result))"
        ran = _run([sys.executable, "-I", "-c", program, *arguments], self.env(), self.folder)
        assert ran.code == 0, ran.text
        return json.loads(ran.out.rpartition("result:")[2])

    def function(self, tag: str = "Inference.*", app: str = APP) -> Function:
        """The deployed function; a class's ends with `.*`."""
        return self.plane.objects.functions[self.plane.objects.app(app).functions[tag]]

    @property
    def url(self) -> str:
        return self.function().urls["serve"]

    def containers(self, tag: str = "Inference.*") -> list[Container]:
        """All that there have been: one that is idle for long is scaled down, and the next request starts another."""
        function = self.function(tag)
        return [one for one in self.plane.containers if one.pool.function is function]

    def stop(self, container: Container) -> str:
        """Scale one container down; returns what it printed."""
        self.plane.call(container.stop)
        assert self.plane.wait(lambda: container.exit_code is not None), container.text
        return container.text


CALLER = f"""
import asyncio, json, sys, time
import modal
Inference = modal.Cls.from_name({APP!r}, "Inference")

def error_of(call, *args, **fields):
    try:
        return ["nothing raised", str(call(*args, **fields))]
    except Exception as exc:
        return [type(exc).__name__, str(exc)]
"""


def _run(command: Sequence[str], env: dict[str, str], cwd: Path) -> Ran:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=START_S, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def fill_volume(plane: Plane) -> None:
    """Weights that are there already: the embedded model's cached copy, a tiny model, and a broken one."""
    folder = plane.run(_volume_folder(plane))
    model_folder()
    (folder / "neuronpedia-inference").symlink_to(default_cache_dir(), target_is_directory=True)
    models.save("llama", folder / "tiny")
    _as_downloaded(folder / "tiny", folder / "huggingface" / "hub" / "models--tests--tiny")
    shutil.copytree(folder / "tiny", folder / "broken")
    _flatten_output(folder / "broken")


async def _volume_folder(plane: Plane) -> Path:
    return plane.objects.volume(VOLUME).folder


def _as_downloaded(model: Path, repo: Path) -> None:
    """A copy as the hub's client keeps it."""
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, repo / "snapshots" / ("0" * 40))


def _flatten_output(folder: Path) -> None:
    """Weights that load without complaint and give every next token the same probability."""
    net: Any = models.AutoModelForCausalLM.from_pretrained(folder)
    net.lm_head.weight.data.zero_()
    net.save_pretrained(folder)
