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

EXAMPLES = 6
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
MULTIPLIED = {"strengths", "seeds", "steerings", "continuations"}
UNASKED = {
    "/v1/chat/completions": {"max_tokens": 2},
    "/v1/completions": {"max_tokens": 2},
    "/v1/sweep": {"max_new_tokens": 2},
}
"""What would be many tokens if it were left out."""

OPENAI = {openapi_path(operation) for operation in OPERATIONS if operation.dialect == "openai"}

api = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def base_url(server: Served) -> str:
    return server.url


def shortened(body: Any) -> Any:
    """The same question about fewer tokens: generating takes the time that the random search should have."""
    if not isinstance(body, dict):
        return body
    fewer = {key: min(value, 2) if key in COUNTS and type(value) is int else value for key, value in body.items()}
    return {key: value[:2] if key in MULTIPLIED and isinstance(value, list) else value for key, value in fewer.items()}


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
    if isinstance(case.body, dict):
        case.body = {**UNASKED.get(case.path, {}), **case.body}
    answer = case.call(base_url=base_url)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert isinstance(error["message"] if case.path in OPENAI else error, str)
