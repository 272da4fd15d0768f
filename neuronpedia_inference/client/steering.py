"""What to steer with, as a value: built by operators, added up, written as JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddFeature:
    """Add `strength` times a feature's decoder row."""

    source: str
    index: int
    strength: float


@dataclass(frozen=True)
class AddVector:
    """Add `strength` times a vector [width of the hook]."""

    vector: tuple[float, ...]
    hook: str
    strength: float


@dataclass(frozen=True)
class Steering:
    """Everything that is added while a model writes. `a + b` steers with both, `a * 2` twice as strongly.

    `feature @ 70` makes one of a feature, `Vector(...) @ 3` of a vector of your own.
    """

    features: tuple[AddFeature, ...] = ()
    vectors: tuple[AddVector, ...] = ()

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.features + other.features, self.vectors + other.vectors)

    def __mul__(self, factor: float) -> Steering:
        return Steering(
            tuple(AddFeature(one.source, one.index, one.strength * factor) for one in self.features),
            tuple(AddVector(one.vector, one.hook, one.strength * factor) for one in self.vectors),
        )

    __rmul__ = __mul__

    def __neg__(self) -> Steering:
        return self * -1

    def __sub__(self, other: Steering) -> Steering:
        return self + -other

    def __repr__(self) -> str:
        said = [f"{one.source}/{one.index} @ {one.strength:g}" for one in self.features]
        said += [f"vector[{len(one.vector)}] at {one.hook} @ {one.strength:g}" for one in self.vectors]
        return f"Steering({' + '.join(said) or 'nothing'})"

    def body(self) -> dict[str, Any]:
        """The fields of a request that steers so."""
        features = [{"source": one.source, "index": one.index, "strength": one.strength} for one in self.features]
        vectors = [{"vector": list(one.vector), "hook": one.hook, "strength": one.strength} for one in self.vectors]
        return {**({"features": features} if features else {}), **({"vectors": vectors} if vectors else {})}

    def to_json(self) -> str:
        """As text: the fields of a request."""
        return json.dumps(self.body())

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Steering:
        """Raises KeyError or TypeError for what is no steering."""
        unknown = body.keys() - {"features", "vectors"}
        if unknown:
            raise KeyError(f"a steering has features and vectors, not {', '.join(sorted(unknown))}")
        features = tuple(
            AddFeature(str(one["source"]), int(one["index"]), float(one["strength"]))
            for one in body.get("features", ())
        )
        vectors = tuple(
            AddVector(tuple(map(float, one["vector"])), str(one["hook"]), float(one["strength"]))
            for one in body.get("vectors", ())
        )
        return cls(features, vectors)

    @classmethod
    def from_json(cls, text: str) -> Steering:
        """What `to_json` has written."""
        return cls.from_body(json.loads(text))


@dataclass(frozen=True)
class Vector:
    """A direction of your own at a hook, `Vector(numbers, "blocks.15.hook_resid_post") @ 3`."""

    vector: Sequence[float]
    hook: str

    def __matmul__(self, strength: float) -> Steering:
        return Steering(vectors=(AddVector(tuple(map(float, self.vector)), self.hook, float(strength)),))


class OfFeature:
    """Anything that stands for a feature: `it @ 70` steers with it."""

    source: str
    index: int
    label: str | None

    @property
    def name(self) -> str:
        """`source/index`, as in a Neuronpedia address."""
        return f"{self.source}/{self.index}"

    def __matmul__(self, strength: float) -> Steering:
        return Steering((AddFeature(self.source, self.index, float(strength)),))


@dataclass(frozen=True)
class FeatureName(OfFeature):
    """A feature by its name."""

    source: str
    index: int
    label: str | None = None

    @classmethod
    def read(cls, name: str) -> FeatureName:
        """From `15-res-4k/1113`, `model/15-res-4k/1113`, or the address of Neuronpedia's page. Raises ValueError."""
        path = name.strip().partition("?")[0].rstrip("/")
        host, cut, rest = path.partition("neuronpedia.org/")
        source, _, index = (rest if cut else host).rpartition("/")
        if not source or not (index.isascii() and index.isdecimal()):
            raise ValueError(f"{name!r} names no feature: write source/index, such as '15-res-4k/1113'")
        return cls(source, int(index))
