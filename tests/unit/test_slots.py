"""Rows by slot: whoever comes, leaves or is parked, every row finds what is its own, even after copies that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronpedia_inference.engine.slots import Slots


@dataclass(eq=False)
class One:
    name: int
    is_parked: bool = False


class Failed(Exception):
    pass


class Memory:
    """A list of names; copying fails every n-th time."""

    def __init__(self, fails_every: int) -> None:
        self.held: list[int | None] = []
        self._fails_every = fails_every
        self._n = 0

    def move(self, source: int, target: int) -> None:
        self._n += 1
        if self._fails_every and self._n % self._fails_every == 0:
            self.held[target] = -1  # half a copy
            raise Failed
        self.held[target] = self.held[source]


changes = st.lists(st.tuples(st.sampled_from(["come", "leave", "park", "resume"]), st.integers(0, 9)), max_size=40)


@given(changes, st.integers(0, 3), st.sampled_from([0, 1, 4]))
def test_every_row_keeps_what_is_its_own(program: list[tuple[str, int]], gap: int, fails_every: int) -> None:
    slots: Slots[One] = Slots()
    memory = Memory(fails_every + 1 if fails_every else 0)

    def arrange(n_new: int) -> int:
        behind = len(slots.decoding) + n_new + gap
        n_slots = behind + len(slots.parked) + bool(slots.parked)
        memory.held += [None] * (n_slots - len(memory.held))
        while True:
            try:
                slots.arrange(behind, n_slots, memory.move)
            except Failed:
                continue
            return n_slots

    for name, (what, number) in enumerate(program):
        rows = list(slots)
        if what == "come":
            arrange(1)
            place = len(slots.decoding)
            memory.held[place] = name
            slots.put(One(name), place)
        elif rows:
            chosen = rows[number % len(rows)]
            if what == "leave":
                slots.free(lambda row, chosen=chosen: row is chosen)
            else:
                chosen.is_parked = what == "park"
        n_slots = arrange(0)
        assert [memory.held[n] for n, _ in enumerate(slots.decoding)] == [row.name for row in slots.decoding]
        found = {memory.held[n]: n for n in range(n_slots)}
        assert all(found[row.name] >= len(slots.decoding) + gap for row in slots.parked)


def test_a_slot_is_not_given_twice() -> None:
    slots: Slots[Any] = Slots()
    slots.put(One(1), 0)
    with pytest.raises(AssertionError):
        slots.put(One(2), 0)
