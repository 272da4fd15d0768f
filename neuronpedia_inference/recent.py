"""What was computed lately and may be asked for again, under a budget of bytes. The least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """For one thread at a time. The budget is never exceeded: what is larger than all of it is not kept."""

    def __init__(self, budget_bytes: int, n_bytes: Callable[[V], int]) -> None:
        """n_bytes: of a value."""
        self.budget_bytes = budget_bytes
        self._n_bytes = n_bytes
        self._held: OrderedDict[K, V] = OrderedDict()
        self.held_bytes = 0
        self.hits = 0
        """Times that something was used again."""

    @classmethod
    def nothing(cls) -> Recent:
        """Keeps nothing."""
        return cls(0, lambda _: 0)

    def __iter__(self) -> Iterator[K]:
        """From the least to the most recently used."""
        return iter(self._held)

    def get(self, key: K) -> V | None:
        value = self._held.get(key)
        if value is not None:
            self._held.move_to_end(key)
            self.hits += 1
        return value

    def look(self, key: K) -> V | None:
        """As `get`, without using it."""
        return self._held.get(key)

    def has(self, key: K) -> bool:
        """As `get`, without using it."""
        return key in self._held

    def put(self, key: K, value: Callable[[], V], n_bytes: int) -> None:
        """`value` is made only if there is, or can be made, room for so many bytes, and after that room is there."""
        if n_bytes > self.budget_bytes or key in self._held:
            return
        while self.held_bytes + n_bytes > self.budget_bytes:
            self.drop(next(iter(self._held)))
        made = value()
        assert self._n_bytes(made) == n_bytes, (self._n_bytes(made), n_bytes)
        self._held[key] = made
        self.held_bytes += n_bytes

    def drop(self, key: K) -> None:
        """No effect if it is not here."""
        left = self._held.pop(key, None)
        self.held_bytes -= 0 if left is None else self._n_bytes(left)

    def clear(self) -> None:
        for key in list(self._held):
            self.drop(key)

    def stats(self) -> dict[str, int]:
        """For `/metrics`."""
        return {"budget_bytes": self.budget_bytes, "bytes": self.held_bytes, "hits": self.hits}
