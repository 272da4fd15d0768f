"""What is said to who asks for a path that the server has not, or by another method than it has."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route

SHOWN = 200
"""Characters of a path that are looked at: callers may send tens of thousands."""
START = ("/v1/capabilities", "/docs")
"""Where somebody who asks for nothing in particular should look."""


def unrouted(method: str, path: str, routes: Sequence[BaseRoute]) -> str:
    """One or two sentences with the nearest paths and their methods."""
    methods = {route.path: sorted(set(route.methods or ()) - {"HEAD"}) for route in routes if isinstance(route, Route)}
    shown = path[:SHOWN]
    pattern = next((route.path for route in routes if isinstance(route, Route) and route.path_regex.match(path)), None)
    if pattern is not None:
        return f"{shown} is asked by {' or '.join(methods[pattern])}, not by {method[:20]}."
    by_form = {_form(route.path): route.path for route in routes if isinstance(route, APIRoute)}
    near = [by_form[form] for form in get_close_matches(_form(shown), list(by_form), n=3, cutoff=0.7)]
    if not near:
        return f"The server has no path {shown!r}. See {' and '.join(f'GET {one}' for one in START)}."
    named = " or ".join(f"{' or '.join(methods[one])} {one}" for one in near)
    return f"The server has no path {shown!r}. Did you mean {named}?"


def _form(path: str) -> str:
    """Without what is easily mistaken: hyphens, underscores, capitals, a slash at the end, the version."""
    return path.lower().replace("_", "-").rstrip("/").removeprefix("/v1").removeprefix("/api") or "/"
