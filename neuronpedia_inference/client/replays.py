"""A receipt that is run again: the first thing that differs, and what makes the two hard to compare.

What went in is compared first, because it explains what came out: the prompt's tokens, digests of weights, edits, how
tokens are drawn. Then the tokens of both texts, and the numbers at which edits acted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from neuronpedia_inference.errors import InvalidRequest
from neuronpedia_inference.operations import by_name
from neuronpedia_inference.schemas.receipt import FORMAT

CLOSE = 1e-3
"""Numbers that come out are the same within this share of the larger one where the two runs cannot be expected to round
alike; elsewhere they have to be equal."""
STREAMING = ("stream", "deltas")

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the receipt has it."""

    where: str
    was: Any
    now: Any
    went_in: bool
    """Whether it is what the text was made from, and not what came of it."""

    def __str__(self) -> str:
        return f"{self.where}: {_shown(self.was)} in the receipt, {_shown(self.now)} now"


@dataclass(frozen=True)
class Replay:
    """What came of it."""

    differences: tuple[Difference, ...]
    """Causes first. Of each text the first token, and of each edit the first number."""
    circumstances: tuple[str, ...]
    """What else is not the same, so that what comes out may differ by rounding or more."""
    not_compared: tuple[str, ...] = ()
    """What one of the two does not say."""

    @property
    def is_same(self) -> bool:
        return not self.differences

    @property
    def is_comparable(self) -> bool:
        """Whether a difference is one of the request or its steering, and not perhaps of the circumstances."""
        return not self.circumstances or any(one.went_in for one in self.differences)

    def __str__(self) -> str:
        return "\n".join([*self._notes(), self.summary])

    @property
    def summary(self) -> str:
        """One line."""
        if not self.differences:
            return "no difference"
        first, *others = self.differences
        return f"{first} ({len(others)} more)" if others else str(first)

    def _notes(self) -> Iterator[str]:
        yield from (f"not the same circumstances: {one}" for one in self.circumstances)
        yield from (f"not compared: {one}" for one in self.not_compared)


def receipt_in(value: Any) -> dict[str, Any]:
    """A receipt, or the one in an answer. Raises InvalidRequest for what is neither."""
    inner = value.get("interpretability", value) if isinstance(value, Mapping) else None
    found = inner.get("receipt", inner) if isinstance(inner, Mapping) else None
    if not isinstance(found, Mapping) or "format" not in found or not isinstance(found.get("request"), Mapping):
        raise InvalidRequest(
            "This is no receipt: ask for one with `receipt` true, and keep the answer or its `receipt`"
        )
    if found["format"] != FORMAT:
        raise InvalidRequest(f"This receipt has the format {found['format']!r}, and {FORMAT} is what is read here")
    if found.get("operation") not in by_name:
        raise InvalidRequest(f"This receipt is of the operation {found.get('operation')!r}, which is not known here")
    return dict(found)


def body_of(receipt: Answer) -> dict[str, Any]:
    """Its request, to be asked again."""
    asked = {name: value for name, value in receipt["request"].items() if name not in STREAMING}
    return {**asked, "receipt": True, "reproducible": receipt["reproducible"]}


def compared(was: Answer, now: Answer) -> Replay:
    """Two receipts. Raises InvalidRequest where one lacks a part that receipts have."""
    try:
        around = tuple(_circumstances(was, now))
        differences = (*_of_what_went_in(was, now), *_of_what_came_out(was, now, is_exact=not around))
        return Replay(differences, around, tuple(_not_compared(was, now)))
    except (KeyError, TypeError, AttributeError, IndexError) as exc:
        raise InvalidRequest(f"This receipt cannot be read: {type(exc).__name__} {exc}") from None


# Circumstances


def _circumstances(was: Answer, now: Answer) -> Iterator[str]:
    for name in dict.fromkeys((*was["versions"], *now["versions"])):
        yield from _changed(f"version of {name}", was["versions"].get(name), now["versions"].get(name))
    digests = was["model"]["sha256"], now["model"]["sha256"]
    if None not in digests:
        yield from _changed(f"weights of {now['model']['name']}", *digests)
    for name in ("device", "dtype", "products"):
        yield from _changed(name, was[name], now[name])
    if not (was["reproducible"] and now["reproducible"]):
        yield "the receipt is not reproducible: who else was served may have changed how it rounds"


def _changed(what: str, was: Any, now: Any) -> Iterator[str]:
    if was != now:
        yield f"{what}: {_shown(was)} in the receipt, {_shown(now)} now"


def _not_compared(was: Answer, now: Answer) -> Iterator[str]:
    pairs = [("the model's weights", was["model"], now["model"])]
    pairs += [
        (f"the files of {name}", *both) for (name,), both in _by(("source",), was["sources"], now["sources"]).items()
    ]
    for what, *both in pairs:
        for side, one in zip(("the receipt", "what runs now"), both, strict=True):
            if one is not None and one["status"] != "known":
                yield f"{what}: their digest is {one['status']} in {side}"


# What went in


def _of_what_went_in(was: Answer, now: Answer) -> Iterator[Difference]:
    yield from _first_token("prompt", was["prompt_ids"], was["prompt_tokens"], now["prompt_ids"], now["prompt_tokens"])
    for (source, index), (before, after) in _by(("source", "index"), was["features"], now["features"]).items():
        for part in dict.fromkeys((*_digests(before), *_digests(after))):
            where = f"feature {source}/{index}, {part.replace('_', ' ')}"
            yield from _differs(where, _digests(before).get(part), _digests(after).get(part))
    for (source,), both in _by(("source",), was["sources"], now["sources"]).items():
        files = [None if one is None else [file["sha256"] for file in one["files"]] for one in both]
        if all(files):
            yield from _differs(f"files of {source}", *files)
    for before, after in _aligned(was["edits"], now["edits"]):
        yield from _edit(before, after)
    for name in dict.fromkeys((*was["sampling"], *now["sampling"])):
        yield from _differs(f"sampling, {name}", was["sampling"].get(name), now["sampling"].get(name))


def _digests(feature: Answer | None) -> Mapping[str, str]:
    return {} if feature is None else feature["sha256"]


def _differs(where: str, was: Any, now: Any) -> Iterator[Difference]:
    if was != now:
        yield Difference(where, was, now, went_in=True)


def _by(keys: Sequence[str], was: Sequence[Answer], now: Sequence[Answer]) -> dict[Any, list[Answer | None]]:
    """Both sides of what has the same keys, in order."""
    found: dict[Any, list[Answer | None]] = {}
    for side, some in enumerate((was, now)):
        for one in some:
            found.setdefault(tuple(one[key] for key in keys), [None, None])[side] = one
    return found


def _identity(edit: Answer) -> tuple[Any, ...]:
    return tuple(edit[name] for name in ("do", "source", "index", "to", "point", "vector_sha256"))


def _aligned(was: Sequence[Answer], now: Sequence[Answer]) -> Iterator[tuple[Answer | None, Answer | None]]:
    """Edits of both; None for one that the other side lacks."""
    blocks = SequenceMatcher(None, [*map(_identity, was)], [*map(_identity, now)], autojunk=False).get_opcodes()
    for kind, first, last, first_now, last_now in blocks:
        if kind == "equal":
            yield from zip(was[first:last], now[first_now:last_now], strict=True)
        else:
            yield from ((one, None) for one in was[first:last])
            yield from ((None, one) for one in now[first_now:last_now])


def _edit(was: Answer | None, now: Answer | None) -> Iterator[Difference]:
    if was is None or now is None:
        known: Answer = was or now or {}
        sides = ("there", "not there") if now is None else ("not there", "there")
        yield Difference(f"edit {_named(known)}", *sides, went_in=True)
        return
    for name in ("unit", "amount", "norm"):
        yield from _differs(f"edit {_named(was)}, {name}", was[name], now[name])


def _named(edit: Answer) -> str:
    target = f"{edit['source']}/{edit['index']}" if edit["source"] is not None else "a vector"
    return f"{edit['field']} ({edit['do']} {target} at {edit['point']})"


# What came out


def _of_what_came_out(was: Answer, now: Answer, *, is_exact: bool) -> Iterator[Difference]:
    for side in ("steered", "default"):
        before, after = was[side], now[side]
        if before is None or after is None:
            yield from _differs(f"the {side} text", *("there" if one else "not there" for one in (before, after)))
            continue
        tokens = [one for text in (before, after) for one in (text["token_ids"], text["tokens"])]
        yield from _first_token(side, *tokens, went_in=False)
        if before["finish_reason"] != after["finish_reason"]:
            yield Difference(f"{side}, why it ended", before["finish_reason"], after["finish_reason"], went_in=False)
    for before, after in _aligned(was["edits"], now["edits"]):
        if before is not None and after is not None:
            yield from _acted(before, after, is_exact=is_exact)


def _first_token(
    where: str,
    ids: Sequence[int],
    tokens: Sequence[str],
    ids_now: Sequence[int],
    tokens_now: Sequence[str],
    *,
    went_in: bool = True,
) -> Iterator[Difference]:
    for place in range(max(len(ids), len(ids_now))):
        both = [some[place] if place < len(some) else None for some in (ids, ids_now)]
        if both[0] != both[1]:
            shown = [some[place] if place < len(some) else None for some in (tokens, tokens_now)]
            yield Difference(f"{where}, token {place}", *shown, went_in=went_in)
            return


def _acted(was: Answer, now: Answer, *, is_exact: bool) -> Iterator[Difference]:
    """The first thing that an edit did otherwise."""
    where = f"edit {_named(was)}"
    if was["acted"] != now["acted"]:
        yield Difference(f"{where}, whether it acted", was["acted"], now["acted"], went_in=False)
        return
    for moment in ("first", "last"):
        before, after = was[moment] or {}, now[moment] or {}
        for name in dict.fromkeys((*before, *after)):
            if not _is_same(before.get(name), after.get(name), is_exact=is_exact):
                at = f"{where}, {name.replace('_', ' ')} at its {moment} token"
                yield Difference(at, before.get(name), after.get(name), went_in=False)
                return


def _is_same(was: Any, now: Any, *, is_exact: bool) -> bool:
    if is_exact or not (isinstance(was, float) and isinstance(now, float)):
        return was == now
    return math.isclose(was, now, rel_tol=CLOSE)


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef"):
        return f"{value[:12]}…"
    return "nothing" if value is None else f"{value!r:.80}"
