"""Vectors as callers send them: a list of numbers, bytes in base64, or the digest of one that was sent before."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from neuronpedia_inference.domain import Numbers
from neuronpedia_inference.errors import LimitExceeded
from neuronpedia_inference.schemas.common import MAX_NUMBERS, AtMost, Many, Name, Ours, Reply, examples

BASE64, DIGEST, AXIS = "base64:", "vec:sha256:", "axis:"
BEGINNINGS = (BASE64, DIGEST, AXIS)
PUT_VECTORS = "PUT /v1/vectors"
FORM = re.compile(DIGEST + "[0-9a-f]{64}")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""Of bytes: numbers, of bfloat16 the upper half of a float32."""
MAX_AXIS = 128
"""Characters of the name of an axis."""
MAX_VECTORS = 64
"""Vectors of one request that are kept."""
ABOUT_TEXT = (
    '`"base64:float32:..."` (or float16, bfloat16: the bytes of the numbers, the lowest first), or the digest that '
    f'`{PUT_VECTORS}` gave, or `"axis:NAME"` of a persona axis that capabilities name.'
)


class VectorName(str):
    """Stands for a vector that the server has."""

    __slots__ = ()


class AxisName(VectorName):
    """`axis:` and the name of a persona axis."""

    __slots__ = ()


class Digest(VectorName):
    """`vec:sha256:` and the 64 digits of a vector that the server keeps."""

    __slots__ = ()


def widened(raw: bytes, dtype: str) -> Numbers:
    """The numbers of bytes in one of DTYPES, as float32."""
    read = np.frombuffer(raw, DTYPES[dtype])
    if dtype == "bfloat16":
        return (read.astype("<u4") << 16).view("<f4")
    return read.astype("<f4")


def from_base64(text: str) -> Numbers:
    """[n] in float32. Raises PydanticCustomError, LimitExceeded."""
    dtype, colon, digits = text.removeprefix(BASE64).partition(":")
    if not colon or dtype not in DTYPES:
        raise _unread(f"a text of base64 begins with one of {', '.join(f'{BASE64}{name}:' for name in DTYPES)}")
    item = DTYPES[dtype].itemsize
    if len(digits) > 4 * (-(-MAX_NUMBERS * item // 3)):
        raise LimitExceeded(f"A vector of {len(digits)} base64 digits has more than {MAX_NUMBERS} numbers, the most.")
    try:
        raw = base64.b64decode(digits, validate=True)
    except (binascii.Error, ValueError):
        raise _unread("what follows the type is not base64 (of the alphabet with + and /, padded with =)") from None
    if len(raw) % item:
        raise _unread(f"{len(raw)} bytes are no whole number of {dtype}s, of {item} bytes each")
    return finite(widened(raw, dtype))


def as_base64(numbers: Sequence[float] | Numbers) -> str:
    """As a request may send it, in float32."""
    return f"{BASE64}float32:" + base64.b64encode(np.asarray(numbers, "<f4").tobytes()).decode("ascii")


def finite(numbers: Numbers) -> Numbers:
    """The same. Raises PydanticCustomError for one that is not a number or infinite, also in float32."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(numbers, "<f4")
    is_finite = np.isfinite(narrow)
    if not is_finite.all():
        raise _unread(f"is not finite in float32 at position {int(is_finite.argmin())}")
    return narrow


def _unread(what: str) -> PydanticCustomError:
    return PydanticCustomError("unread_vector", "{what}", {"what": what})


def _in_a_request(value: Any, as_list: core_schema.ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, str):
        return as_list(value)
    if value.startswith(BASE64):
        return from_base64(value).tolist()
    if FORM.fullmatch(value):
        return Digest(value)
    if value.startswith(AXIS) and len(value) <= MAX_AXIS:
        return AxisName(value)
    raise _unread(
        f"a vector is a list of numbers, {BASE64}float32:..., {DIGEST} and 64 digits of 0-9a-f, or {AXIS} and a name"
    )


class _ListOrText:
    """How a vector is read; a text is told by how it begins, so that what is wrong is said of what was meant."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        as_list = handler.generate_schema(Annotated[Many[float], AtMost(MAX_NUMBERS)])
        return core_schema.no_info_wrap_validator_function(_in_a_request, as_list)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "string", "description": ABOUT_TEXT}]}


Vector = Annotated[list[float] | VectorName, _ListOrText()]
"""Read as numbers, but for a name, whose vector is where the server keeps it."""


def _to_keep(value: Any) -> bytes:
    """The numbers in float32, of what a JSON body or a file of tensors holds."""
    if isinstance(value, str) and value.startswith(BASE64):
        found = from_base64(value)
    elif isinstance(value, np.ndarray):
        found = finite(value)
    elif isinstance(value, list) and all(type(one) in (int, float) for one in value):
        found = finite(np.array(value, dtype=np.float64))
    else:
        raise _unread(f"a vector to keep is a list of numbers or {BASE64}float32:...")
    if not 0 < len(found) <= MAX_NUMBERS:
        raise _unread(f"has {len(found)} numbers, 1 to {MAX_NUMBERS} are taken")
    return found.tobytes()


class NamedVector(Ours):
    """A vector to keep."""

    name: Name = Field(description="What the answer calls it.")
    vector: Annotated[
        bytes,
        PlainValidator(_to_keep),
        WithJsonSchema(
            {"anyOf": [{"type": "array", "items": {"type": "number"}, "maxItems": MAX_NUMBERS}, {"type": "string"}]}
        ),
    ] = Field(description=f'Its numbers, as a list or as `"{BASE64}float32:..."` (float16, bfloat16), kept as float32.')


class PutVectorsRequest(Ours):
    """Vectors to be kept and named by their digests from now on, by everybody who has the server's secret.

    Or a file of tensors (`Content-Type: application/x-safetensors`), each [width] or [1, width] in float32, float16 or
    bfloat16. The digest is the SHA-256 of the numbers in float32, the lowest byte first; it never means another vector.
    """

    vectors: Annotated[Many[NamedVector], AtMost(MAX_VECTORS)] = Field(
        min_length=1, description="The vectors, each with a name of its own."
    )

    model_config = ConfigDict(
        json_schema_extra=examples({"vectors": [{"name": "happy", "vector": [0.1, -0.2, 0.3]}]}),
    )


class PutVectorsResponse(Reply):
    """The digests, which stand for the vectors wherever a request takes one."""

    digests: dict[str, str] = Field(description='By name, "vec:sha256:..."; the same numbers have the same digest.')
