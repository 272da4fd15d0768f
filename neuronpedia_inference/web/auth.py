"""The secret, as `X-SECRET-KEY` or as `Authorization: Bearer`."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.errors import Unauthorized

HEADER = "X-SECRET-KEY"
BEARER = "bearer "
OPEN_PATHS = frozenset({"/health", "/ready"})
"""What tells nothing of the model; beside them what is the same for every deployment: see `pages`."""


class SecretGate:
    """Lets a request through when it knows the secret, asks for an open path, or is a browser's preflight."""

    def __init__(self, app: ASGIApp, secret: SecretStr | None, open_paths: Iterable[str] = ()) -> None:
        """open_paths: further ones."""
        self.app = app
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._accepted = _digests(secret.get_secret_value()) if secret else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._accepted and not self._is_open(scope):
            self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        matches = [self._is_right(one) for one in _given(Headers(scope=scope)) or [b""]]
        if not all(matches):
            raise Unauthorized(f"Invalid or missing {HEADER} header")

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in self._open_paths

    def _is_right(self, given: bytes) -> bool:
        """Digests have one length and every one is compared, so the time tells nothing about the secret."""
        matches = [compare_digest(sha256(given).digest(), digest) for digest in self._accepted]
        return any(matches)


def _given(headers: Headers) -> list[bytes]:
    """Every secret that was sent: all of them must be right. Other kinds of authorization are somebody else's."""
    bearers = [value[len(BEARER) :].strip() for value in headers.getlist("Authorization") if _is_bearer(value)]
    return [value.encode("latin-1") for value in (*headers.getlist(HEADER), *bearers)]


def _is_bearer(value: str) -> bool:
    return value[: len(BEARER)].lower() == BEARER


def _digests(secret: str) -> tuple[bytes, ...]:
    """Of the forms in which clients send the secret: UTF-8 or Latin-1, without blanks at its ends.

    A secret of nothing but blanks cannot travel in a header: nobody gets in.
    """
    text = secret.strip() or secret
    forms = {text.encode("utf-8", "surrogateescape")}
    if all(ord(char) < 256 for char in text):
        forms.add(text.encode("latin-1"))
    return tuple(sha256(form).digest() for form in forms)
