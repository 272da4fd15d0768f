"""Writes what the documents derive from the code: `docs/reference.md`, `docs/errors.md`, the README's tables.

`python scripts/render_docs.py` rewrites them; `--check` changes nothing, names what is out of date and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined
from render_benchmarks import documents as benchmark_documents
from render_saes import saes
from render_starts import starts

from neuronpedia_inference.embedded import steering_examples
from neuronpedia_inference.embedded.weights import CACHE_VARIABLE
from neuronpedia_inference.memory import GPUS
from neuronpedia_inference.metrics import Metrics
from neuronpedia_inference.operations import OPERATIONS, Operation
from neuronpedia_inference.prices import prices
from neuronpedia_inference.settings import Settings, variable
from neuronpedia_inference.web.auth import HEADER
from neuronpedia_inference.web.body import BODIES_AT_ONCE
from neuronpedia_inference.web.connections import HEAD_S, MAX_FRAMING
from neuronpedia_inference.web.explained import EXPLAINED, status_of
from neuronpedia_inference.web.fields import example_of, fields_of
from neuronpedia_inference.web.openapi import openapi_path
from neuronpedia_inference.web.parsing import MAX_CONTAINERS
from neuronpedia_inference.web.sse import EVENT_BYTES_PER_S, LARGE_BYTES

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
ERRORS = ROOT / "docs" / "errors.md"
README = ROOT / "README.md"
OPERATING = ROOT / "docs" / "operating.md"
N_STEERING = 3
NOTE = "<!-- Written by scripts/render_docs.py; change the code and run it again. -->\n"
MORE_OPENAPI = "the running server's `/docs` and `/openapi.json` have the answers' fields too"


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def operations_table() -> str:
    rows = [(f"`{op.name}`", f"`{op.method} {openapi_path(op)}`", op.summary) for op in OPERATIONS]
    return table(("operation", "route", "what it gives"), rows)


CACHE = (
    "Folder for the embedded model's weights (0.5 GiB, made at the first start) and for what was measured at a start. "
    "Unset: `neuronpedia-inference` in the user's cache folder. Read from the environment only."
)


def settings_table() -> str:
    fields = Settings.model_fields.items()
    rows = [(f"`{variable(name)}`", _default(field.get_default()), field.description or "") for name, field in fields]
    rows.append((f"`{CACHE_VARIABLE}`", "unset", CACHE))
    return table(("variable", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if value is PydanticUndefined:
        return "`{}`"
    text = json.dumps(list(value)) if isinstance(value, tuple) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def errors_table() -> str:
    codes = sorted(EXPLAINED, key=lambda code: (status_of(code), code))
    rows = [(str(status_of(code)), f"[`{code}`](errors.md#{code})", EXPLAINED[code].means) for code in codes]
    return table(("status", "code", "meaning"), rows)


def metrics_table() -> str:
    rows = [
        (f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.meaning)
        for each in Metrics().describe()
    ]
    return table(("metric", "type", "labels", "meaning"), rows)


def fields_table(operation: Operation[Any]) -> str:
    rows = []
    for field in fields_of(operation.request):
        default = f"`{field.default}`" if field.default else "required"
        rows.append((f"`{field.name}`", field.type, default, field.meaning))
    return table(("field", "type", "default", "meaning"), rows)


# Documents

CONVENTIONS = f"""\
- Bodies are JSON objects sent with `Content-Type: application/json`. Types are strict: no strings for numbers, no `1.0`
  for integers, no NaN. Unknown fields are refused by the operations that are ours alone (`activations`, `steer`,
  `capture` and their like), with the near name; Neuronpedia's routes ignore them.
- **Spelling.** Every field may be sent in snake_case or in camelCase; where both are sent, camelCase wins. Answers are
  spelled as the request is. Where a request has no field of two words, `activation_single`, `activation_single_batch`
  and `tokenize` answer in both spellings; `activeFeatures` and `hookName` are camelCase always. The body of
  `/v1/capabilities` is snake_case always.
- **Secret.** Where `SECRET` is set, every request needs it in the header `{HEADER}`. `/health` and `/ready` are open,
  and so are a browser's preflight and what is the same for every server: the page, `/docs`, their files and
  `/openapi.json`.
- **Request id.** Every answer has an `X-Request-Id`: the one that the request came with, if it is plain and at most 128
  characters long, else a new one. Log lines carry it.
- **Errors.** Every answer that is not a success has the body `{{"error": "...", "code": "...", "request_id": "..."}}`,
  with status 422 also `detail`. A 503 has `Retry-After`. What is checked, in this order: host and origin, secret, size
  of the body, JSON, schema, the request's meaning. A body of more than {MAX_CONTAINERS} objects and lists (brackets in
  texts count) is refused like one that is too large; integers beyond ±(2⁶³ − 1) are read in bodies of up to 64 KiB
  only.
- **Streams.** With `"stream": true` the steering operations answer with `text/event-stream`: `data: {{json}}` and a
  blank line, every event holding the whole answer so far, or with `deltas` on `/v1/steer` only what is new. There is an
  event for each token as long as the caller reads as fast as the model writes; else one for all that has come since.
  Events of {LARGE_BYTES // 1024} KiB and more leave at {EVENT_BYTES_PER_S / 1e6:g} MB a second at most, so that what
  they repeat does not slow the model; the last waits for nothing. Who reads nothing for `SEND_TIMEOUT` is cut off. The
  stream ends when the connection does.
  What is wrong with a request is said before the stream begins, with an ordinary status. A failure after the first
  event ends the stream with `event: error` and `data: {{"error": "...", "code": "...", "request_id": "..."}}`: a reader
  that ignores event names recognises it by its key `error`. Hanging up stops the generation.
- Answers of 1000 bytes and more are compressed for clients that accept gzip, streams never. Large answers come in
  pieces of 16 to 64 KiB, without `Content-Length`, as fast as they are read; who reads nothing for `SEND_TIMEOUT` is
  cut off. Files of tensors come in pieces of at most 256 KiB, uncompressed and with `Content-Length`.
- **Browsers.** With a `SECRET`, pages of any origin may call (CORS), without credentials. Without one, only pages of
  this machine may, and the server answers only as a loopback address or `SERVER_HOST`: a request whose `Host` or
  `Origin` is another is a 403. `ALLOWED_HOSTS` and `ALLOWED_ORIGINS` name more; pages of an allowed host may call it.
  A request without `Origin`, as programs send it, is judged by its `Host` alone.
- **Connections.** The headers of a request have {HEAD_S:g} s to come, its body `RECEIVE_TIMEOUT`; headers and chunk
  sizes may take {MAX_FRAMING} bytes more than the body has. Bodies on their way in may hold
  {BODIES_AT_ONCE} × `MAX_BODY_BYTES` together. An answer that leaves before its
  request has come in whole, such as a 401 or 413, ends the connection. Of
  `MAX_CONNECTIONS` the one that has waited longest for its caller gives way to a new one.
- **Pages.** `GET /` is a page for people, `GET /docs` the reference to try out (`/redoc` is the same page). Both come
  from the package with all their files, ask no other host for anything, may not be framed, and keep a key in memory
  only.
- `GET /health` says that the process lives, `GET /ready` that the model answers (503 until then), `GET
  /v1/capabilities` what is served and within which limits, `GET /metrics` how busy it is. `POST /initialize` is
  refused with 409."""

SETTINGS = """\
Read from the environment and from `.env`, once, at the start. Variables that are nearly settings are told there, with
the near name."""

METRICS = f"""\
`GET /metrics` gives them in Prometheus' text format, for one process and since its start. Load is nobody's business
but yours, so the path asks for the secret like any other: Prometheus sends it with `http_headers` in the scrape
configuration (`{HEADER}`). Until the model is loaded the answer is a 503.

A request counts once, whatever door it came through: `answered`; `refused`, which is a 4xx; `overloaded`, a 503 because
the server was full; `failed`, any other fault; or `cancelled`, when its caller hung up first. A stream counts when it
ends. What is turned away before it reaches an operation (an unknown path, a wrong secret, anything while the model
loads) does not count. `jobs` are the pieces of work that requests put before the model; a hang-up that arrives when the
work is done leaves a cancelled request and an answered job."""


def reference() -> str:
    parts = [
        f"# Reference\n\n{NOTE}",
        f"## Operations\n\n{operations_table()}",
        f"## HTTP\n\n{CONVENTIONS}",
        f"## Requests\n\nFields of nested objects are written `outer.inner`; {MORE_OPENAPI}.",
        *(_request_section(operation) for operation in OPERATIONS),
        f"## Settings\n\n{SETTINGS}\n\n{settings_table()}",
        f"## What ends a start\n\n{starts(table)}",
        f"## SAEs\n\n{saes(table)}",
        f"## Errors\n\n{errors_table()}",
        f"## Metrics\n\n{METRICS}\n\n{metrics_table()}",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _request_section(operation: Operation[Any]) -> str:
    # The first sentence of the model's own description says what the summary says.
    more = " ".join((operation.request.__doc__ or "").partition("\n\n")[2].split())
    example = json.dumps(_shortened(example_of(operation.request)), ensure_ascii=False)
    return "\n\n".join(
        [
            f"### {operation.name}",
            f"`{operation.method} {openapi_path(operation)}`: {operation.summary}." + (f" {more}" if more else ""),
            fields_table(operation),
            f"```json\n{example}\n```",
        ]
    )


def _shortened(value: Any) -> Any:
    """Without the hundreds of numbers of a vector."""
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [*value[:2], "..."] if len(value) > 8 else [_shortened(item) for item in value]
    return value


def errors() -> str:
    head = (
        f"# Errors\n\n{NOTE}\n"
        "Every answer that is not a success has a string `error` for people, a `code` for programs, and the "
        "`request_id` under which the server's log has more."
    )
    codes = sorted(EXPLAINED, key=lambda code: (status_of(code), code))
    return "\n\n".join([head, *map(_error_section, codes)]) + "\n"


def _error_section(code: str) -> str:
    explained = EXPLAINED[code]
    shown = json.dumps(explained.body(code), indent=2, ensure_ascii=False)
    return (
        f"## {code}\n\nStatus {status_of(code)}. {explained.means}\n\n"
        f"```json\n{shown}\n```\n\n**What to do.** {explained.remedy}"
    )


def steering_table() -> str:
    """The first documented features that steer, as the search of the training script found them."""
    rows = [
        f"| {e.label} | `{e.source}` #{e.index} | {e.strength:g} | {e.prompt} **{' '.join(e.steered.split())}** |"
        for e in steering_examples()[:N_STEERING]
    ]
    return "\n".join(["| feature | where | strength | what the model then says |", "| --- | --- | --- | --- |", *rows])


def readme(text: str) -> str:
    """The README with its marked tables renewed."""
    tables = {"operations": operations_table(), "settings": settings_table(), "steering": steering_table()}
    return _renewed(text, tables)


def gpu_table() -> str:
    """Modal's GPUs with their memory and what they cost."""
    known = [(gpu, gigabytes, prices()[gpu]) for gpu, gigabytes in GPUS.items()]
    rows = [
        (f"`{gpu}`", f"{gigabytes}", f"{price.usd_per_hour:.2f}", f"{24 * price.usd_per_hour:.2f}", price.seen)
        for gpu, gigabytes, price in known
    ]
    return table(("GPU", "memory, GB", "$ an hour", "$ an idle day with MIN_CONTAINERS=1", "price seen"), rows)


def operating(text: str) -> str:
    """The guide to Modal with its marked table renewed."""
    return _renewed(text, {"gpus": gpu_table()})


def _renewed(text: str, tables: Mapping[str, str]) -> str:
    """The text with new contents between the markers of each table."""
    for name, content in tables.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, block=f"{start}\n{content}\n{end}": block, text)
    return text


def documents() -> Iterator[tuple[Path, str]]:
    """Every derived document with the text it should have."""
    yield REFERENCE, reference()
    yield ERRORS, errors()
    if README.exists():
        yield README, readme(README.read_text(encoding="utf-8"))
    yield OPERATING, operating(OPERATING.read_text(encoding="utf-8"))
    yield from benchmark_documents(table)


def outdated() -> list[str]:
    """The documents that do not say what the code says."""
    return [
        path.relative_to(ROOT).as_posix()
        for path, text in documents()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something is out of date")
    if parser.parse_args().check:
        for name in outdated():
            print(f"{name} is out of date: run python scripts/render_docs.py")
        return 1 if outdated() else 0
    for path, text in documents():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
