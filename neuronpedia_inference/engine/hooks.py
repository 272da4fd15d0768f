"""Reading and writing tensors while the model runs. Everything installed here is gone when the `with` ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from neuronpedia_inference.points import Point

Edit = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a point; what it returns, unless None, takes the tensor's place."""
Remove = Callable[[], None]


class Site(Protocol):
    """What has points that can be hooked."""

    def attach(self, point: Point, edit: Edit) -> Remove:
        """Install `edit` at `point`; the answer removes it."""
        ...


class StopForwardError(Exception):
    """Raised inside the model once everything wanted has been captured; caught by `Capture.on`."""


@dataclass
class Capture:
    """Collects tensors and ends the forward pass at the last one: later layers and the unembedding never run."""

    wanted: frozenset[Point]
    seen: dict[Point, Tensor] = field(default_factory=dict)

    @contextmanager
    def on(self, site: Site) -> Iterator[None]:
        """The forward pass to be cut short goes inside."""
        with ExitStack() as stack:
            for point in sorted(self.wanted):
                stack.callback(site.attach(point, self._keeper(point)))
            with suppress(StopForwardError):
                yield
        missing = self.wanted - self.seen.keys()
        assert not missing, f"the forward pass never reached {sorted(p.name for p in missing)}"

    def _keeper(self, point: Point) -> Edit:
        def keep(tensor: Tensor) -> None:
            self.seen[point] = tensor
            if len(self.seen) == len(self.wanted):
                raise StopForwardError

        return keep


@contextmanager
def edits(site: Site, changes: Collection[tuple[Point, Edit]]) -> Iterator[None]:
    """Install the changes in the order given."""
    with ExitStack() as stack:
        for point, edit in changes:
            stack.callback(site.attach(point, edit))
        yield
