"""What makes the host wait for the device."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

READS = ("cpu", "tolist", "item", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")


class HostReads(TorchFunctionMode):
    """Collects the names of such calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.names += [name] if name in READS else []
        return func(*args, **(kwargs or {}))
