"""How much may be inside at once. Beyond a bound a request is refused now, not queued without end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from neuronpedia_inference.costs import Demand
from neuronpedia_inference.errors import LimitExceeded, Overloaded

NOTHING = Demand(requests=0)


class Permit:
    """The right of one request to be inside; released once, by `release`."""

    def __init__(self, admission: Admission, demand: Demand) -> None:
        self._admission = admission
        self._demand = demand
        self._held = True
        self._lock = threading.Lock()

    def release(self) -> None:
        """May be called again without effect."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._admission.give_back(self._demand)


class Admission:
    """Counts what is inside. Safe from any thread."""

    def __init__(self, bounds: Demand, refused: Callable[[str], None] = lambda bound: None) -> None:
        """`refused` is told the bound at which a request was turned away."""
        self.bounds = bounds
        self._refused = refused
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

    def permit(self, demand: Demand) -> Permit:
        """Raises Overloaded when there is no room now, LimitExceeded when there never would be."""
        alone = demand.beyond(self.bounds)
        if alone is not None:
            self._refused(alone)
            raise LimitExceeded(
                f"The request takes {_amount(demand, alone)}, the server has {_amount(self.bounds, alone)} for all. "
                "Send less at once."
            )
        with self._lock:
            full = (self._inside + demand).beyond(self.bounds)
            inside = self._inside
            if full is None:
                self._inside = inside + demand
                self._peak_bytes = max(self._peak_bytes, self._inside.bytes)
        if full is not None:
            self._refused(full)
            raise Overloaded(
                f"The server is busy: {_amount(inside, full)} of at most {_amount(self.bounds, full)} inside, "
                f"and this request brings {_amount(demand, full)}. Try again soon."
            )
        return Permit(self, demand)

    def give_back(self, demand: Demand) -> None:
        with self._lock:
            self._inside -= demand
            assert NOTHING.beyond(self._inside) is None, self._inside


def _amount(demand: Demand, bound: str) -> str:
    if bound == "bytes":
        return f"{demand.bytes / 2**20:.0f} MiB of memory"
    number = getattr(demand, bound)
    return f"{number} {bound.removesuffix('s') if number == 1 else bound}"
