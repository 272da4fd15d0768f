"""The application: one route per operation, and the few that are about the server itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from neuronpedia_inference import __version__
from neuronpedia_inference.errors import Conflict, InvalidRequest, NotReady, Unavailable
from neuronpedia_inference.operations import (
    OPERATIONS,
    Operation,
    answer_events_json,
    answer_pieces,
    validate,
    validate_texts,
)
from neuronpedia_inference.schemas.common import Wire
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.tensor_files import MEDIA_TYPE
from neuronpedia_inference.web import pages
from neuronpedia_inference.web.answers import json_response, problem_of
from neuronpedia_inference.web.auth import SecretGate
from neuronpedia_inference.web.body import Bodies
from neuronpedia_inference.web.boundary import ID_HEADER, Boundary, RequestScope, note_problem
from neuronpedia_inference.web.browsers import BrowserGate
from neuronpedia_inference.web.dialects import DIALECTS
from neuronpedia_inference.web.openapi import TITLE
from neuronpedia_inference.web.paths import unrouted
from neuronpedia_inference.web.pieces import PiecedAnswer
from neuronpedia_inference.web.sse import EventStream, while_connected
from neuronpedia_inference.web.stopping import EndsWithServer, Inside
from neuronpedia_inference.web.words import error_response

if TYPE_CHECKING:
    from neuronpedia_inference.runtime import Runtime

GetRuntime = Callable[[], "Runtime"]
Body = dict[str, Any] | Wire
Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    settings: Settings, get_runtime: GetRuntime, *, own_hosts: Sequence[str] = (), inside: Inside | None = None
) -> FastAPI:
    """`get_runtime` raises NotReady until the model is loaded; `inside` ends requests when the server does.

    own_hosts: names of the server beside ALLOWED_HOSTS.
    """
    layers = _layers(settings, own_hosts, inside or Inside())
    app = FastAPI(
        title=TITLE,
        version=__version__,
        redirect_slashes=False,
        middleware=layers,
        openapi_url=None,
        routes=pages.routes(settings.send_timeout_s),
    )
    bodies = Bodies(settings.max_body_bytes, settings.receive_timeout_s)
    app.add_exception_handler(HTTPException, _answer_unrouted)
    for operation in OPERATIONS:
        handler = _handler(operation, settings, bodies, get_runtime)
        app.add_api_route(operation.path, handler, methods=[operation.method], name=operation.name)
    _add_service_routes(app, get_runtime)
    return app


def _layers(settings: Settings, own_hosts: Sequence[str], inside: Inside) -> list[Middleware]:
    """Outermost first: every answer has its id, and unless its page may not call at all its CORS headers."""
    return [
        Middleware(RequestScope),
        Middleware(BrowserGate, settings=settings, own_hosts=own_hosts),
        Middleware(
            CORSMiddleware,
            allow_origins=["*"],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER, "Retry-After"],
        ),
        # Level 6 gains a tenth in size on numbers and takes six times as long, on the event loop.
        Middleware(GZipMiddleware, minimum_size=1000, compresslevel=1),
        Middleware(Boundary),
        Middleware(EndsWithServer, inside=inside),
        Middleware(SecretGate, secret=settings.secret, file=settings.read_secrets(), open_paths=pages.ASSETS),
    ]


def _handler(operation: Operation[Any], settings: Settings, bodies: Bodies, get_runtime: GetRuntime) -> Handler:
    """body limit → JSON → schema → operation; the secret was checked before."""

    async def handle(request: Request) -> Response:
        body = await read(request)
        runtime = loaded(body)
        if isinstance(body, dict) and operation.streams(body):
            events = await while_connected(request.receive, answer_events_json(operation, body, runtime))
            return EventStream(events, settings.send_timeout_s, DIALECTS[operation.dialect])
        accepted = request.headers.get("accept", "")
        accepts_tensors = MEDIA_TYPE in accepted and "application/json" not in accepted
        answered = answer_pieces(operation, body, runtime, accepts_tensors=accepts_tensors)
        pieces = await while_connected(request.receive, answered)
        return PiecedAnswer(pieces, settings.send_timeout_s)

    async def read(request: Request) -> Body:
        """A request is counted by its operation, and here if its body cannot be read; never while the model loads."""
        with ExitStack() as if_unread:
            with suppress(NotReady):
                if_unread.enter_context(get_runtime().metrics.request(operation.name, left=ClientDisconnect))
            body = _fields(operation, request) if operation.method == "GET" else await bodies.object(request, operation)
            if_unread.pop_all()
            return body

    def loaded(body: Body) -> Runtime:
        try:
            return get_runtime()
        except NotReady:
            validate(operation, body)  # what is wrong anyway is said at once
            raise

    return handle


def _fields(operation: Operation[Any], request: Request) -> Wire:
    """What the path and the query say. Raises InvalidRequest for a field given twice, InvalidBody."""
    pairs = [*request.path_params.items(), *request.query_params.multi_items()]
    twice = next((name for name, times in Counter(name for name, _ in pairs).items() if times > 1), None)
    if twice is not None:
        raise InvalidRequest(f"{twice[:80]!r} is given twice: once will do")
    return validate_texts(operation, dict(pairs))


async def _answer_unrouted(request: Request, exc: Exception) -> Response:
    """Of unknown paths and methods. The answer names the near ones."""
    assert isinstance(exc, HTTPException)
    if exc.status_code in (404, 405):
        exc = HTTPException(
            exc.status_code, unrouted(request.method, request.url.path, request.app.routes), exc.headers
        )
    problem = problem_of(exc)
    note_problem(request.scope, problem, exc)
    return error_response(problem, request.scope)


def _add_service_routes(app: FastAPI, get_runtime: GetRuntime) -> None:
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    async def ready() -> dict[str, str]:
        runtime = get_runtime()
        if not runtime.healthy:
            raise Unavailable("The device has failed or the worker has died; this process has to be replaced")
        return {"status": "ready", "model": runtime.model.id}

    async def capabilities() -> Response:
        return json_response(get_runtime().describe())

    async def metrics() -> Response:
        text, content_type = get_runtime().metrics.text()
        return Response(text, media_type=content_type)

    async def initialize() -> NoReturn:
        raise Conflict(
            "A running server keeps its model: restart it with other settings, such as MODEL_ID or CUSTOM_HF_MODEL_ID"
        )

    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/ready", ready, methods=["GET", "HEAD"])
    app.add_api_route("/v1/capabilities", capabilities, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/initialize", initialize, methods=["POST"], response_model=None)
