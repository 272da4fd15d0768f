"""The peer's virtual environment, `.venv-peer`: `python -m benchmarks.peer_setup`, or the comparison, makes it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.process import ROOT, run_to_end

FOLDER = ROOT / ".venv-peer"
CONSTRAINTS = Path(__file__).parent / "peer-constraints.txt"
PEER = "interp-engine"


def python_of(folder: Path = FOLDER) -> str:
    """Its interpreter; the environment is made where it is missing or out of date. Raises ChildFailed."""
    python = folder / "bin" / "python"
    stamp = folder / "constraints.txt"
    if not stamp.exists() or stamp.read_bytes() != CONSTRAINTS.read_bytes():
        print(f"Making {folder} for the peer", file=sys.stderr, flush=True)
        _make(folder, str(python))
        shutil.copyfile(CONSTRAINTS, stamp)
    return str(python)


def _make(folder: Path, python: str) -> None:
    run_to_end([sys.executable, "-m", "venv", "--clear", str(folder)])
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    # Torch first and alone: nothing that comes later may choose another.
    run_to_end([*install, "torch"])
    run_to_end([*install, PEER])


if __name__ == "__main__":
    print(python_of())
