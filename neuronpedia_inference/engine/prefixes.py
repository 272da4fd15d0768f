"""Keys and values of texts that rows have gone through, for rows whose prompts begin alike: the next turn of a chat.

A position may be taken over where the token is the same, all before it are, and the same steering has touched both or
neither. Prompt and completion count alike: what a row has written is prompt in the next turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from neuronpedia_inference.engine.protocol import RowSpec, Steering
from neuronpedia_inference.recent import Recent

LEAST_POSITIONS = 16
"""Fewer are run again as quickly."""

Layers = Sequence[tuple[Tensor, Tensor] | None]
"""Keys and values [head, pos, d_head] by layer; None of a layer that attends to those of another."""


@dataclass(frozen=True)
class _Text:
    steering: tuple[str, ...]
    """What each steer does, as digests."""
    positions: tuple[tuple[int, bool], ...]
    """Token and whether steering touches it."""

    def n_shared(self, other: _Text) -> int:
        """Positions from the first on that are alike."""
        if self.steering != other.steering:
            return 0
        pairs = zip(self.positions, other.positions, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.positions), len(other.positions)))

    def is_within(self, other: _Text) -> bool:
        return self.n_shared(other) == len(self.positions)


class Prefixes:
    """What is kept shares its budget with others."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def keep(self, spec: RowSpec, generated: Sequence[int], layers: Layers, n_bytes: int) -> None:
        """What a row leaves, whose keys and values these are; `layers` are views, and copied if there is room."""
        text = _text(spec, generated)
        if len(text.positions) < LEAST_POSITIONS or any(text.is_within(other) for other in self._texts()):
            return
        for other in [other for other in self._texts() if other.is_within(text)]:
            self._recent.drop(other)
        self._recent.put(text, lambda: _copied(layers), n_bytes)

    def find(self, spec: RowSpec) -> tuple[Layers, int] | None:
        """What is kept of the longest beginning of a prompt, and its length. The last token has to be run."""
        text = _text(spec, ())
        most = len(text.positions) - 1
        shared = {other: min(most, text.n_shared(other)) for other in self._texts()}
        best = max(shared, key=lambda other: shared[other], default=None)
        if best is None or shared[best] < LEAST_POSITIONS:
            return None
        layers = self._recent.get(best)
        return None if layers is None else (layers, shared[best])

    def _texts(self) -> Iterable[_Text]:
        return [key for key in self._recent if isinstance(key, _Text)]


def _text(spec: RowSpec, generated: Sequence[int]) -> _Text:
    touched, untouched = bool(spec.steering), set(spec.untouched)
    prompt = tuple((token, touched and place not in untouched) for place, token in enumerate(spec.prompt_ids))
    return _Text(tuple(map(_digest, spec.steering)), (*prompt, *((token, touched) for token in generated)))


def _digest(steering: Steering) -> str:
    vector = steering.vector.detach().float().cpu().numpy().tobytes()
    said = f"{steering.point.name} {steering.method} {steering.coefficient!r} "
    return hashlib.sha256(said.encode() + vector).hexdigest()


def _copied(layers: Layers) -> Layers:
    return [None if layer is None else (layer[0].clone(), layer[1].clone()) for layer in layers]
