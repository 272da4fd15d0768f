"""How much may be inside at once. Beyond a bound a request is refused now, not queued without end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from functools import reduce

from neuronpedia_inference.costs import NO_GRID, Demand, Grid, together
from neuronpedia_inference.errors import LimitExceeded, Overloaded

NOTHING = Demand(requests=0)


class Permit:
    """The right of one request to be inside; released once, by `release`."""

    def __init__(self, admission: Admission, demand: Demand) -> None:
        self.demand = demand
        self._admission = admission

    def release(self) -> None:
        """May be called again without effect."""
        self._admission.give_back(self)


class Admission:
    """Counts what is inside. Safe from any thread."""

    def __init__(
        self,
        bounds: Demand,
        position_bytes: int = 0,
        least: Grid = NO_GRID,
        refused: Callable[[str], None] = lambda bound: None,
    ) -> None:
        """position_bytes: of a position of a row; `least`: slots that are kept when nobody is inside. `refused` is
        told the bound at which a request was turned away."""
        self.bounds = bounds
        self._position_bytes = position_bytes
        self._least = least
        self._refused = refused
        self._permits: set[Permit] = set()
        self._inside = NOTHING
        self._peak_bytes = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> Demand:
        return self._inside

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were inside at once."""
        return self._peak_bytes

    def permit(self, demand: Demand, instead_of: Collection[Permit] = ()) -> Permit:
        """Raises Overloaded when there is no room now, LimitExceeded when there never would be.

        instead_of: what the same request has, for work that has ended. The new one is for all of it, so that a request
        never waits for room that others of its kind hold, waiting likewise.
        """
        demand = reduce(Demand.at_least, (one.demand for one in instead_of), demand)
        by_itself = self._together([demand])
        alone = by_itself.beyond(self.bounds)
        if alone is not None:
            self._refused(alone)
            raise LimitExceeded(
                f"The request takes {_amount(by_itself, alone)}, the server has {_amount(self.bounds, alone)} for all. "
                "Send less at once."
            )
        permit = Permit(self, demand)
        with self._lock:
            inside = self._inside
            others = self._permits.difference(instead_of)
            wanted = self._together([*(one.demand for one in others), demand])
            full = wanted.beyond(self.bounds)
            if full is None:
                self._permits = others | {permit}
                self._inside = wanted
                self._peak_bytes = max(self._peak_bytes, wanted.bytes)
        if full is not None:
            self._refused(full)
            raise Overloaded(
                f"The server is busy: {_amount(inside, full)} of at most {_amount(self.bounds, full)} inside, "
                f"and with this request it would be {_amount(wanted, full)}. Try again soon."
            )
        return permit

    def give_back(self, permit: Permit) -> None:
        with self._lock:
            if permit in self._permits:
                self._permits.remove(permit)
                self._inside = self._together(one.demand for one in self._permits)

    def _together(self, demands: Iterable[Demand]) -> Demand:
        return together(demands, self._position_bytes, self._least)


def _amount(demand: Demand, bound: str) -> str:
    if bound == "bytes":
        return f"{demand.bytes / 2**20:.0f} MiB of memory"
    number = getattr(demand, bound)
    return f"{number} {bound.removesuffix('s') if number == 1 else bound}"
