"""What a person wants to know about a request: its fields as rows of a table, and an example."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from neuronpedia_inference.schemas.common import Wire


@dataclass(frozen=True)
class FieldRow:
    name: str
    type: str
    default: str
    """Empty for a required field."""
    meaning: str


def fields_of(model: type[Wire]) -> list[FieldRow]:
    """One row per field, in snake_case; the fields of a nested object follow as `outer.inner`, once where it nests."""
    schema = model.model_json_schema(by_alias=False)
    return _rows(schema, schema.get("$defs", {}), "", ())


def example_of(model: type[Wire]) -> dict[str, Any]:
    """The model's first example, in snake_case; empty if it has none."""
    examples = model.model_json_schema(by_alias=False).get("examples", [{}])
    return {name: examples[0][name] for name in model.model_fields if name in examples[0]}


def _rows(schema: dict[str, Any], known: dict[str, Any], prefix: str, around: tuple[str, ...]) -> list[FieldRow]:
    """around: names of the objects that this one is inside."""
    required = schema.get("required", [])
    rows: list[FieldRow] = []
    for name, about in schema["properties"].items():
        default = "" if name in required else json.dumps(about.get("default"))
        rows.append(FieldRow(prefix + name, _type(about), default, about.get("description", "")))
        for inner in _objects_in(about, known):
            if inner not in around:
                rows.extend(_rows(known[inner], known, f"{prefix}{name}.", (*around, inner)))
    return rows


def _type(about: dict[str, Any]) -> str:
    several = about.get("anyOf") or about.get("oneOf")
    if several:
        return " or ".join(dict.fromkeys(map(_type, several)))
    if "enum" in about:
        return ", ".join(map(str, about["enum"]))
    if "$ref" in about:
        return "object"
    kind = about.get("type", "any")
    if kind == "array":
        return f"list of {_type(about.get('items', {}))}{_bounds(about)}"
    return kind + _bounds(about)


def _bounds(about: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    known = [(sign, about[key]) for key, sign in signs.items() if key in about]
    bounds = [f"{sign} {int(bound) if bound == int(bound) else bound}" for sign, bound in known]
    bounds += [f"{sign} {about[key]} items" for key, sign in (("minItems", "≥"), ("maxItems", "≤")) if key in about]
    return f" ({', '.join(bounds)})" if bounds else ""


def _objects_in(about: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Names of what a field may hold."""
    parts = [about, about.get("items", {}), *about.get("anyOf", [])]
    parts += [part.get("items", {}) for part in about.get("anyOf", [])]
    names = [part["$ref"].rsplit("/", 1)[1] for part in parts if "$ref" in part]
    return [name for name in dict.fromkeys(names) if "properties" in known[name]]
