"""Which web pages may call the server, and by which names it is called."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from served import MODEL, SECRET, Serve, Served, on_a_port, small_settings

from neuronpedia_inference.runtime import Runtime
from neuronpedia_inference.web.app import create_app

BODY = {"model": MODEL, "text": "Hi"}
FOREIGN = "https://evil.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}


def asked(client: httpx.Client, **headers: str) -> httpx.Response:
    return client.post("/v1/tokenize", json=BODY, headers=headers)


def refused(answer: httpx.Response) -> str:
    """What a browser shows the page, which is nothing: its origin is not named."""
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    return answer.json()["error"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.5:5002", "0.0.0.0", ""]
)
def test_a_name_that_was_made_to_point_here_is_refused(http: httpx.Client, host: str) -> None:
    assert "ALLOWED_HOSTS" in refused(asked(http, Host=host))
    assert "ALLOWED_HOSTS" in refused(http.get("/v1/capabilities", headers={"Host": host}))


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "127.1.2.3:99", "[::1]:5002", "LOCALHOST"])
def test_loopback_is_answered(http: httpx.Client, host: str) -> None:
    assert asked(http, Host=host).json()["tokens"]


@pytest.mark.parametrize(
    "origin", [FOREIGN, "null", "http://localhost.evil.example", "file://", "http://10.0.0.5:5002"]
)
def test_pages_of_others_can_neither_drive_nor_read(http: httpx.Client, origin: str) -> None:
    assert "ALLOWED_ORIGINS" in refused(asked(http, Origin=origin))
    assert "ALLOWED_ORIGINS" in refused(http.options("/v1/tokenize", headers={"Origin": origin, **PREFLIGHT}))
    plain = {"Origin": origin, "Content-Type": "text/plain"}  # what a page may send without asking first
    refused(http.post("/v1/tokenize", content=b"{}", headers=plain))


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:5002", "https://[::1]"])
def test_pages_of_this_machine_may_call(http: httpx.Client, origin: str) -> None:
    answer = asked(http, Origin=origin)
    assert answer.json()["tokens"]
    assert answer.headers["access-control-allow-origin"] == "*"
    assert http.options("/v1/tokenize", headers={"Origin": origin, **PREFLIGHT}).status_code == 200


def test_what_is_allowed_beside(runtime: Runtime, serve: Serve) -> None:
    allowed: dict[str, Any] = {"allowed_hosts": "Box.lan *.inner.org", "allowed_origins": "https://page.org/"}
    with serve(small_settings(**allowed), lambda: runtime).client() as client:
        for host in ("box.lan", "BOX.lan:5002", "a.inner.org"):
            assert asked(client, Host=host).json()["tokens"]
        for host in ("inner.org", "xbox.lan", "evilinner.org"):
            refused(asked(client, Host=host))
        assert asked(client, Origin="https://page.org").json()["tokens"]
        assert asked(client, Host="box.lan:5002", Origin="http://box.lan:5002").json()["tokens"], "its own page"
        for origin in ("http://page.org", "https://page.org:444", "http://box.lan"):
            refused(asked(client, Host="box.lan:5002", Origin=origin))


def test_everything_can_be_allowed(runtime: Runtime, serve: Serve) -> None:
    with serve(small_settings(allowed_hosts="*", allowed_origins="*"), lambda: runtime).client() as client:
        assert asked(client, Host="evil.example", Origin="null").json()["tokens"]


def test_with_a_secret_neither_matters(locked_server: Served) -> None:
    with locked_server.client(SECRET) as client:
        assert asked(client, Host="evil.example", Origin=FOREIGN).json()["tokens"]


def test_with_a_secret_what_is_named_is_kept_to(runtime: Runtime, serve: Serve) -> None:
    settings = small_settings(secret=SECRET, allowed_origins="https://page.org")
    with serve(settings, lambda: runtime).client(SECRET) as client:
        assert asked(client, Host="any.example", Origin="https://page.org").json()["tokens"]
        refused(asked(client, Host="any.example", Origin=FOREIGN))


def test_a_door_may_name_itself(runtime: Runtime) -> None:
    """As the door on Modal does: without a key its web address is answered, and its own pages."""
    app = create_app(small_settings(), lambda: runtime, own_hosts=("*.modal.run",))
    with on_a_port(app, 60.0) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        assert asked(client, Host="x--y.modal.run").json()["tokens"]
        assert asked(client, Host="x--y.modal.run", Origin="https://x--y.modal.run").json()["tokens"]
        refused(asked(client, Host="x--y.modal.run", Origin=FOREIGN))
        refused(asked(client, Host="x--y.modal.run.evil.example"))
