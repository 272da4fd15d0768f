"""How long a container takes from a restored snapshot to being ready, beside a plain import of torch and transformers.

    python -m benchmarks.restore

Modal's own container entry point runs against the control plane of the tests, on this machine's CPU, with the embedded
model. Nothing is restored: the process goes on from the point of its snapshot. "before a GPU comes" is the path of a
deployment with a GPU, whose model is moved and checked after the restore; here it finds none and stays on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

from tests.modal.local_modal import Plane
from tests.modal.service_under_test import EMBEDDED, Deployed, fill_volume

ROUNDS = 5
IMPORTS = "import torch, transformers; from transformers import AutoModelForCausalLM"
WAYS = {"none": "everything before the snapshot", "L4": "before a GPU comes"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Plane(Path(folder) / "plane", snapshots=True) as plane:
        fill_volume(plane)
        service = Deployed(plane, Path(folder))
        for gpu in WAYS:
            service.deploy(APP_NAME=f"restore-{gpu.lower()}", GPU=gpu, **EMBEDDED)
        imports: list[float] = []
        starts: dict[str, list[float]] = {gpu: [] for gpu in WAYS}
        for _ in range(ROUNDS):
            imports.append(_import_seconds())
            for gpu, taken in starts.items():
                taken.append(_start_seconds(service, f"restore-{gpu.lower()}"))
    print(f"import of torch and transformers: median {median(imports):.2f} s of {_listed(imports)}")
    for gpu, taken in starts.items():
        share = median(taken) / median(imports)
        print(f"{WAYS[gpu]}: median {median(taken):.2f} s of {_listed(taken)}, {share:.2f} of the imports")


def _start_seconds(service: Deployed, app: str) -> float:
    """Of one container, which is stopped again."""
    function = service.function(app=app)
    httpx.get(f"{function.urls['serve']}/ready", timeout=120).raise_for_status()
    container = [one for one in service.plane.containers if one.pool.function is function][-1]
    (seconds,) = re.findall(r"^Ready: .* ([0-9.]+) s after the snapshot$", container.text, re.MULTILINE)
    service.stop(container)
    return float(seconds)


def _import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return time.perf_counter() - started


def _listed(seconds: list[float]) -> str:
    return ", ".join(f"{one:.2f}" for one in sorted(seconds))


if __name__ == "__main__":
    main()
