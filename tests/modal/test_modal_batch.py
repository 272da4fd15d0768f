"""The batch job as the command that people type; its rules are in tests/unit."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from service import batch
from tests.batches import BAD, N_LINES, read_lines, write_lines
from tests.modal.service_under_test import APP, EMBEDDED, MODAL, NAMED, ROOT, Deployed


def test_killed_half_way_and_started_again(deployed: Deployed, tmp_path: Path) -> None:
    source, output = write_lines(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ["run", "service/inference_cls.py::batch", "--input", str(source), "--output", str(output)]
    command += ["--operation", "activations", "--fields", '{"source_set": "neurons", "num_results": 1}']
    command += ["--model-id", NAMED, "--sae-sets", "[]"]

    first = subprocess.Popen(
        [str(MODAL), *command],
        env=deployed.env(MODELS=NAMED, **EMBEDDED),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while (not output.exists() or output.read_bytes().count(b"\n") < 30) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = output.read_bytes()
    assert 30 <= before.count(b"\n") < 197

    said = deployed.modal(*command, MODELS=NAMED, **EMBEDDED)

    assert said.code == batch.SOME_FAILED, said.text
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    entries = read_lines(output)
    assert [entry["line"] for entry in entries] == [i for i in range(1, N_LINES + 1) if i not in BAD]
    assert all(entry["answer"]["results"][0]["features"] for entry in entries)
    assert [entry["line"] for entry in read_lines(tmp_path / "out.jsonl.errors")] == sorted(BAD)
    n_before = before.count(b"\n")
    assert f"{n_before} answered before" in said.text


def test_what_is_deployed_answers(deployed: Deployed, tmp_path: Path) -> None:
    """With `--app` no container is started for the job, and everything answered is exit code 0."""
    source, output = write_lines(tmp_path / "in.jsonl", 40, {}), tmp_path / "out.jsonl"
    deployed.python('result = Inference().tokenize.remote(model="x", text="a")')
    before = len(deployed.plane.containers)
    command = ["run", "service/inference_cls.py::batch", "--input", str(source), "--output", str(output)]
    command += ["--operation", "top_k", "--fields", '{"source": "15-res-4k", "top_k": 2}', "--app", APP]
    said = deployed.modal(*command, **EMBEDDED)
    assert said.code == batch.ANSWERED, said.text
    assert len(read_lines(output)) == 40
    assert len(deployed.plane.containers) == before
