"""In whose words errors are told: our own, or on OpenAI's routes OpenAI's."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.operations.operation import IN_PATH
from neuronpedia_inference.web.answers import Problem, json_response
from neuronpedia_inference.web.dialects import OPENAI, Dialect

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


def error_response(problem: Problem, scope: Scope) -> Response:
    if not _is_openai(scope):
        return json_response(problem.body(), problem.status, problem.headers)
    return json_response(openai_error(problem), openai_status(problem.status), problem.headers)


def error_event(problem: Problem, scope: Scope, dialect: Dialect) -> bytes:
    """For a stream that has begun."""
    return OPENAI.error(openai_error(problem)) if _is_openai(scope) else dialect.error(problem.body())


def openai_status(status: int) -> int:
    """What does not fit the schema is a 400 there."""
    return 400 if status == 422 else status


def openai_error(problem: Problem) -> dict[str, Any]:
    """The body of an answer."""
    kind = KINDS.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    detail = problem.beside.get("detail")
    where = [".".join(map(str, entry["loc"][1:])) for entry in detail] if isinstance(detail, list) else []
    param = next(filter(None, where), None)
    return {"error": {"message": problem.message, "type": kind, "param": param, "code": problem.code}}


def _is_openai(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return any(pattern.fullmatch(path) for pattern in _patterns())


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    paths = (operation.path for operation in OPERATIONS if operation.dialect == "openai")
    return tuple(re.compile(IN_PATH.sub(".+", path)) for path in paths)
