"""How many requests are inside at once. Beyond the bound a request is refused now, not queued without end."""

from __future__ import annotations

import threading

from neuronpedia_inference.errors import Overloaded


class Permit:
    """The right of one request to be inside; released once, by `release`."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held = True
        self._lock = threading.Lock()

    def release(self) -> None:
        """May be called again without effect."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._admission.give_back()


class Admission:
    """Counts requests. Safe from any thread."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self._inside = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        return self._inside

    def permit(self) -> Permit:
        """Raises Overloaded when every place is taken."""
        with self._lock:
            if self._inside >= self.max_requests:
                raise Overloaded(
                    f"{self._inside} requests are being served, which is the most this server takes. Try again soon."
                )
            self._inside += 1
        return Permit(self)

    def give_back(self) -> None:
        with self._lock:
            assert self._inside > 0, self._inside
            self._inside -= 1
