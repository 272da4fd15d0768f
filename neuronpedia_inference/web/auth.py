"""The secret, or one of several with names, as `X-SECRET-KEY` or as `Authorization: Bearer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from hmac import compare_digest

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.errors import Unauthorized
from neuronpedia_inference.secrets_file import SecretsFile
from neuronpedia_inference.web.boundary import CALLER

HEADER = "X-SECRET-KEY"
BEARER = "bearer "
OPEN_PATHS = frozenset({"/health", "/ready"})
"""What tells nothing of the model; beside them what is the same for every deployment: see `pages`."""


class SecretGate:
    """Lets a request through when it knows the secret, asks for an open path, or is a browser's preflight."""

    def __init__(
        self,
        app: ASGIApp,
        secret: SecretStr | None,
        file: SecretsFile | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        """open_paths: further ones."""
        self.app = app
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._is_guarded = secret is not None or file is not None
        self._own = [(digest, "") for digest in _digests(secret.get_secret_value())] if secret else []
        self._file = file
        self._named: Mapping[str, str] = {}
        self._accepted = self._own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_guarded and not self._is_open(scope):
            scope[CALLER] = self._caller(scope)
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> str:
        """The name that belongs to the secret, empty for SECRET. Raises Unauthorized."""
        if self._file is not None and self._file.named() is not self._named:
            self._named = self._file.named()
            named = [(digest, name) for name, secret in self._named.items() for digest in _digests(secret)]
            self._accepted = [*self._own, *named]
        found = [self._name_of(one) for one in _given(Headers(scope=scope)) or [b""]]
        if None in found:
            raise Unauthorized(f"Invalid or missing {HEADER} header")
        return next(filter(None, found), "")

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in self._open_paths

    def _name_of(self, given: bytes) -> str | None:
        """Digests have one length and every one is compared, so the time tells nothing about the secrets."""
        sent = sha256(given).digest()
        matches = [name for digest, name in self._accepted if compare_digest(sent, digest)]
        return matches[0] if matches else None


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
