"""Large bodies: read in slices as pydantic reads them whole, and their lists of objects validated one by one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import ijson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json
from starlette.requests import Request

from neuronpedia_inference.errors import BodyTooLarge
from neuronpedia_inference.operations import InvalidBody, by_name, validate
from neuronpedia_inference.operations.core import validate_in_turns
from neuronpedia_inference.web import parsing
from neuronpedia_inference.web.body import Bodies
from neuronpedia_inference.web.parsing import MAX_CONTAINERS, n_containers, parsed

from .test_operations_core import BODIES
from .test_rendering import finished

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
# Texts as they are written, with what may be wrong in them.
FRAGMENTS = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"a"', '"b"', "1", "-0", "1.5e3", "01", "NaN", "Infinity", "null", "true", " ", "\n"]
    + ['"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00"', '"\\\\ud800"', '"\\u0000"', '"é"', '"\t"', "/**/", "'", "\ufeff"]
)


def read_whole(raw: bytes) -> Any:
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError:
        return ValueError


def read_in_slices(raw: bytes, at_once: int = 2**14) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "WHOLE_BYTES", -1)
        patch.setattr(parsing, "_is_better_whole", lambda raw: False)
        patch.setattr(parsing, "AT_ONCE_BYTES", at_once)
        try:
            return finished(parsed(raw))[0]
        except ValueError:
            return ValueError


def same(one: Any, two: Any) -> bool:
    """Equal in value and type: 1 is not 1.0 and not true."""
    return one is two or repr(one) == repr(two)


def test_the_fast_parser_is_there() -> None:
    assert ijson.backend == "yajl2_c"


@given(VALUES, st.booleans(), st.integers(1, 40))
def test_slices_give_what_the_whole_gives(value: Any, escaped: bool, at_once: int) -> None:
    raw = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "replace")
    assert same(read_in_slices(raw, at_once), read_whole(raw))


@given(st.lists(FRAGMENTS, max_size=8).map("".join), st.integers(1, 40))
@example('{"a":1,"a":2}', 5)
@example('["\\ud83d\\ude00\\ud83d"]', 3)
@example('["\\\\\\ud800"]', 3)
@example('{"a":1}{}', 3)
@example("", 3)
def test_slices_refuse_what_the_whole_refuses(text: str, at_once: int) -> None:
    raw = text.encode()
    assert same(read_in_slices(raw, at_once), read_whole(raw))


@pytest.mark.parametrize("raw", [b'["\xff"]', b'["\xed\xa0\x80"]', b'["\xc3', b'["\xf0\x9f\x98"]'])
def test_what_is_not_utf_8_is_refused(raw: bytes) -> None:
    assert read_in_slices(raw, 3) is read_whole(raw) is ValueError


def test_integers_without_end_are_refused_in_large_bodies() -> None:
    assert read_in_slices(b"[9223372036854775807]") == [2**63 - 1]
    assert read_in_slices(b"[-9223372036854775807]") == [1 - 2**63]
    for beyond in (b"[9223372036854775808]", b"[-9223372036854775808]"):
        assert read_in_slices(beyond) is ValueError


def test_an_error_shows_nothing_of_the_body() -> None:
    raw = b'{"prompt": "secret words", "x": [' + b"1," * 2**16 + b"nul]}"
    with pytest.raises(ValueError, match="error") as caught:
        finished(parsed(raw))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_large_body_is_read_with_many_stops() -> None:
    raw = json.dumps({"vector": [i / 7 for i in range(100_000)]}).encode()
    value, n_stops = finished(parsed(raw))
    assert value == json.loads(raw)
    assert n_stops >= 2 * (len(raw) // 2**14)


def test_a_small_body_is_read_at_once() -> None:
    assert finished(parsed(b'{"a": [1, 2]}')) == ({"a": [1, 2]}, 0)


@pytest.mark.parametrize(
    ("raw", "is_whole"),
    [
        (b'["' + b"x, " * 2**17 + b'"]', True),
        (b'["' + b'\\", ' * 2**17 + b'"]', True),
        (b'["' + b"x" * 2**17 + b'"]', True),
        (b'{"v": [' + b"1.5, " * 2**17 + b"1]}", False),
        (b"[" + b'"x, ", ' * 2**17 + b"1]", False),
    ],
)
def test_long_texts_are_read_at_once(raw: bytes, is_whole: bool) -> None:
    """The sliced parser would read the beginning of such a text again with every slice."""
    value, n_stops = finished(parsed(raw))
    assert value == json.loads(raw)
    assert (n_stops == 0) is is_whole


def test_without_the_fast_parser_the_whole_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ijson, "backend", "python")
    raw = json.dumps(["x" * 2**17]).encode()
    assert finished(parsed(raw)) == (json.loads(raw), 0)


def test_containers_are_counted_from_above() -> None:
    assert n_containers(b'{"a": [[], {}, "[{"]}') == 6


@pytest.mark.parametrize("inside", [b"[],", b'{"a":', b'[{"b":'])
def test_a_body_of_empty_lists_is_refused_with_its_beginning(inside: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever field they are in, also one that a route ignores: making 8 MB of them would hold everybody up."""
    chunks = [b'{"a field that nobody knows": [', *[inside * 2**13] * 100]
    n_taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal n_taken
        n_taken += 1
        return {"type": "http.request", "body": chunks[n_taken - 1], "more_body": n_taken < len(chunks)}

    monkeypatch.setattr("neuronpedia_inference.web.body.parsed", lambda raw: pytest.fail("it is parsed"))
    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(BodyTooLarge, match=f"more than {MAX_CONTAINERS} objects and lists"):
        asyncio.run(Bodies(2**23, timeout_s=300).object(request, by_name["steer"]))
    assert n_taken == 1 + -(-MAX_CONTAINERS // (2**13 * n_containers(inside)))


# Validation


FEATURE = {"model": "m", "source": "1-res", "index": 3, "strength": 5}


@pytest.mark.parametrize("bad", [None, 0, 3, 9])
def test_items_are_validated_one_by_one_with_the_errors_of_the_whole(bad: int | None) -> None:
    features: list[Any] = [dict(FEATURE) for _ in range(10)]
    if bad is not None:
        features[bad] = {**FEATURE, "strength": "5"}
    operation, body = by_name["steer_completion"], {**BODIES["steer_completion"], "features": features}
    if bad is None:
        assert asyncio.run(validate_in_turns(operation, body)) == validate(operation, body)
        return
    with pytest.raises(InvalidBody) as whole:
        validate(operation, body)
    with pytest.raises(InvalidBody) as in_turns:
        asyncio.run(validate_in_turns(operation, body))
    assert in_turns.value.args == whole.value.args
    assert in_turns.value.detail[0]["loc"] == ["features", bad, "strength"]


@pytest.mark.parametrize("name", BODIES)
def test_every_request_is_the_same_either_way(name: str) -> None:
    operation, body = by_name[name], BODIES[name]
    before = json.dumps(body)
    assert asyncio.run(validate_in_turns(operation, body)) == validate(operation, body)
    assert json.dumps(body) == before  # the caller's own body is left as it was
