"""Settings of a command: the environment, its options, and `--set`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuronpedia_inference.cli.output import fail, note
from neuronpedia_inference.errors import unknown_name
from neuronpedia_inference.exits import WRONG_USAGE

if TYPE_CHECKING:
    from neuronpedia_inference.settings import Settings

SECRETS = ("SECRET", "SENTRY_DSN")

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as TOKEN_LIMIT=400. Repeatable."),
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model to load: a short or Hugging Face name, or a folder. (MODEL_ID)")
]
SetsOption = Annotated[
    str | None, typer.Option(help='SAE source sets, such as "res-jb", separated by blanks; "[]" for none. (SAE_SETS)')
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, mps, cuda or cuda:N. (DEVICE)")]


def settings_of(assignments: list[str] | None, *, without: Sequence[str] = (), **options: Any) -> Settings:
    """The environment, overridden by options that were given, overridden by `--set`. Raises StartupError.

    Variables that are nearly settings are told on standard error.

    without: fields that get their defaults, whatever the environment says.
    """
    from neuronpedia_inference.settings import Settings, given_names, near_misses

    for miss in near_misses(given_names()):
        note(miss)
    given = {field: Settings.model_fields[field].get_default() for field in without}
    given |= {field: value for field, value in options.items() if value is not None}
    for assignment in assignments or ():
        field, value = _assigned(assignment)
        given[field] = value
    return Settings.read(**{_key(field): value for field, value in given.items()})


def _assigned(assignment: str) -> tuple[str, Any]:
    """`NAME=VALUE` as a field and its value."""
    from neuronpedia_inference.settings import Settings, variable

    name, equals, value = assignment.partition("=")
    fields = {variable(field): field for field in Settings.model_fields}
    name = name.strip().upper()
    if not equals:
        fail(f"--set {assignment}: write it as NAME=VALUE", WRONG_USAGE)
    if name not in fields:
        fail(f"--set: {unknown_name('setting', name, fields)}", WRONG_USAGE)
    if name in SECRETS:
        fail(
            f"--set {name}: secrets are read from the environment only, other users can see command lines", WRONG_USAGE
        )
    field = fields[name]
    return field, _parsed(value) if field == "model_from_pretrained_kwargs" else value


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value  # the setting's own type then says what is wrong


def _key(field: str) -> str:
    """A field goes by its alias where it has one: by its name it would lose against the environment."""
    from neuronpedia_inference.settings import Settings

    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else field
