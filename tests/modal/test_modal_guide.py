"""Every command of docs/operating.md, run in its order against the local control plane.

There is no hub of models here: where a container would download, the embedded model stands in for the one named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.modal.local_modal import Plane
from tests.modal.service_under_test import APP, MODAL, ROOT, START_S, Deployed, fill_volume

GUIDE = ROOT / "docs" / "operating.md"
ADDRESS = "https://workspace--neuronpedia-inference-serve.modal.run"
BIN = Path(sys.executable).parent
STAND_INS = {
    "--model-id gemma-2-2b --sae-sets gemmascope-res-16k": "--model-id smollm2-135m-instruct --sae-sets res-4k",
    '"source": "5-res-jb"': '"source": "15-res-4k"',
}
NOT_TO_BE_RUN = {
    "pip install modal==1.6.4     # part of `make demo`": "installs into this environment; see the next test",
    ".venv/bin/neuronpedia-inference replay answer.json --url http://127.0.0.1:5002": "no server; see test_receipts.py",
    ".venv/bin/python scripts/refresh_prices.py": "writes the table of prices; see test_prices.py",
}
FOLLOWS = " -f"
FOLLOW_S = 5


def lines() -> Iterator[str]:
    for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        yield from filter(None, map(str.strip, block.splitlines()))


def expected_codes(line: str) -> tuple[int, ...]:
    """What the shell may say: a command that follows a log is ended by `timeout`."""
    return (124,) if line.endswith(FOLLOWS) else (0,)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A shell in the project's root, a model on the volume, and a file of prompts."""
    folder = tmp_path_factory.mktemp("guide")
    with Plane(folder / "plane") as plane:
        fill_volume(plane)
        service = Deployed(plane, folder)
        prompts = [json.dumps({"prompt": f"Number {number}."}) for number in range(20)]
        (folder / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
        yield service


def run(service: Deployed, line: str) -> subprocess.CompletedProcess[str]:
    """As a person types it, with what stands in for what is not here."""
    for named, stand_in in STAND_INS.items():
        line = line.replace(named, stand_in)
    line = line.replace(".venv/bin/", f"{BIN}/")
    line = re.sub(r"\b((prompts|out)\.jsonl|answer\.json)\b", lambda match: str(service.folder / match.group()), line)
    if ADDRESS in line:
        # The default deployment's model cannot be downloaded here.
        service.deploy(GPU="none", MODEL_ID="smollm2-135m-instruct")
        line = line.replace(ADDRESS, service.url) + " --silent --show-error --fail"
    if "batch" in line:
        service.deploy(GPU="none", MODEL_ID="smollm2-135m-instruct")
        line = f"GPU=none MODEL_ID=smollm2-135m-instruct {line}"
    line = line.replace("modal ", f"{MODAL} ", 1) if re.match(r"([A-Z_]+=\S+ )*modal ", line) else line
    limit = f"timeout {FOLLOW_S} " if line.endswith(FOLLOWS) else ""
    env = {**service.env(), "SECRET": "another", "PATH": f"{BIN}:/usr/bin:/bin"}
    return subprocess.run(
        ["bash", "-c", limit + line], env=env, cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False
    )


@pytest.mark.long
def test_every_command_does_what_it_should(guided: Deployed) -> None:
    said: dict[str, str] = {}
    for line in lines():
        if line in NOT_TO_BE_RUN:
            continue
        if "secret create" in line and "--force" not in line:
            guided.modal("secret", "delete", "--yes", APP)  # the three shapes are alternatives
        done = run(guided, line)
        said[line] = done.stdout + done.stderr
        assert done.returncode in expected_codes(line), (line, said[line])
    assert f"{APP} is online." in said["modal deploy service/inference_cls.py"]
    (quick,) = [text for line, text in said.items() if line.startswith("modal run") and line.endswith("instruct")]
    assert "Strongest feature: " in quick
    assert [text for line, text in said.items() if "::batch" in line and "20 of 20 answered" in text]
    assert "1200 seconds" in said["modal function autoscaler settings 'neuronpedia-inference/Inference.*'"]
    (top_k,) = [json.loads(text) for line, text in said.items() if "/v1/top-k" in line]
    assert top_k["results"][0]["tokens"]


def test_the_version_to_install_is_the_one_that_is_pinned() -> None:
    pins = (ROOT / "constraints-dev.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines() if line.startswith("pip install modal")]
    assert line.split()[2] in pins


@pytest.mark.parametrize("entry", ["", "::download", "::batch"])
def test_help_names_every_option_of_the_guide(guided: Deployed, entry: str) -> None:
    said = guided.modal("run", f"service/inference_cls.py{entry}", "--help")
    assert said.code == 0, said.text
    typed = [line for line in lines() if f"inference_cls.py{entry} " in line and " run " in line]
    options = {word for line in typed for word in line.split() if word.startswith("--")}
    assert options <= set(said.out.split())
