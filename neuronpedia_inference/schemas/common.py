"""The base of every wire model, and the field types that several routes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from annotated_types import GroupedMetadata, MaxLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from neuronpedia_inference.errors import LimitExceeded, did_you_mean

SEED_LIMIT = 2**63
MOST_NAME = 80
"""Characters of a field that nobody knows, in a message."""

ALSO_SNAKE = "also_snake"
"""Mark of a field of an answer that is written in both words where the answer is in camelCase."""
IF_ANY = "if_any"
"""Mark of a field of an answer that is left out where it is null."""


class Wire(BaseModel):
    """A JSON object of the wire. Every field is read in snake_case and in camelCase; camelCase wins.

    Types are strict: no strings for numbers, no `1.0` for integers, no NaN. Unknown fields are ignored, but for `Ours`.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        loc_by_alias=False,
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        frozen=True,
    )


Reproducible = Annotated[
    bool,
    Field(
        description="The same bytes whatever else the server has to do and after a restart, on one machine and "
        "version: it runs by itself, more slowly. Otherwise numbers may differ in their last digits.",
    ),
]


class Ours(Wire):
    """A JSON object of a route of our own: fields that it does not know are refused, by the names that are near.

    Neuronpedia's routes ignore them, as its clients expect.
    """

    @model_validator(mode="before")
    @classmethod
    def _know_all(cls, body: Any) -> Any:
        if isinstance(body, Mapping):
            known = spellings(cls)
            unknown = list(islice((key for key in body if key not in known), 2))
            if unknown:
                raise PydanticCustomError("unknown_field", "{problem}", {"problem": cls._problem(unknown)})
        return body

    @classmethod
    def _problem(cls, unknown: Sequence[str]) -> str:
        first = str(unknown[0])[:MOST_NAME]
        is_camel = first != first.lower()
        near = did_you_mean(first, (to_camel(name) if is_camel else name for name in cls.model_fields))
        others = " (nor others of the body's)" if len(unknown) > 1 else ""
        return f"there is no field {first!r}{others}.{near or ' There are ' + ', '.join(cls.model_fields) + '.'}"


@cache
def spellings(model: type[Ours]) -> frozenset[str]:
    """Of its fields, in both words."""
    return frozenset(spelled for name in model.model_fields for spelled in (name, to_camel(name)))


class Reply(Wire):
    """A wire model that we fill ourselves: tuples may stand for arrays; numbers are checked when rendered."""

    model_config = ConfigDict(strict=False, allow_inf_nan=True, ser_json_inf_nan="constants")


@cache
def lists_of_objects(model: type[Wire]) -> dict[str, tuple[type[Wire], int]]:
    """Fields that hold lists of wire models: of which, and how many at the most."""
    found = {}
    for name, field in model.model_fields.items():
        for item, most in _lists_in(field.annotation, field.metadata):
            found[name] = (item, most)
    return found


def _lists_in(annotation: Any, metadata: Sequence[Any]) -> Iterator[tuple[type[Wire], int]]:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from _lists_in(inner, [*metadata, *more])
    elif get_origin(annotation) is list:
        [item] = get_args(annotation)
        bounds = [each.most for each in metadata if isinstance(each, AtMost)]
        bounds += [each.max_length for each in metadata if isinstance(each, MaxLen)]
        if isinstance(item, type) and issubclass(item, Wire):
            yield item, min(bounds)
    else:
        for part in get_args(annotation):
            yield from _lists_in(part, metadata)


def examples(*bodies: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """For `json_schema_extra`: example bodies (snake_case), spelled as the schema spells its properties."""

    def attach(schema: dict[str, Any]) -> None:
        known = schema.get("properties", {})
        schema["examples"] = [
            {key if key in known else to_camel(key): value for key, value in body.items()} for body in bodies
        ]

    return attach


def encodable(text: str) -> str:
    """The text. Raises ValueError where it holds what is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("Text holds a lone surrogate, which is not a character") from None
    return text


def _truncated(value: Any) -> Any:
    """3.7 → 3; whatever is not a finite float is left to the integer check."""
    return int(value) if isinstance(value, float) and math.isfinite(value) else value


EchoedText = Annotated[str, AfterValidator(encodable)]
"""Text that the answer repeats without tokenising it."""

Name = Annotated[str, AfterValidator(encodable), Field(max_length=512)]
"""A model, source, hook or role."""

Item = TypeVar("Item")

Many = Annotated[list[Item], Field(fail_fast=True)]
"""A caller's list. Only its first bad item is reported: millions of them would block the server for seconds."""


class AtMost(GroupedMetadata):
    """Bound of a list, looked at before any of its items. Beyond it LimitExceeded leaves the validation as it is."""

    def __init__(self, most: int, refusal: str = "{field}: {n} items are too many, the most is {most}. Send fewer."):
        self.most = most
        self.refusal = refusal

    def __iter__(self) -> Iterator[Any]:
        yield MaxLen(self.most)  # for the schema
        yield BeforeValidator(self._check)

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple) and len(value) > self.most:
            raise LimitExceeded(self.refusal.format(field=info.field_name, n=len(value), most=self.most))
        return value


MAX_BATCH = 4
"""Prompts of one request."""
MAX_NUMBERS = 2**16
"""Numbers in a vector, and positions to rank by."""
MAX_NAMES = 4096
"""Sources that are picked from a set."""

AtMostABatch = AtMost(MAX_BATCH, "Batch size {n} exceeds maximum of {most}")

_OF_MODEL = "Name of the model. One server holds one model, so this is checked only in strict mode."
ModelName = Annotated[Name, Field(description=_OF_MODEL)]
MaybeModelName = Annotated[Name | None, Field(description=_OF_MODEL)]
"""On our own routes, where it may be left out."""
SourceName = Annotated[
    Name,
    Field(
        description='Source of features: an SAE such as "10-res-4k", or a bare layer number such as "3" for '
        "the neurons of that layer's MLP.",
    ),
]
SourceSetName = Annotated[
    Name, Field(description='Source set, such as "res-4k"; "neurons" for the MLP neurons of every layer.')
]
NumResults = Annotated[
    Annotated[int, Field(ge=0)] | None,
    Field(description="Features returned at most; null means 25. What exceeds the server's MAX_RESULTS is cut to it."),
]
TopK = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Field(
        description="Features per token; null means 5. More than the server's MAX_TOP_K are refused; up to it, the "
        "number of features is the ceiling."
    ),
]
Seed = Annotated[
    int,
    BeforeValidator(_truncated),
    Field(ge=-SEED_LIMIT, lt=SEED_LIMIT),
    WithJsonSchema({"type": "number", "minimum": -SEED_LIMIT, "exclusiveMaximum": SEED_LIMIT}),
]
"""Any JSON number; fractions are cut off."""


class MayBeTensors(Wire):
    """A request whose answer may be a file of tensors."""

    format: Literal["json", "safetensors"] | None = Field(
        default=None, description="How to answer; null means as the `Accept` header says, which is JSON by default."
    )


class OnePrompt(Wire):
    """The prompt of a request."""

    prompt: str = Field(description="Text to run through the model.")


class SeveralPrompts(Wire):
    """The prompts of a batch request."""

    prompts: Annotated[Many[str], AtMostABatch] = Field(
        description="1 to 4 texts to run through the model. With more than one, each may be a quarter as long as a "
        "single text."
    )


class NPFeature(Wire):
    """One feature of one source."""

    model: ModelName
    source: SourceName
    index: int = Field(description="Index of the feature in its source.")
