"""Asking a running server: what `neuronpedia-inference call --url` needs, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from pydantic import SecretStr

from neuronpedia_inference.errors import InvalidRequest, Unavailable
from neuronpedia_inference.web.auth import HEADER

TIMEOUT_S = 600


def ask(url: str, path: str, body: Mapping[str, Any] | None, secret: SecretStr | None) -> Iterator[dict[str, Any]]:
    """The answer, or the events of a stream as they come. Without a body it is a GET.

    Raises InvalidRequest with the server's own words, or Unavailable where nobody answers.
    """
    headers = {"Content-Type": "application/json"}
    if secret is not None:
        headers[HEADER] = secret.get_secret_value()
    try:
        sent = None if body is None else json.dumps(body).encode()
        request = Request(url.rstrip("/") + path, sent, headers, method="GET" if body is None else "POST")
        with urlopen(request, timeout=TIMEOUT_S) as response:
            yield from _answers(response)
    except HTTPError as exc:
        raise InvalidRequest(_words(exc)) from None
    except (URLError, HTTPException, OSError) as exc:
        reason = getattr(exc, "reason", None) or exc
        raise Unavailable(f"No answer from {url}: {reason}") from None
    except ValueError as exc:
        raise InvalidRequest(f"Cannot ask {url}: {exc}") from None


def _answers(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    if response.headers.get_content_type() != "text/event-stream":
        yield json.load(response)
        return
    for line in response:
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise InvalidRequest(_sentence(event))
            yield event


def _words(exc: HTTPError) -> str:
    try:
        return _sentence(json.load(exc))
    except (ValueError, TypeError, KeyError):
        return f"The server answered {exc.code} {exc.reason}"


def _sentence(body: dict[str, Any]) -> str:
    return f"{body['error']} (code {body.get('code', '?')}, request id {body.get('request_id', '?')})"
