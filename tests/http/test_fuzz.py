"""Requests made at random from the OpenAPI document: whatever is sent, the server never fails."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from served import Served

from neuronpedia_inference.operations import OPERATIONS
from neuronpedia_inference.web.openapi import document, openapi_path

EXAMPLES = 4
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


@pytest.fixture(scope="module")
def base_url(server: Served) -> str:
    return server.url


def shortened(body: Any) -> Any:
    """The same question about fewer tokens: generating takes the time that the random search should have."""
    if not isinstance(body, dict):
        return body
    return {key: min(value, 2) if key in COUNTS and type(value) is int else value for key, value in body.items()}


def as_json() -> dict[str, Any]:
    """The document, with bodies as JSON alone."""
    described = document()
    for operation in (about for item in described["paths"].values() for about in item.values()):
        content = operation.get("requestBody", {}).get("content", {})
        content.pop("application/x-safetensors", None)
    return described


api = schemathesis.openapi.from_dict(as_json())


@api.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
def test_no_request_makes_the_server_fail(case: Any, base_url: str) -> None:
    case.body = shortened(case.body)
    if isinstance(case.body, dict) and case.path in UNASKED:
        given = {key: value for key, value in case.body.items() if value is not None}
        few = {key: value[:2] if isinstance(value, list) else value for key, value in given.items()}
        case.body = {**UNASKED[case.path], **few}
    answer = case.call(base_url=base_url)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert isinstance(error["message"] if case.path in OPENAI else error, str)
