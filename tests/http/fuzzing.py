"""What requests made at random are made from and looked at for; schemathesis reads its hooks here."""

from __future__ import annotations

from typing import Any

import schemathesis

from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.web.openapi import document, openapi_path

COUNTS = {
    "nCompletionTokens",
    "n_completion_tokens",
    "maxNewTokens",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
    "maxTokens",
    "maxCompletionTokens",
    "num_completion_tokens",
    "numCompletionTokens",
    "n",
}
UNASKED = {
    "/v1/chat/completions": {"max_tokens": 1},
    "/v1/completions": {"max_tokens": 1},
    "/v1/sweep": {"max_new_tokens": 1},
}
"""What would be many tokens if it were left out, of those that write several texts."""

OPENAI = {openapi_path(operation) for operation in OPERATIONS if operation.dialect == "openai"}


def as_json() -> dict[str, Any]:
    """The document, with bodies as JSON alone."""
    described = document()
    for operation in (about for item in described["paths"].values() for about in item.values()):
        content = operation.get("requestBody", {}).get("content", {})
        content.pop("application/x-safetensors", None)
    return described


def shortened(body: dict[str, Any]) -> dict[str, Any]:
    """The same question about fewer tokens: generating takes the time that the random search should have."""
    return {key: min(value, 2) if key in COUNTS and type(value) is int else value for key, value in body.items()}


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    if not isinstance(case.body, dict):
        return
    case.body = shortened(case.body)
    if case.path in UNASKED:
        given = {key: value for key, value in case.body.items() if value is not None}
        few = {key: value[:2] if isinstance(value, list) else value for key, value in given.items()}
        case.body = {**UNASKED[case.path], **few}


@schemathesis.check
def errors_are_said(_context: Any, response: Any, case: Any) -> None:
    """Whatever cannot be answered is, in a sentence."""
    if response.status_code >= 400:
        error = response.json()["error"]
        assert isinstance(error["message"] if case.path in OPENAI else error, str)
