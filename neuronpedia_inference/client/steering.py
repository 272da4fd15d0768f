"""What to steer with, as a value: built by operators, added up, written as JSON and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ADD = "add"
ABSOLUTE = "absolute"
KEYWORDS = {"from_": "from", "except_": "except"}
"""Fields that Python has taken the names of."""


@dataclass(frozen=True)
class Edit:
    """One edit, of a feature or of a vector with its hook: the fields of `edits` in a request to `steer`."""

    do: str
    feature: str | None = None
    """`source/index`"""
    vector: tuple[float, ...] | str | None = None
    """Numbers, or the digest of those that the service keeps."""
    hook: str | None = None
    amount: float | None = None
    unit: str = ABSOLUTE
    other: str | tuple[float, ...] | None = None
    """Of `swap`: what gets the number."""
    on: Mapping[str, Any] | None = None
    when: Mapping[str, Any] | None = None

    @property
    def is_plain(self) -> bool:
        """An addition that no other field says more of."""
        return self.do == ADD and self.unit == ABSOLUTE and self.on is None and self.when is None

    def body(self) -> dict[str, Any]:
        vector = None if self.vector is None else sent(self.vector)
        other = list(self.other) if isinstance(self.other, tuple) else self.other
        said = {"feature": self.feature, "vector": vector, "hook": self.hook, "amount": self.amount, "with": other}
        more = {"unit": None if self.unit == ABSOLUTE else self.unit, "on": self.on, "when": self.when}
        return {"do": self.do, **{name: value for name, value in (said | more).items() if value is not None}}

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Edit:
        """Raises TypeError for fields that an edit does not have."""
        told = {"other" if name == "with" else name: value for name, value in body.items()}
        lists: dict[str, Any] = {
            name: tuple(map(float, value)) for name, value in told.items() if isinstance(value, list)
        }
        return cls(**(told | lists))

    def __str__(self) -> str:
        size = named(self.vector or ())
        of = self.feature or f"{size} at {self.hook}"
        if self.do == ADD:
            told = f"{of} @ {self.amount:g}"
        else:
            told = f"{of} {self.do}" + ("" if self.amount is None else f" {self.amount:g}")
        if self.other is not None:
            told += f" with {self.other if isinstance(self.other, str) else 'another vector'}"
        unit = "" if self.unit == ABSOLUTE else f" {self.unit}"
        places = "".join(f" {name} {dict(value)}" for name, value in (("on", self.on), ("when", self.when)) if value)
        return told + unit + places


@dataclass(frozen=True)
class Steering:
    """Everything that is done while a model writes. `a + b` does both in this order, `a * 2` adds twice as much.

    `feature @ 70` adds a feature, `feature.clamp(8)` sets it, `Vector(...) @ 3` adds a vector of your own;
    `.on(...)` says where, `.when(other > 3)` when.
    """

    edits: tuple[Edit, ...] = ()

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.edits + other.edits)

    def __mul__(self, factor: float) -> Steering:
        """Raises ValueError where something else than an addition is multiplied."""
        made = next((one for one in self.edits if one.do != ADD), None)
        if made is not None:
            raise ValueError(f"only additions can be multiplied, not {made}")
        return Steering(tuple(replace(one, amount=(one.amount or 0.0) * factor) for one in self.edits))

    __rmul__ = __mul__

    def __neg__(self) -> Steering:
        return self * -1

    def __sub__(self, other: Steering) -> Steering:
        return self + -other

    def on(self, **selection: Any) -> Steering:
        """Only there: `phase="generated"`, `positions=[3]`, `from_=2, to=8`, `first=4`, `last=2`, `token_ids=[5]`,
        `ramp=[0, 8]`, `except_={...}`, as `on` of the request."""
        told = {KEYWORDS.get(name, name): value for name, value in selection.items()}
        return Steering(tuple(replace(one, on=told) for one in self.edits))

    def when(self, condition: When) -> Steering:
        """Only there where the condition holds too."""
        return Steering(tuple(replace(one, when=condition.said) for one in self.edits))

    def __repr__(self) -> str:
        return f"Steering({' + '.join(map(str, self.edits)) or 'nothing'})"

    def body(self) -> dict[str, Any]:
        """The fields of a request that steers so: additions alone, whose order does not matter, in their short form."""
        if not all(one.is_plain for one in self.edits):
            return {"edits": [one.body() for one in self.edits]}
        features = [_by_feature(one.feature, one.amount) for one in self.edits if one.feature is not None]
        vectors = [
            {"vector": sent(one.vector), "hook": one.hook, "strength": one.amount}
            for one in self.edits
            if one.vector is not None
        ]
        return {**({"features": features} if features else {}), **({"vectors": vectors} if vectors else {})}

    def to_json(self) -> str:
        """As text: the fields of a request."""
        return json.dumps(self.body())

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Steering:
        """Raises KeyError or TypeError for what is no steering."""
        unknown = body.keys() - {"features", "vectors", "edits"}
        if unknown:
            raise KeyError(f"a steering has features, vectors and edits, not {', '.join(sorted(unknown))}")
        made = [
            Edit(ADD, feature=f"{one['source']}/{int(one['index'])}", amount=float(one["strength"]))
            for one in body.get("features", ())
        ]
        made += [
            Edit(ADD, vector=held(one["vector"]), hook=str(one["hook"]), amount=float(one["strength"]))
            for one in body.get("vectors", ())
        ]
        return cls((*made, *(Edit.from_body(one) for one in body.get("edits", ()))))

    @classmethod
    def from_json(cls, text: str) -> Steering:
        """What `to_json` has written."""
        return cls.from_body(json.loads(text))


def held(vector: Sequence[float] | str) -> tuple[float, ...] | str:
    """Of a vector what an edit holds."""
    return vector if isinstance(vector, str) else tuple(map(float, vector))


def named(vector: Sequence[float] | str) -> str:
    """A vector in a few letters: its length, or the beginning of its digest."""
    return vector[:20] if isinstance(vector, str) else f"vector[{len(vector)}]"


def sent(vector: tuple[float, ...] | str) -> list[float] | str:
    """Of a vector what a request says."""
    return vector if isinstance(vector, str) else list(vector)


def _by_feature(name: str | None, strength: float | None) -> dict[str, Any]:
    source, _, index = (name or "").rpartition("/")
    return {"source": source, "index": int(index), "strength": strength}


@dataclass(frozen=True)
class When:
    """A condition: `feature > 3`, `a & b`, `a | b`, `~a`; `.lasting("from_then_on")` or `.lasting(5)` tokens."""

    said: Mapping[str, Any]

    def __and__(self, other: When) -> When:
        return When({"all": [self.said, other.said]})

    def __or__(self, other: When) -> When:
        return When({"any": [self.said, other.said]})

    def __invert__(self) -> When:
        return When({"not": self.said})

    def lasting(self, how_long: str | int) -> When:
        """So many tokens from where the feature holds on, or `from_then_on`."""
        return When({**self.said, "for": how_long})


@dataclass(frozen=True, repr=False)
class Vector:
    """A direction of your own at a hook, `Vector(numbers, "blocks.15.hook_resid_post") @ 3`."""

    vector: Sequence[float] | str
    """Numbers; or, as text, the digest that `keep` gives."""
    hook: str

    def __repr__(self) -> str:
        norm = "" if isinstance(self.vector, str) else f", norm {math.hypot(*self.vector):.4g}"
        return f"Vector({named(self.vector)} at {self.hook}{norm})"

    def __matmul__(self, strength: float) -> Steering:
        return self._do(ADD, strength)

    def add(self, amount: float, unit: str = ABSOLUTE) -> Steering:
        """As `@`; unit `dose` counts in norms of what is there."""
        return self._do(ADD, amount, unit)

    def orthogonal(self, factor: float) -> Steering:
        """What lies along it is multiplied."""
        return self._do("orthogonal", factor)

    def cap(self, most: float, unit: str = ABSOLUTE) -> Steering:
        return self._do("cap", most, unit)

    def floor(self, least: float, unit: str = ABSOLUTE) -> Steering:
        return self._do("floor", least, unit)

    def project_out(self) -> Steering:
        return self._do("project_out")

    def _do(self, do: str, amount: float | None = None, unit: str = ABSOLUTE) -> Steering:
        made = Edit(
            do, vector=held(self.vector), hook=self.hook, amount=None if amount is None else float(amount), unit=unit
        )
        return Steering((made,))


class OfFeature:
    """Anything that stands for a feature: `it @ 70` adds it, `it.clamp(8)` sets it, `it > 3` is a condition.

    unit: `absolute`, as activations are told; `dose`, in norms of what is there; `of_max`, in its known maximum.
    """

    source: str
    index: int
    label: str | None

    @property
    def name(self) -> str:
        """`source/index`, as in a Neuronpedia address."""
        return f"{self.source}/{self.index}"

    def __matmul__(self, strength: float) -> Steering:
        return self._do(ADD, strength)

    def add(self, amount: float, unit: str = ABSOLUTE) -> Steering:
        """As `@`."""
        return self._do(ADD, amount, unit)

    def clamp(self, to: float, unit: str = ABSOLUTE) -> Steering:
        """Its activation is set."""
        return self._do("clamp", to, unit)

    def scale(self, factor: float) -> Steering:
        """Its activation is multiplied."""
        return self._do("scale", factor)

    def ablate(self) -> Steering:
        """Its activation becomes 0."""
        return self._do("ablate")

    def at_least(self, least: float, unit: str = ABSOLUTE) -> Steering:
        return self._do("at_least", least, unit)

    def at_most(self, most: float, unit: str = ABSOLUTE) -> Steering:
        return self._do("at_most", most, unit)

    def swap(self, other: OfFeature) -> Steering:
        """The other gets its activation, and it has none."""
        return Steering((Edit("swap", feature=self.name, other=other.name),))

    def __gt__(self, bound: float) -> When:
        return When({"feature": self.name, "above": float(bound)})

    def __lt__(self, bound: float) -> When:
        return When({"feature": self.name, "below": float(bound)})

    def _do(self, do: str, amount: float | None = None, unit: str = ABSOLUTE) -> Steering:
        return Steering((Edit(do, feature=self.name, amount=None if amount is None else float(amount), unit=unit),))


@dataclass(frozen=True)
class FeatureName(OfFeature):
    """A feature by its name."""

    source: str
    index: int
    label: str | None = field(default=None)

    @classmethod
    def read(cls, name: str) -> FeatureName:
        """From `15-res-4k/1113`, `model/15-res-4k/1113`, or the address of Neuronpedia's page. Raises ValueError."""
        path = name.strip().partition("?")[0].rstrip("/")
        host, cut, rest = path.partition("neuronpedia.org/")
        source, _, index = (rest if cut else host).rpartition("/")
        if not source or not (index.isascii() and index.isdecimal()):
            raise ValueError(f"{name!r} names no feature: write source/index, such as '15-res-4k/1113'")
        return cls(source, int(index))
