"""Parts that edits and conditions are written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from neuronpedia_inference.schemas.common import Name, Ours, SourceName
from neuronpedia_inference.schemas.vectors import BEGINNINGS


def problem(what: str) -> PydanticCustomError:
    """That fields do not fit together, for a validator to raise."""
    return PydanticCustomError("unfit", "{what}", {"what": what})


def with_keywords(fields: Mapping[str, tuple[Any, Any, str]], base: type[Ours] = Ours) -> Any:
    """`base` and more fields, whose names on the wire are words that Python has taken.

    fields: type, default (with None, null is allowed) and description of each.
    """
    given: Any = {
        name: (kind | None if default is None else kind, Field(default=default, description=description))
        for name, (kind, default, description) in fields.items()
    }
    return create_model("With" + "".join(name.title() for name in fields), __base__=base, __module__=__name__, **given)


class FeatureAddress(Ours):
    """A feature by its source and index."""

    source: SourceName
    index: int = Field(ge=0, description="Index of the feature in its source.")


def _named(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(BEGINNINGS):
        raise problem("it begins like a vector, not like a feature")
    if isinstance(value, str | Mapping | FeatureAddress):
        return value
    raise problem('a feature is a text, "source/index", or an object with source and index')


A_FEATURE = (
    'A feature: "15-res-4k/1113", a Neuronpedia address such as "gpt2-small/7-res-jb/42", or an object with `source` '
    "and `index`."
)
FeatureName = Annotated[Name | FeatureAddress, BeforeValidator(_named)]
