"""The command line: serve, demo, call, models, operations, plan. What a command needs is imported when it runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuronpedia_inference.errors import EngineDied, InferenceError, InvalidRequest, StartupError, unknown_name
from neuronpedia_inference.exits import ENGINE_DIED, FAILED, WRONG_USAGE, by_signal, leave

if TYPE_CHECKING:
    from rich.console import Console

    from neuronpedia_inference.operations import Operation
    from neuronpedia_inference.runtime import Runtime
    from neuronpedia_inference.settings import Settings

PIPED_WIDTH = 100
SHOW_CURSOR = b"\x1b[?25h"
SECRETS = ("SECRET", "SENTRY_DSN")
# What the environment may say about other models; the demo is about the embedded one.
OTHER_MODELS = ("override_model_id", "custom_hf_model_id", "sae_sets", "local_sae_dir", "include_sae", "exclude_sae")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SAE features, top-k and steering for language models. Without any setting everything runs on the "
    "embedded model. Settings come from the environment and [bold].env[/]; docs/reference.md lists them.",
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as TOKEN_LIMIT=400. Repeatable."),
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model to load: a short or Hugging Face name, or a folder. (MODEL_ID)")
]
SetsOption = Annotated[
    str | None, typer.Option(help='SAE source sets, such as "res-jb", separated by blanks; "[]" for none. (SAE_SETS)')
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N. (DEVICE)")]


def main() -> None:
    """Run the command line. Expected errors end in one line on standard error. Exit codes: docs/operating.md."""
    _open_streams()
    with _ends_at_once():
        try:
            app()
        except EngineDied as exc:
            _fail(str(exc), ENGINE_DIED)
        except (StartupError, InferenceError) as exc:
            _fail(str(exc.args[0]) if exc.args else type(exc).__name__, FAILED)


def _open_streams() -> None:
    """A closed stream swallows what is written to it, and one that has no sign for a character escapes it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        else:
            stream.reconfigure(errors="backslashreplace")


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

    GET /health answers at once, GET /ready when the model is loaded. API: /docs.

    The secret that callers must send comes from the environment: [bold]SECRET=... neuronpedia-inference serve[/].
    Without one, only this machine can connect, unless you add --insecure.
    """
    from neuronpedia_inference.web.serve import serve as serve_http

    settings = _settings(set_, model_id=model_id, sae_sets=sae_sets, device=device, server_host=host, server_port=port)
    if settings.is_exposed and settings.secret is None and not insecure:
        _fail(
            f"SERVER_HOST {settings.server_host} is open to other machines and no SECRET is set: "
            "set SECRET in the environment, or add --insecure",
            WRONG_USAGE,
        )
    serve_http(settings, _line, _say_ready)


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

    settings = _settings(None, without=OTHER_MODELS, model_id=MODEL_ID, device=device)
    runtime = _load(settings)
    try:
        asyncio.run(show(_console(), runtime, n_tokens=tokens))
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
    settings = _settings(set_, model_id=model_id, sae_sets=sae_sets, device=device)
    if url is not None:
        from neuronpedia_inference.web.client import ask

        for answer in ask(url, wanted.path, request, settings.secret):
            _print_json(answer)
        return
    from neuronpedia_inference.operations import validate

    validate(wanted, request)
    runtime = _load(settings)
    try:
        asyncio.run(_run(wanted, request, runtime))
    finally:
        runtime.close()


@app.command()
def models(
    model_id: Annotated[str | None, typer.Argument(help="A model; without one, all models are listed.")] = None,
) -> None:
    """List the models that have SAEs, or the source sets of one model.

    These are the embedded model and those in SAELens's directory: what MODEL_ID and SAE_SETS can be. Sets of the model
    that it was finetuned from are marked with its name, and what cannot be served has its reason below.
    """
    from neuronpedia_inference.saes.catalogue import known_models, offered

    if model_id is None:
        for name in known_models():
            print(name)
        return
    sets = offered(model_id)
    rows = [(o.source_set, str(len(o.specs)), o.specs[0].name, o.specs[-1].name, o.release, o.base or "") for o in sets]
    _table(("set", "sources", "first", "last", "release", "of"), rows)
    for one in sets:
        for reason, count in one.refused.items():
            _line(f"{one.source_set}: {count} not served: {reason}")
        for reason, count in one.limited.items():
            _line(f"{one.source_set}: {count} with a limit: {reason}")
    if default := next((one.source_set for one in sets if one.is_default), None):
        _line(f"Without SAE_SETS: {default}")


@app.command()
def operations(
    name: Annotated[str | None, typer.Argument(help="An operation; without one, all are listed.")] = None,
) -> None:
    """List the operations, or the fields of one with an example."""
    from neuronpedia_inference.operations import OPERATIONS
    from neuronpedia_inference.web.fields import example_of, fields_of

    if name is None:
        _table(("operation", "path", "summary"), [(op.name, op.path, op.summary) for op in OPERATIONS])
        return
    wanted = _operation(name)
    _line(f"{wanted.name}: {wanted.summary} (POST {wanted.path})")
    fields = fields_of(wanted.request)
    _table(("field", "type", "default", "meaning"), [(f.name, f.type, f.default, f.meaning) for f in fields])
    _line(f"Example: {json.dumps(example_of(wanted.request), ensure_ascii=False)}")


@app.command()
def plan(
    model_id: ModelOption = None,
    sae_sets: SetsOption = None,
    set_: SetOption = None,
) -> None:
    """Count the memory that a model and its SAEs need, and name the cheapest GPU of Modal that has it.

    Nothing is loaded. Local folders and the embedded model are counted from their files, others from the hub's
    metadata. The headroom is a rule of thumb. Costs are of that GPU, from a dated table of prices.
    """
    from neuronpedia_inference.memory import GIB, sizes

    settings = _settings(set_, model_id=model_id, sae_sets=sae_sets)
    counted = sizes(settings)
    rows, costs_by_gpu = [], {}
    for dtypes in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        needs = counted.needs(*dtypes)
        parts = (needs.weights, needs.saes, needs.cache, needs.headroom, needs.total)
        sizes_in_gib = [f"{part / GIB:.2f}" for part in parts]
        rows.append((*dtypes, *sizes_in_gib, needs.gpu or "more than one"))
        if needs.gpu:
            costs_by_gpu.setdefault(needs.gpu, needs.weights + needs.saes)
    _line(f"{settings.weights_id}: {counted.parameters:,} parameters, {counted.n_sources} SAEs; memory in GiB")
    _table(("MODEL_DTYPE", "SAE_DTYPE", "weights", "SAEs", "cache", "headroom", "total", "GPU"), rows)
    _cost_table(costs_by_gpu)


def _cost_table(bytes_read: dict[str, int]) -> None:
    """bytes_read: weights and SAEs, by GPU."""
    from neuronpedia_inference.prices import costs, price_of

    rows = []
    for gpu, n_bytes in bytes_read.items():
        price = price_of(gpu)
        if price is not None:
            one = costs(price.usd_per_hour, n_bytes)
            amounts = (one.hour, one.idle_day, one.cold_start, one.features, one.steered_texts)
            rows.append(
                (gpu, *(f"{amount:.4f}" if amount < 0.1 else f"{amount:.2f}" for amount in amounts), price.seen)
            )
    _line("US dollars for the GPU; a thousand requests at the pace of the benchmark's CPU: no GPU has been measured")
    columns = ("GPU", "hour", "idle day", "cold start", "1000 features", "1000 steered texts", "price seen")
    _table(columns, rows)


# Settings and operations


def _settings(assignments: list[str] | None, *, without: Sequence[str] = (), **options: Any) -> Settings:
    """The environment, overridden by options that were given, overridden by `--set`. Raises StartupError.

    without: fields that get their defaults, whatever the environment says.
    """
    from neuronpedia_inference.settings import Settings

    given = {field: Settings.model_fields[field].get_default() for field in without}
    given |= {field: value for field, value in options.items() if value is not None}
    for assignment in assignments or ():
        field, value = _assigned(assignment)
        given[field] = value
    return Settings.read(**{_key(field): value for field, value in given.items()})


def _assigned(assignment: str) -> tuple[str, Any]:
    """`NAME=VALUE` as a field and its value."""
    from neuronpedia_inference.settings import Settings, variable

    name, equals, value = assignment.partition("=")
    fields = {variable(field): field for field in Settings.model_fields}
    name = name.strip().upper()
    if not equals:
        _fail(f"--set {assignment}: write it as NAME=VALUE", WRONG_USAGE)
    if name not in fields:
        _fail(f"--set: {unknown_name('setting', name, fields)}", WRONG_USAGE)
    if name in SECRETS:
        _fail(
            f"--set {name}: secrets are read from the environment only, other users can see command lines", WRONG_USAGE
        )
    field = fields[name]
    return field, _parsed(value) if field == "model_from_pretrained_kwargs" else value


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value  # the setting's own type then says what is wrong


def _key(field: str) -> str:
    """A field goes by its alias where it has one: by its name it would lose against the environment."""
    from neuronpedia_inference.settings import Settings

    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else field


def _operation(name: str) -> Operation[Any]:
    from neuronpedia_inference.operations import by_name

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


async def _run(operation: Operation[Any], body: dict[str, Any], runtime: Runtime) -> None:
    from neuronpedia_inference.operations import answer, answer_events

    if operation.stream is None or not body.get("stream"):
        _print_json(await answer(operation, body, runtime))
        return
    async for event in await answer_events(operation, body, runtime):
        _print_json(event, one_line=True)


# Output


def _load(settings: Settings) -> Runtime:
    """Load with the steps shown on standard error."""
    import time

    from neuronpedia_inference.observability import start_logging

    quiet = {} if "log_level" in settings.model_fields_set else {"log_level": "warning"}
    start_logging(settings.model_copy(update=quiet))
    console = _console(stderr=True)
    started = time.perf_counter()
    with console.status("Starting") as status:
        from neuronpedia_inference.runtime import Runtime

        def show(step: str) -> None:
            status.update(step)
            if not console.is_terminal:
                console.print(step, markup=False, highlight=False)

        runtime = Runtime.load(settings, show)
    console.print(_ready_line(runtime, time.perf_counter() - started), style="dim", markup=False, highlight=False)
    return runtime


def _say_ready(runtime: Runtime, seconds: float) -> None:
    _line(_ready_line(runtime, seconds))


def _ready_line(runtime: Runtime, seconds: float) -> str:
    from neuronpedia_inference.observability import peak_memory_bytes

    model, n_sources = runtime.model, len(runtime.sources)
    saes = f"{n_sources} SAE{'' if n_sources == 1 else 's'}"
    peak = f"peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
    return f"Ready in {seconds:.1f} s: {model.name} on {model.device}, {saes}, {peak}"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def _print_json(value: Any, *, one_line: bool = False) -> None:
    indent = 2 if sys.stdout.isatty() and not one_line else None
    says_all = sys.stdout.encoding.lower().startswith("utf")
    print(json.dumps(value, indent=indent, ensure_ascii=not says_all), flush=True)


def _line(text: str) -> None:
    print(text, flush=True)


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    print(f"neuronpedia-inference: {line}", file=sys.stderr)
    raise SystemExit(code)
