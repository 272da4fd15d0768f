"""What web pages may do here.

A browser lets any page send requests to a server on its user's machine. The page's `Origin` says whose they are. A page
whose name was made to point at this machine (DNS rebinding) has no foreign origin, but gives itself away by its `Host`.
With a SECRET neither matters, because no page knows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from neuronpedia_inference.errors import Forbidden
from neuronpedia_inference.settings import Settings
from neuronpedia_inference.web.answers import problem_of
from neuronpedia_inference.web.boundary import note_problem
from neuronpedia_inference.web.words import error_response

ANY = ("*",)


class BrowserGate:
    """Refuses hosts and origins that are not allowed, a browser's preflight included."""

    def __init__(self, app: ASGIApp, settings: Settings, own_hosts: Iterable[str] = ()) -> None:
        """own_hosts: further names of this server."""
        unset = ANY if settings.is_guarded else ()
        self.app = app
        self._hosts = _lowered((*(settings.allowed_hosts or unset), *_named(settings.server_host), *own_hosts))
        self._origins = _lowered(settings.allowed_origins or unset)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except Forbidden as exc:
                problem = problem_of(exc)
                note_problem(scope, problem, exc)
                await error_response(problem, scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        """Raises Forbidden."""
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        if not self._is_host_allowed(_name_of(host)):
            raise Forbidden(
                f"This server does not answer as {host[:100]!r}. Ask it by a loopback address, start it with that name "
                "in ALLOWED_HOSTS, or set a SECRET."
            )
        if origin and not self._is_origin_allowed(origin, host):
            raise Forbidden(
                f"Pages of {origin[:100]!r} may not call this server. Start it with that origin in ALLOWED_ORIGINS, or "
                "set a SECRET."
            )

    def _is_host_allowed(self, name: str) -> bool:
        return _is_loopback(name) or any(
            known in ("*", name) or (known.startswith("*.") and name.endswith(known[1:])) for known in self._hosts
        )

    def _is_origin_allowed(self, origin: str, host: str) -> bool:
        """host: as the request names it, which is allowed."""
        if "*" in self._origins or origin in self._origins:
            return True
        scheme, _, place = origin.partition("://")
        return scheme in ("http", "https") and (place == host or _is_loopback(_name_of(place)))


def _named(address: str) -> tuple[str, ...]:
    """A name for callers; "all addresses" is none."""
    return () if address in ("0.0.0.0", "::") else (address,)


def _lowered(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower().rstrip("/") for name in names)


def _name_of(place: str) -> str:
    """A host without its port."""
    if place.startswith("["):
        return place[1:].partition("]")[0]
    return place.rpartition(":")[0] if ":" in place else place


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
