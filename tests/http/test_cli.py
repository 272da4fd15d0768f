"""The command line as a person uses it: what it prints, where, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from commands import COMMAND, command, line_with, surroundings
from rich.console import Console
from served import MODEL, SECRET, SOURCE, TEXT, Served
from typer.testing import CliRunner

from neuronpedia_inference import demo, embedded
from neuronpedia_inference.cli import app, main
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.server import listen

TOKENIZE = json.dumps({"model": MODEL, "text": TEXT})
ESCAPE = "\x1b["


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Commands send log lines to the standard error of the moment, which ends with the test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], env=surroundings(), capture_output=True, text=True, timeout=600, check=False
    )


def complaint(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of a command that fails, run in this process."""
    monkeypatch.setattr(sys, "argv", ["neuronpedia-inference", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert captured.out == ""
    return int(ended.value.code or 0), captured.err


# serve


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_serve_refuses_other_addresses_without_a_secret(host: str) -> None:
    ran = run("serve", "--host", host)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert "SECRET" in line
    assert "--insecure" in line
    assert ran.stdout == ""


@pytest.mark.usefixtures("runtime")  # the libraries are imported then, with their warnings
def test_serve_ends_with_one_line_when_it_cannot_load(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["neuronpedia-inference", "serve", "--port", "0", "--sae-sets", "res-4q"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    last = said.splitlines()[-1]
    assert last.startswith("neuronpedia-inference: SAE_SETS: Unknown source set 'res-4q'")
    assert "res-4k" in last
    assert "Traceback" not in said


def test_serve_names_a_port_that_is_taken(monkeypatch: Any, capsys: Any) -> None:
    taken = listen("127.0.0.1", 0)
    try:
        port = str(taken.getsockname()[1])
        code, said = complaint("serve", "--port", port, monkeypatch=monkeypatch, capsys=capsys)
    finally:
        taken.close()
    assert code == 1
    assert f"127.0.0.1:{port}" in said
    assert "in use" in said


def test_serve_answers_while_it_loads_and_ends_in_peace() -> None:
    with command(["serve", "--port", "0", "--sae-sets", "[]"], SECRET=SECRET, LOG_FORMAT="json") as process:
        url = line_with(process, "Listening on").rpartition(" ")[2]
        assert httpx.get(f"{url}/health", timeout=600).json() == {"status": "healthy"}
        waiting = httpx.get(f"{url}/ready", timeout=600)
        assert waiting.status_code in (200, 503)
        ready = line_with(process, "Ready in")
        assert re.fullmatch(rf"Ready in \d+\.\d s: {MODEL} on cpu, 0 SAEs, peak memory \d+ MiB", ready)
        assert httpx.get(f"{url}/ready", timeout=600).status_code == 200
        headers = {b"X-SECRET-KEY": SECRET.encode()}
        assert (
            httpx.post(f"{url}/v1/tokenize", json=json.loads(TOKENIZE), headers=headers, timeout=600).status_code == 200
        )
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=300)
    assert process.returncode == 0
    assert SECRET not in log
    requests = [json.loads(line) for line in log.splitlines() if '"message": "request"' in line]
    assert requests[-1]["path"] == "/v1/tokenize"
    assert "Traceback" not in log


# call


def test_call_asks_a_running_server(server: Served) -> None:
    ran = CliRunner().invoke(app, ["call", "tokenize", TOKENIZE, "--url", server.url])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["token_strings"][1:3] == ["The", " cat"]


def test_call_takes_the_secret_from_the_environment(locked_server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["call", "tokenize", TOKENIZE, "--url", locked_server.url]
    refused = CliRunner().invoke(app, words)
    assert "X-SECRET-KEY" in str(refused.exception)
    monkeypatch.setenv("SECRET", SECRET.encode().decode("latin-1"))
    assert CliRunner().invoke(app, words).exit_code in (0, 1)
    monkeypatch.setenv("SECRET", SECRET)
    assert CliRunner().invoke(app, words).exit_code == 0


def test_call_prints_events_as_they_come(server: Served) -> None:
    body = json.dumps({"prompt": "I", "features": [], "max_new_tokens": 3, "stream": True})
    ran = CliRunner().invoke(app, ["call", "steer", "-", "--url", server.url], input=body)
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(events) >= 3
    assert events[-1]["default"]["text"].startswith(events[0]["default"]["text"])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["call", "tokenise", "{}"], 1, "Did you mean 'tokenize'"),
        (["call", "tokenize", "{"], 1, "not valid JSON"),
        (["call", "tokenize", "[]"], 1, "must be a JSON object"),
        (["call", "tokenize", "{}"], 1, "text: Field required"),
        (["call", "tokenize", TOKENIZE, "--url", "http://127.0.0.1:9"], 1, "No answer from http://127.0.0.1:9"),
        (["call", "tokenize", TOKENIZE, "--url", "nonsense"], 1, "nonsense"),
        (["serve", "--set", "TOKEN_LIMIT"], 2, "NAME=VALUE"),
        (["serve", "--set", "TOKEN_LIMITS=1"], 2, "Did you mean 'TOKEN_LIMIT'"),
        (["serve", "--set", "SECRET=x"], 2, "environment only"),
        (["serve", "--set", "TOKEN_LIMIT=many"], 1, "TOKEN_LIMIT"),
        (["serve", "--set", "MODEL_FROM_PRETRAINED_KWARGS=[]"], 1, "MODEL_FROM_PRETRAINED_KWARGS"),
        (["serve", "--device", "tpu"], 1, "DEVICE"),
        (["operations", "nothing"], 1, "Unknown operation 'nothing'"),
        (["models", "gpt2-smal"], 1, "gpt2-small"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch: Any, capsys: Any, words: list[str], code: int, says: str) -> None:
    got, said = complaint(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert (got, says in said) == (code, True), said
    assert len(said.splitlines()) == 1


def test_call_repeats_what_the_server_says(server: Served, monkeypatch: Any, capsys: Any) -> None:
    body = json.dumps({"model": MODEL, "text": "x" * 5000})
    code, said = complaint("call", "tokenize", body, "--url", server.url, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert "request id" in said


def test_models_lists_the_sets_of_the_embedded_model() -> None:
    ran = CliRunner().invoke(app, ["models", MODEL])
    assert ran.exit_code == 0
    assert re.search(r"res-4k +3 +10-res-4k +20-res-4k", ran.stdout)


def test_models_marks_the_base_and_says_what_is_not_served() -> None:
    from neuronpedia_inference.saes.listed import REASONS

    ran = CliRunner().invoke(app, ["models", "gemma-2-2b-it"])
    assert ran.exit_code == 0
    assert f"temporal-res: 1 not served: {REASONS[0]}" in ran.stdout
    assert f"clt-hp: 26 with a limit: {REASONS[2]}" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "Without SAE_SETS: gemmascope-res-16k"
    assert re.search(r"temporal-res +1 .* gemma-2-2b *\n", ran.stdout)


# demo


def shown(runtime: Runtime, **console: Any) -> str:
    page = Console(file=io.StringIO(), width=100, **console)
    asyncio.run(demo.show(page, runtime, n_tokens=3))
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue()


@pytest.fixture(scope="module")
def piped_demo(runtime: Runtime) -> str:
    return shown(runtime)


def test_the_demo_has_three_views(piped_demo: str) -> None:
    for title in ("What the model sees in each token", "One feature over the sentence", "plain and steered"):
        assert title in piped_demo
    assert SOURCE in piped_demo
    for example in embedded.steering_examples()[:3]:
        assert example.label[:20] in piped_demo
    assert "█" in piped_demo


def test_the_demo_is_plain_when_piped(piped_demo: str) -> None:
    assert ESCAPE not in piped_demo
    assert max(len(line) for line in piped_demo.splitlines()) <= 100


def test_the_demo_is_in_colour_on_a_terminal(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert f"{ESCAPE}38;2;" in shown(runtime, force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "38;2;" not in shown(runtime, force_terminal=True, color_system="truecolor")


def test_a_strip_wraps_and_shows_every_token() -> None:
    tokens = ["<s>", "\n", " a\tb", *[f" word{n}" for n in range(40)]]
    feature = {"label": None, "source": SOURCE, "index": 1, "values": [0.0] * 42 + [3.0]}
    result = {"tokens": tokens, "features": [feature | {"max_value": 3.0, "max_value_index": 42}]}
    page = Console(file=io.StringIO(), width=60)
    page.print(demo.heat_strip(result, page.width))
    text = page.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(f"word{n}" in text for n in range(40))
    assert "⏎" in text
    assert "█" in text
    assert max(len(line) for line in text.splitlines()) <= 60
