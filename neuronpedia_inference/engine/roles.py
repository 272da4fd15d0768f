"""Which roles of a chat a template knows: most render any word, and a model has learnt nothing of most words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from jinja2 import Environment, TemplateSyntaxError, nodes

COMMON = ("assistant", "developer", "model", "system", "tool", "user")
"""Roles of chats in general. A template that wants fewer says so itself."""

_ENVIRONMENT = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""A tag that transformers adds to the language."""


@cache
def roles_of(template: str) -> tuple[str, ...]:
    """The common roles and those that the template compares a message's role with, in alphabetical order.

    Of a template that cannot be read the common ones alone: rendering says what is wrong with it.
    """
    try:
        tree = _ENVIRONMENT.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:
        return COMMON
    compared = (side for one in tree.find_all(nodes.Compare) if _is_about_roles(one) for side in _sides(one))
    return tuple(sorted({*COMMON, *(name for side in compared for name in _texts(side))}))


def _sides(compare: nodes.Compare) -> list[nodes.Expr]:
    return [compare.expr, *(operand.expr for operand in compare.ops)]


def _is_about_roles(compare: nodes.Compare) -> bool:
    return any(_is_role(side) for side in _sides(compare))


def _is_role(side: nodes.Expr) -> bool:
    """`message.role`, `message['role']`, or a variable of that name."""
    match side:
        case nodes.Getattr(attr="role") | nodes.Name(name="role") | nodes.Getitem(arg=nodes.Const(value="role")):
            return True
    return False


def _texts(side: nodes.Expr) -> Iterator[str]:
    """Of a text, or a list of them."""
    items = side.items if isinstance(side, nodes.List | nodes.Tuple) else [side]
    for item in items:
        if isinstance(item, nodes.Const) and isinstance(item.value, str):
            yield item.value
