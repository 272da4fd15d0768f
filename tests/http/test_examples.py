"""examples/steer_stream.py against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from served import SECRET, Served

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "steer_stream.py"


def run(url: str, **secret: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8", **secret}
    return subprocess.run([sys.executable, str(EXAMPLE), url], capture_output=True, env=environment, check=False)


def test_the_text_is_written_to_its_end(server: Served) -> None:
    done = run(server.url)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert text.startswith("The most important thing is the country's economy")
    assert text.count("\n") == 1


def test_a_server_with_a_secret_needs_it(locked_server: Served) -> None:
    refused = run(locked_server.url)
    assert refused.returncode == 1
    assert "X-SECRET-KEY" in refused.stderr.decode()
    assert SECRET not in refused.stderr.decode()
