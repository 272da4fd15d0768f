"""Reading and writing tensors while the model runs. Everything installed here is gone when the `with` ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from neuronpedia_inference.engine.points import Point

Edit = Callable[[Tensor], Tensor | None]
"""Called with the tensor at a point; what it returns, unless None, takes the tensor's place."""


class Site(Protocol):
    """A module tree in which points can be hooked."""

    def attach(self, point: Point, edit: Edit) -> Callable[[], None]:
        """Install `edit` at `point`; the answer removes it."""
        ...


class StopForwardError(Exception):
    """Raised inside the model once everything wanted has been captured; caught by `Capture.stops`."""


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


class BlockSite:
    """The plain Hugging Face model: only the borders of a block, but its own attention kernels and no overhead."""

    def __init__(self, blocks: Collection[Any]) -> None:
        self._blocks = list(blocks)

    def attach(self, point: Point, edit: Edit) -> Callable[[], None]:
        block = self._blocks[point.layer]
        if point.place == "hook_resid_pre":
            return block.register_forward_pre_hook(_on_input(edit), with_kwargs=True).remove
        assert point.place == "hook_resid_post", point
        return block.register_forward_hook(_on_output(edit)).remove


class BridgeSite:
    """The bridge's hook points: every place it names."""

    def __init__(self, hook_dict: dict[str, Any]) -> None:
        self._hooks = hook_dict

    def __contains__(self, point: Point) -> bool:
        return point.name in self._hooks

    def attach(self, point: Point, edit: Edit) -> Callable[[], None]:
        hook_point = self._hooks[point.name]
        hook_point.add_hook(lambda tensor, hook: edit(tensor))
        handle = hook_point.fwd_hooks[-1]

        def remove() -> None:
            handle.hook.remove()
            hook_point.fwd_hooks.remove(handle)

        return remove


def _on_input(edit: Edit) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            changed = edit(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = edit(kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})

    return hook


def _on_output(edit: Edit) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            changed = edit(output[0])
            return None if changed is None else (changed, *output[1:])
        return edit(output)

    return hook
