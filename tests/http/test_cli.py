"""The command line as a person uses it: what it prints, where, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest
from commands import COMMAND, command, line_with, on_a_terminal, surroundings, without_colours
from rich.console import Console
from served import MODEL, SECRET, SOURCE, TEXT, Served
from typer.testing import CliRunner

from neuronpedia_inference import demo, embedded
from neuronpedia_inference.cli import app, main
from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.server import listen

TOKENIZE = json.dumps({"model": MODEL, "text": TEXT})
ESCAPE = "\x1b["


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


# models, sae


def rows(*words: str) -> list[dict[str, str]]:
    """What a command prints for programs: a head, then tab-separated lines."""
    ran = CliRunner().invoke(app, list(words))
    assert ran.exit_code == 0, ran.output
    head, *lines = [line.split("\t") for line in ran.stdout.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_models_of_the_embedded_model_are_counted_from_its_files() -> None:
    from safetensors.torch import load_file

    (found,) = rows("models", MODEL)
    folders = [embedded.sae_dir(source) for source in embedded.SOURCES]
    numbers = sum(
        tensor.numel() for folder in folders for tensor in load_file(folder / "sae_weights.safetensors").values()
    )
    assert found["bytes on disk"] == str(sum(file.stat().st_size for folder in folders for file in folder.iterdir()))
    assert found["bytes resident"] == str(4 * numbers)
    assert (found["set"], found["saes"], found["width"], found["kind"]) == ("res-4k", "3", "4096", "jumprelu")
    assert (found["hook"], found["canonical"], found["default"]) == ("hook_resid_post", "yes", "yes")
    (halved,) = rows("models", MODEL, "--set", "SAE_DTYPE=bfloat16")
    assert halved["bytes resident"] == str(2 * numbers)


def test_models_marks_the_base_and_says_what_is_not_served() -> None:
    from neuronpedia_inference.saes.listed import REASONS

    by_set = {row["set"]: row for row in rows("models", "gemma-2-2b-it")}
    assert by_set["temporal-res"]["limited"] == f"1: {REASONS[2]}"
    assert by_set["temporal-res"]["of"] == "gemma-2-2b"
    assert by_set["clt-hp"]["limited"] == f"26: {REASONS[1]}"
    assert [name for name, row in by_set.items() if row["default"]] == ["gemmascope-res-16k"]
    assert by_set["gemmascope-res-16k"]["canonical"] == "yes"
    assert not by_set["gemma-scope-2b-pt-res__width_16k-average_l0_10"]["canonical"]


def test_models_in_all_gives_every_sae_of_the_directory_once() -> None:
    from neuronpedia_inference.saes.directory import releases

    every = {(release, sae_id) for release, about in releases().items() for sae_id in about.paths}
    ran = CliRunner().invoke(app, ["models", "--all", "--json"])
    models = json.loads(ran.stdout)["models"]
    saes = [sae for model in models for one in model["sets"] for sae in one["saes"]]
    assert len(saes) == len(every)
    assert {(sae["release"], sae["sae_id"]) for sae in saes} == every
    assert all({"name", "hook", "width", "kind", "bytes"} <= sae.keys() for sae in saes)
    assert sum("refused" in sae for sae in saes) == 8
    piped = rows("models", "--all")
    assert {(row["release"], row["sae_id"]) for row in piped} == every


def test_models_without_a_model_lists_all_with_what_they_serve_by_default() -> None:
    found = {row["model"]: row for row in rows("models")}
    assert next(iter(found)) == MODEL
    assert found["gemma-2-2b"]["without SAE_SETS"] == "gemmascope-res-16k"
    ran = CliRunner().invoke(app, ["models", "--json"])
    assert {model["model"] for model in json.loads(ran.stdout)["models"]} == set(found)


@pytest.mark.parametrize("words", [("models", "gemma-2-2b-it"), ("models",), ("sae", "gemma-2-2b/2-clt-hp")])
def test_lists_are_readable_at_60_columns(words: tuple[str, ...]) -> None:
    shown = without_colours(on_a_terminal(*words, width=60))
    assert max(map(len, shown.splitlines())) <= 60
    assert "\t" not in shown
    assert {"models": "gemmascope-res-16k", "sae": "activations only"}[words[0]] in " ".join(shown.split())


def test_sae_shows_one() -> None:
    (found,) = rows("sae", SOURCE)
    assert found["hook"] == "blocks.15.hook_resid_post"
    assert found["address"] == str(embedded.sae_dir(SOURCE))
    (other,) = rows("sae", "gemma-2-2b/20-gemmascope-res-16k")
    assert other["address"] == "gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical"
    assert rows("sae", other["address"]) == [other]
    assert rows("sae", "20-gemmascope-res-16k", "--model-id", "gemma-2-2b") == [other]
    as_json = json.loads(CliRunner().invoke(app, ["sae", other["address"], "--json"]).stdout)
    assert (as_json["width"], as_json["bytes"]) == (16384, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sae", "15-res-4q"], "Did you mean '15-res-4k'"),
        (["sae", "gemma-2-2b/20-gemmascope-res-16"], "Did you mean '20-gemmascope-res-16k'"),
        (["sae", "gemma-scope-2b-pt-res-canonic/x"], "Did you mean 'gemma-scope-2b-pt-res-canonical'"),
        (["models", "gemma-2-2"], "Did you mean 'gemma-2-2b'"),
    ],
)
def test_what_is_in_no_directory_is_one_line(monkeypatch: Any, capsys: Any, words: list[str], says: str) -> None:
    code, said = complaint(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert says in said
    assert len(said.splitlines()) == 1


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


def test_a_variable_that_is_nearly_a_setting_is_told_and_the_command_goes_on() -> None:
    env = surroundings(TOKEN_LIMT="7")
    ran = subprocess.run([*COMMAND, "sae", SOURCE, "--json"], env=env, capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["neuronpedia-inference: TOKEN_LIMT is ignored: did you mean TOKEN_LIMIT?"]
    assert json.loads(ran.stdout)


def test_a_strip_wraps_and_shows_every_token() -> None:
    tokens = ["<s>", "\n", " a\tb", *[f" word{n}" for n in range(40)]]
    feature = {"label": None, "source": SOURCE, "index": 1, "values": [0.0] * 42 + [3.0]}
    peak = {"max_value": 3.0, "max_value_index": 42}
    result = {"tokens": tokens, "has_bos": True, "features": [feature | peak]}
    page = Console(file=io.StringIO(), width=60)
    page.print(demo.heat_strip(result))
    text = page.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(f"word{n}" in text for n in range(40))
    assert "⏎" in text
    assert "█" in text
    assert "<s>" not in text, "what nobody wrote"
    assert max(len(line) for line in text.splitlines()) <= 60
