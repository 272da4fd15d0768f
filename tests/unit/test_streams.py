"""What the command line writes where its streams are closed, cannot say a character, or are no longer read."""

from __future__ import annotations

import json
import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "neuronpedia_inference"]
ASKED = ["operations", "steer"]


def test_an_ascii_stream_gets_what_ascii_can_say() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "--help"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_json_stays_json_in_ascii() -> None:
    code = "from neuronpedia_inference import cli; cli.open_streams(); cli.output.print_json({'é': '’'})"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"é": "’"}
    assert done.stdout.isascii()


def test_closed_streams_swallow_what_is_written() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, *ASKED], check=False)
    assert done.returncode == 0


def test_who_has_read_enough_is_no_error() -> None:
    """As `| head -1` does; the pipe is closed before anything is written, and nobody is left to read a complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *ASKED], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
