"""The command line. A command imports what it needs when it runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuronpedia_inference import __version__
from neuronpedia_inference.cli import catalogue, replay, words
from neuronpedia_inference.cli.loaded import load, ready_line, server_at
from neuronpedia_inference.cli.options import DeviceOption, ModelOption, SetOption, SetsOption, settings_of
from neuronpedia_inference.cli.output import console, facts, fail, line, open_streams, print_json, table
from neuronpedia_inference.cli.vectors import vectors
from neuronpedia_inference.errors import EngineDied, InferenceError, InvalidRequest, StartupError, unknown_name
from neuronpedia_inference.exits import ENGINE_DIED, FAILED, WRONG_USAGE, by_signal, leave

if TYPE_CHECKING:
    from neuronpedia_inference.operations import Operation
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings

SHOW_CURSOR = b"\x1b[?25h"
# What the environment may say about other models; the demo is about the embedded one.
OTHER_MODELS = (
    "override_model_id",
    "custom_hf_model_id",
    "sae_sets",
    "local_sae_dir",
    "labels_dir",
    "include_sae",
    "exclude_sae",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
    help="SAE features, top-k and steering for language models. Without any setting everything runs on the "
    "embedded model. Settings come from the environment and [bold].env[/]; docs/reference.md lists them.",
)


def _say_version(asked: bool) -> None:
    if asked:
        line(f"neuronpedia-inference {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Expected errors end in one line on standard error. Exit codes: docs/operating.md."""
    open_streams()
    with _ends_at_once():
        try:
            app()
        except EngineDied as exc:
            fail(str(exc), ENGINE_DIED)
        except InferenceError as exc:
            of_server = f" (code {exc.code}, request id {exc.request_id})" if exc.request_id else ""
            fail(exc.message + of_server, FAILED)
        except StartupError as exc:
            fail(str(exc.args[0]) if exc.args else type(exc).__name__, FAILED)


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process whatever it does; `serve` has a way of its own."""

    def end(number: int, _frame: FrameType | None) -> None:
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), SHOW_CURSOR + b"\n")  # what turns while a model loads has hidden it
        leave(by_signal(number))

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@app.command()
def serve(
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. (SERVER_HOST, 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one. (SERVER_PORT, 5002)")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow other addresses without a SECRET.")] = False,
    set_: SetOption = None,
) -> None:
    """Serve a model over HTTP.

    For people: the page at /, the reference at /docs. GET /health answers at once, GET /ready when the model is loaded.

    The secret that callers must send comes from the environment: [bold]SECRET=... neuronpedia-inference serve[/].
    Without one, only this machine can connect, unless you add --insecure.
    """
    from neuronpedia_inference.web.serve import serve as serve_http

    settings = settings_of(
        set_, model_id=model_id, sae_sets=sae_sets, device=device, server_host=host, server_port=port
    )
    if settings.is_exposed and not settings.is_guarded and not insecure:
        fail(
            f"SERVER_HOST {settings.server_host} is open to other machines and no SECRET is set: "
            "set SECRET in the environment, or add --insecure",
            WRONG_USAGE,
        )
    serve_http(settings, line, _say_ready)


@app.command()
def demo(
    device: DeviceOption = None,
    tokens: Annotated[int, typer.Option(min=1, max=200, help="Tokens to generate for each steered text.")] = 24,
) -> None:
    """Show what the library does, on the embedded model.

    Three views: the strongest features of each token of a sentence, one feature as a heat strip, and the same
    prompts continued plain and steered. Needs no network and no GPU.
    """
    from neuronpedia_inference.demo import show
    from neuronpedia_inference.embedded import MODEL_ID

    settings = settings_of(None, without=OTHER_MODELS, model_id=MODEL_ID, device=device)
    runtime = load(settings)
    try:
        asyncio.run(show(console(), runtime, n_tokens=tokens))
    finally:
        runtime.close()


@app.command()
def call(
    operation: Annotated[str, typer.Argument(help="Name of an operation; see [bold]operations[/].")],
    body: Annotated[str, typer.Argument(help="Its request as JSON, or - to read it from standard input.")],
    url: Annotated[str | None, typer.Option(help="Ask a running server, such as http://127.0.0.1:5002.")] = None,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Run one operation and print its answer as JSON.

    Loads the model in this process, or asks a running server with --url (the SECRET of the environment goes along).
    With "stream": true in the body, every event is printed on a line of its own.

    Example: [bold]neuronpedia-inference call top_k '{"prompt": "The cat sat.", "source": "15-res-4k"}'[/]
    """
    wanted = _operation(operation)
    request = _json_object(sys.stdin.read() if body == "-" else body)
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    if url is not None:
        _ask_server(url, wanted, request, settings)
        return
    from neuronpedia_inference.operations import validate

    validate(wanted, request)
    runtime = load(settings)
    try:
        asyncio.run(_run(wanted, request, runtime))
    finally:
        runtime.close()


@app.command()
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Compare this machine's numbers with plain Hugging Face, and print a report that can be pasted.

    Captures, features, every kind of steering, merged and streamed, against Hugging Face's own forward with hooks put
    on its blocks and SAEs computed by hand from their files. Exit code 1 if anything differs by more than rounding.
    """
    settings = settings_of(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    runtime = load(settings)
    try:
        from neuronpedia_inference.checks import verify as verified

        report = asyncio.run(verified(runtime))
    finally:
        runtime.close()
    if as_json:
        print_json(report.to_json())
    else:
        facts(report.about)
        rows = [
            (c.name, c.verdict, f"{c.difference:.2g}", f"{c.bound:.2g}", c.skipped or c.where) for c in report.checks
        ]
        table(("check", "verdict", "difference", "bound", "where"), rows)
        line(report.summary)
    if not report.passed:
        raise SystemExit(FAILED)


for command in (
    words.features,
    words.search,
    words.steer,
    words.sweep,
    words.chat,
    replay.replay,
    catalogue.models,
    catalogue.sae,
    catalogue.plan,
):
    app.command()(command)
app.add_typer(vectors, name="vectors")


@app.command()
def operations(
    name: Annotated[str | None, typer.Argument(help="An operation; without one, all are listed.")] = None,
) -> None:
    """List the operations, or the fields of one with an example."""
    from neuronpedia_inference.operations import OPERATIONS
    from neuronpedia_inference.web.fields import example_of, fields_of

    if name is None:
        table(("operation", "path", "summary"), [(op.name, op.path, op.summary) for op in OPERATIONS])
        return
    wanted = _operation(name)
    line(f"{wanted.name}: {wanted.summary} ({wanted.method} {wanted.path})")
    fields = fields_of(wanted.request)
    table(("field", "type", "default", "meaning"), [(f.name, f.type, f.default, f.meaning) for f in fields])
    line(f"Example: {json.dumps(example_of(wanted.request), ensure_ascii=False)}")


# Operations


def _operation(name: str) -> Operation[Any]:
    """Hyphens and underscores are alike."""
    from neuronpedia_inference.operations import by_name

    name = name.replace("-", "_")
    if name not in by_name:
        raise InvalidRequest(unknown_name("operation", name, by_name))
    return by_name[name]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"The body is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object")
    return value


def _ask_server(url: str, operation: Operation[Any], body: dict[str, Any], settings: Settings) -> None:
    server = server_at(url, settings)
    try:
        if operation.stream is None or not body.get("stream"):
            print_json(server.ask(operation.name, body))
            return
        for event in server.stream(operation.name, body):
            print_json(event)
    finally:
        server.close()


async def _run(operation: Operation[Any], body: dict[str, Any], runtime: Runtime) -> None:
    from neuronpedia_inference.operations import answer, answer_events

    if operation.stream is None or not body.get("stream"):
        print_json(await answer(operation, body, runtime))
        return
    async for event in await answer_events(operation, body, runtime):
        print_json(event, one_line=True)


# Output


def _say_ready(runtime: Runtime, seconds: float) -> None:
    line(ready_line(runtime, seconds))
