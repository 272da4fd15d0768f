"""Who lies in which slot: rows that decode in front, without a gap, and rows that are parked behind them.

Slots are put in order by copying one at a time to where nobody is. A row is in its new slot only once the copy is
whole, so that one that fails has changed nothing and may be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar


class Row(Protocol):
    @property
    def is_parked(self) -> bool: ...


T = TypeVar("T", bound=Row)


class Slots(Generic[T]):
    """Rows by slot. Nothing here touches a tensor."""

    def __init__(self) -> None:
        self._rows: list[T | None] = []

    def __iter__(self) -> Iterator[T]:
        """Rows in the order of their slots."""
        return (row for row in self._rows if row is not None)

    @property
    def placed(self) -> list[tuple[int, T]]:
        """Slot and row."""
        return [(slot, row) for slot, row in enumerate(self._rows) if row is not None]

    @property
    def parked(self) -> list[T]:
        return [row for row in self if row.is_parked]

    @property
    def decoding(self) -> list[T]:
        """Once they are in order, slot n has the n-th of them."""
        return [row for row in self if not row.is_parked]

    def put(self, row: T, slot: int) -> None:
        """Into a slot where nobody is."""
        self._rows += [None] * (slot + 1 - len(self._rows))
        assert self._rows[slot] is None, slot
        self._rows[slot] = row

    def free(self, leaving: Callable[[T], bool]) -> None:
        self._rows = [None if row is None or leaving(row) else row for row in self._rows]

    def clear(self) -> None:
        self._rows = []

    def arrange(self, behind: int, n_slots: int, move: Callable[[int, int], None]) -> None:
        """Rows that decode into the first slots, parked ones into those from `behind` on and below `n_slots`.

        `move` copies a slot to another. If any row is parked there must be one slot more than they need.
        """
        n_decoding = len(self.decoding)
        self._rows += [None] * (n_slots - len(self._rows))
        while True:
            moves = (self._move(slot, n_decoding, behind, n_slots) for slot in reversed(range(len(self._rows))))
            found = next(filter(None, moves), None)
            if found is None:
                break
            source, target = found
            move(source, target)
            self._rows[target], self._rows[source] = self._rows[source], None
        assert all(self._is_right(slot, n_decoding, behind, n_slots) for slot in range(len(self._rows)))
        self._rows = self._rows[:n_slots]

    def _move(self, slot: int, n_decoding: int, behind: int, n_slots: int) -> tuple[int, int] | None:
        """From this slot to a free one, if its row is where it should not be and there is one."""
        row = self._rows[slot]
        if row is None or self._is_right(slot, n_decoding, behind, n_slots):
            return None
        places = range(behind, n_slots) if row.is_parked else range(n_decoding)
        target = next((place for place in places if self._rows[place] is None), None)
        return None if target is None else (slot, target)

    def _is_right(self, slot: int, n_decoding: int, behind: int, n_slots: int) -> bool:
        row = self._rows[slot]
        if row is None:
            return True
        return behind <= slot < n_slots if row.is_parked else slot < n_decoding
