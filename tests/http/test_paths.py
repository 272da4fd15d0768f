"""Who asks for what is not there is told what is near, over a real port."""

from __future__ import annotations

import httpx
import pytest

from tests.http.served import Served


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nothing", 404, "See GET /v1/capabilities and GET /docs."),
        ("POST", "/", 405, "/ is asked by GET, not by POST."),
        ("GET", "/v1", 404, "See GET /v1/capabilities"),
        ("GET", "/nothing/at/all", 404, "See GET /v1/capabilities"),
        ("POST", "/v1/top_k", 404, "Did you mean POST /v1/top-k"),
        ("POST", "/v1/top-k/", 404, "Did you mean POST /v1/top-k"),
        ("POST", "/top-k", 404, "Did you mean POST /v1/top-k"),
        ("POST", "/v1/activation/singel", 404, "POST /v1/activation/single"),
        ("POST", "/v1/Steer/completion_chat", 404, "Did you mean POST /v1/steer/completion-chat"),
        ("GET", "/healthz", 404, "Did you mean GET /health"),
        ("GET", "/v1/steer", 405, "/v1/steer is asked by POST, not by GET."),
        ("POST", "/v1/capabilities", 405, "/v1/capabilities is asked by GET, not by POST."),
        ("DELETE", "/health", 405, "/health is asked by GET, not by DELETE."),
    ],
)
def test_near_paths(server: Served, method: str, path: str, status: int, says: str) -> None:
    answer = httpx.request(method, server.url + path, timeout=600)
    assert answer.status_code == status
    assert says in answer.json()["error"]
    assert (status == 405) == ("allow" in answer.headers)
