"""Whether a model fits where it is to be loaded: judged before loading, and said when an allocation fails anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from neuronpedia_inference.engine.faults import wants_memory
from neuronpedia_inference.engine.memory import free_bytes
from neuronpedia_inference.errors import OutOfMemory, StartupError
from neuronpedia_inference.memory import CONTEXT_BYTES, GIB, Needs


@dataclass(frozen=True)
class Room:
    """A device's memory."""

    name: str
    free_bytes: int
    is_gpu: bool


def room_on(device: torch.device) -> Room:
    """What is free there now."""
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else "machine"
    return Room(name, free_bytes(device), is_gpu)


def check_fits(model: str, needs: Needs | None, room: Room) -> None:
    """Raises StartupError, one line with need, have and remedy. Needs that are not known are not judged."""
    if needs is not None and _bytes(needs, room) > room.free_bytes:
        raise _too_large(model, needs, room)


@contextmanager
def allocating(model: str, needs: Needs | None, room: Room) -> Iterator[None]:
    """An allocation that fails inside is a StartupError, one line with need, have and remedy."""
    try:
        yield
    except (RuntimeError, OSError, OutOfMemory, MemoryError, StartupError) as exc:
        if not wants_memory(exc):
            raise
        raise _too_large(model, needs, room) from exc


def _bytes(needs: Needs, room: Room) -> int:
    return needs.weights + needs.cache + (CONTEXT_BYTES if room.is_gpu else 0)


def _too_large(model: str, needs: Needs | None, room: Room) -> StartupError:
    have = f"this {room.name} had {room.free_bytes / GIB:.1f} GiB free"
    if needs is None:
        return StartupError(f"{model!r} does not fit: {have}. {_smaller(needs)}")
    parts = f"{needs.weights / GIB:.1f} for weights, {needs.cache / GIB:.1f} for one completion of MAX_TOKENS"
    beside = f", {CONTEXT_BYTES / GIB:.1f} for CUDA" if room.is_gpu else ""
    need = f"{_bytes(needs, room) / GIB:.1f} GiB ({parts}{beside}), SAEs not counted"
    return StartupError(f"{model!r} does not fit: it needs {need}; {have}. {_remedy(needs, room)}")


def _remedy(needs: Needs, room: Room) -> str:
    if not room.is_gpu:
        return _smaller(needs)
    if needs.gpu is None:
        return f"No single GPU of Modal has the memory. {_smaller(needs)}"
    return f"GPU={needs.gpu} has the memory. {_smaller(needs)}"


def _smaller(needs: Needs | None) -> str:
    halved = "" if needs is not None and needs.model_dtype != "float32" else "MODEL_DTYPE=bfloat16 halves the weights; "
    return f"{halved}`neuronpedia-inference plan` counts what is needed, SAEs included."
