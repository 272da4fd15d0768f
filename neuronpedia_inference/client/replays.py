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


# Prompts and texts of a receipt, each by its name

ONE_CELL = dict.fromkeys(("prompt", "steering", "strength", "seed"))
"""Of a receipt of `steer`: its request says it."""
Named = Mapping[str, Answer]


def _prompts(receipt: Answer) -> Named:
    if "prompts" in receipt:
        return {f"prompt {place}": one for place, one in enumerate(receipt["prompts"])}
    return {"prompt": {"token_ids": receipt["prompt_ids"], "tokens": receipt["prompt_tokens"]}}


def _cells(receipt: Answer) -> Named:
    """Texts, with what steered them."""
    if "cells" in receipt:
        found: dict[str, Answer] = {}
        for one in receipt["cells"]:
            name = _told(one)
            while name in found:
                name += ", again"
            found[name] = one
        return found
    sides = {"steered": receipt["edits"], "default": []}
    texts = {side: {**ONE_CELL, "edits": edits, "text": receipt[side]} for side, edits in sides.items()}
    return {side: one for side, one in texts.items() if one["text"] is not None}


def _told(cell: Answer) -> str:
    steered = "unsteered" if cell["steering"] is None else f"steering {cell['steering']} at {cell['strength']:g}"
    return f"prompt {cell['prompt']}, {steered}, seed {cell['seed']}"


def _paired(was: Named, now: Named) -> Iterator[tuple[str, Any, Any]]:
    """Name by name; of as many on both sides one after the other, under the names that the receipt has."""
    if len(was) == len(now):
        yield from ((where, before, after) for (where, before), after in zip(was.items(), now.values(), strict=True))
        return
    yield from ((where, was.get(where), now.get(where)) for where in dict.fromkeys((*was, *now)))


def _within(where: str, cell: Answer) -> str:
    """Before what belongs to a text: nothing where there is one steered text alone."""
    return "" if cell["prompt"] is None else f"{where}, "


# What went in


def _of_what_went_in(was: Answer, now: Answer) -> Iterator[Difference]:
    for where, before, after in _paired(_prompts(was), _prompts(now)):
        yield from _first_token(where, before, after, went_in=True)
    for (source, index), (before, after) in _by(("source", "index"), was["features"], now["features"]).items():
        for part in dict.fromkeys((*_digests(before), *_digests(after))):
            where = f"feature {source}/{index}, {part.replace('_', ' ')}"
            yield from _differs(where, _digests(before).get(part), _digests(after).get(part))
    for (source,), both in _by(("source",), was["sources"], now["sources"]).items():
        files = [None if one is None else [file["sha256"] for file in one["files"]] for one in both]
        if all(files):
            yield from _differs(f"files of {source}", *files)
    for where, before, after in _paired(_cells(was), _cells(now)):
        yield from _cell(where, before, after)
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


def _cell(where: str, was: Answer | None, now: Answer | None) -> Iterator[Difference]:
    """What steered a text."""
    if was is None or now is None:
        return
    for name in ("prompt", "steering", "strength", "seed"):
        yield from _differs(f"{where}, {name}", was[name], now[name])
    for before, after in _aligned(was["edits"], now["edits"]):
        yield from _edit(_within(where, was), before, after)


def _edit(within: str, was: Answer | None, now: Answer | None) -> Iterator[Difference]:
    if was is None or now is None:
        known: Answer = was or now or {}
        sides = ("there", "not there") if now is None else ("not there", "there")
        yield Difference(f"{within}edit {_named(known)}", *sides, went_in=True)
        return
    for name in ("unit", "amount", "norm"):
        yield from _differs(f"{within}edit {_named(was)}, {name}", was[name], now[name])


def _named(edit: Answer) -> str:
    target = f"{edit['source']}/{edit['index']}" if edit["source"] is not None else "a vector"
    return f"{edit['field']} ({edit['do']} {target} at {edit['point']})"


# What came out


def _of_what_came_out(was: Answer, now: Answer, *, is_exact: bool) -> Iterator[Difference]:
    """Text by text: the first token, why it ended, and what edits did."""
    for where, before, after in _paired(_cells(was), _cells(now)):
        if before is None or after is None:
            yield from _differs(
                f"the {where} text", *("not there" if one is None else "there" for one in (before, after))
            )
            continue
        texts = before["text"], after["text"]
        yield from _first_token(where, *texts, went_in=False)
        reasons = [one["finish_reason"] for one in texts]
        if reasons[0] != reasons[1]:
            yield Difference(f"{where}, why it ended", *reasons, went_in=False)
        for edit, edit_now in _aligned(before["edits"], after["edits"]):
            if edit is not None and edit_now is not None:
                yield from _acted(_within(where, before), edit, edit_now, is_exact=is_exact)


def _first_token(where: str, was: Answer | None, now: Answer | None, *, went_in: bool) -> Iterator[Difference]:
    """was, now: with `token_ids` and `tokens`; nothing of what is not there."""
    ids, ids_now = [[] if one is None else one["token_ids"] for one in (was, now)]
    for place in range(max(len(ids), len(ids_now))):
        both = [some[place] if place < len(some) else None for some in (ids, ids_now)]
        if both[0] != both[1]:
            shown = [
                one["tokens"][place] if one is not None and place < len(one["tokens"]) else None for one in (was, now)
            ]
            yield Difference(f"{where}, token {place}", *shown, went_in=went_in)
            return


def _acted(within: str, was: Answer, now: Answer, *, is_exact: bool) -> Iterator[Difference]:
    """The first thing that an edit did otherwise."""
    where = f"{within}edit {_named(was)}"
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
