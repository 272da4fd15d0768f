"""The host's memory as a model on a CPU needs it: weights in large pages, freed blocks kept for the next, gaps let go.

A decode step reads every weight once, and a tenth of its time goes into finding the small pages that a file is mapped
to. The move is done aside: a server is ready before it, and answers within it. Whether glibc gives a freed block of
some MiB back to the system, to have it again with the next layer, it learns from the blocks that it has seen freed; of
weights that are mapped it sees none. Blocks that are kept leave gaps, whose pages go back in pauses.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import mmap
import platform
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuronpedia_inference.scheduler.jobs import CallWork, Steps, Ticket

log = logging.getLogger(__name__)

LARGE_PAGE = 2**21
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
"""What Linux is told; others have no such thing."""
_LIBC = None if _ADVICE is None else ctypes.CDLL(None)
_GLIBC = _LIBC if platform.libc_ver()[0] == "glibc" else None
STEP_BYTES = 2**24
"""Others may have a turn after so many."""
MLP_WIDTH = 4
"""About how many times as wide as the residual stream an MLP is inside."""
KEPT_BLOCKS, MOST_BLOCK = 16, 2**25
"""How many are kept at the end of glibc's memory, and the largest that it can keep."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
_ALIGNMENT = 64
"""Of every weight in bytes: a line of the processor's cache."""
Region = tuple[int, int]
"""First address, and the one behind the last."""
_REGIONS = Path("/proc/self/smaps")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
"""Of a region: from, to, and the inode of the file behind it, 0 where there is none."""
_UNWRITTEN = re.compile(r"Anonymous: +0 kB")


def accommodate(model: PreTrainedModel, n_positions: int, submit: Callable[[CallWork], Ticket]) -> Move:
    """Let the process use the host's memory as the model needs it, which a worker that takes `submit` owns from now on.

    n_positions: of a pass. Nothing changes where the model lies on a device.
    """
    if model.device.type == "cpu":
        keep_blocks(n_positions * model.config.get_text_config().hidden_size * model.dtype.itemsize)
    return Move(submit(CallWork(lambda: moving(model), is_aside=True)))


def keep_blocks(n_bytes: int) -> None:
    """Let glibc keep the blocks that a pass makes again and again. Others have their own ways.

    n_bytes: of the residual stream in a pass. Larger blocks than are made of it go back at once: they are few, and
    between smaller ones they would leave gaps that nothing fills.
    """
    if _GLIBC is not None:
        block = min(MLP_WIDTH * n_bytes, MOST_BLOCK)
        _GLIBC.mallopt(_M_MMAP_THRESHOLD, block)
        _GLIBC.mallopt(_M_TRIM_THRESHOLD, KEPT_BLOCKS * block)


def give_back() -> None:
    """Give the pages that lie free between blocks in use back to the system; takes tens of milliseconds."""
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)


class Move:
    """The move of a model's weights, in the hands of a worker."""

    def __init__(self, ticket: Ticket) -> None:
        """ticket: of what `moving` gives."""
        self._ticket = ticket

    async def ended(self) -> None:
        """Wait until the weights are where they stay."""
        if not self._ticket.future.done():
            await asyncio.wait([asyncio.wrap_future(self._ticket.future)])

    def stop(self) -> None:
        """What has not moved stays where it is."""
        self._ticket.cancel()


def moving(model: nn.Module) -> Steps:
    """Move the parameters that lie on the host, bit for bit; returns how many bytes it were.

    Nothing else may use the model while a step runs. What is mapped from files is let go weight by weight, so that it
    is not in memory twice. Where the system has no large pages, or no memory for the copy, all stay where they are.
    """
    plain = _plain(model)
    memory = _memory(sum(_room(one) for one in plain) + LARGE_PAGE) if plain else None
    if memory is None:
        return 0
    files = _mapped_files()
    place = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % LARGE_PAGE
    for parameter in plain:
        old, new = parameter.data, _there(memory, place, parameter.data)
        for before, after in zip(_parts(old), _parts(new), strict=True):
            after.copy_(before)
            yield None
        parameter.data = new
        _let_go(old, files)
        place += _room(old)
    n_bytes = sum(one.nbytes for one in plain)
    log.debug("%.0f MiB of weights are in large pages", n_bytes / 2**20)
    return n_bytes


def n_bytes_to_come(model: nn.Module) -> int:
    """Memory that the move will take and nothing takes now: of weights that are mapped from files."""
    if _ADVICE is None:
        return 0
    files = _mapped_files()
    return sum(one.nbytes for one in _plain(model) if _whole_pages(one.data, files) is not None)


def _memory(n_bytes: int) -> mmap.mmap | None:
    if _ADVICE is None:
        return None
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_ADVICE)
    except OSError as exc:
        log.info("weights stay in small pages: %s", exc)
        return None
    return memory


@torch.inference_mode(False)
def _there(memory: mmap.mmap, place: int, like: Tensor) -> Tensor:
    """A tensor at that place, usable as `like` is."""
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=place).view(like.shape)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.view(-1).split(STEP_BYTES // tensor.element_size())


def _plain(model: nn.Module) -> Sequence[nn.Parameter]:
    """Those on the host that are nothing but numbers."""
    return [one for one in model.parameters() if _is_plain(one.data)]


def _is_plain(tensor: Tensor) -> bool:
    on_host = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return on_host and type(tensor) is Tensor and tensor.is_contiguous() and tensor.numel() > 0


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _mapped_files() -> Sequence[Region]:
    """Addresses behind which are files as they are on the disk, in order: what is let go there is read again."""
    try:
        lines = _REGIONS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    regions: list[Region] = []
    region = None
    for line in lines:
        if head := _HEAD.match(line):
            region = (int(head[1], 16), int(head[2], 16)) if head[3] != "0" else None
        elif region is not None and _UNWRITTEN.match(line):
            regions.append(region)
    return sorted(regions)


def _whole_pages(tensor: Tensor, files: Sequence[Region]) -> Region | None:
    """Those of a tensor that a file is behind."""
    size = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // size) * size
    behind = (tensor.data_ptr() + tensor.nbytes) // size * size
    place = bisect_right(files, first, key=itemgetter(0)) - 1
    is_there = first < behind and place >= 0 and behind <= files[place][1]
    return (first, behind) if is_there else None


def _let_go(tensor: Tensor, files: Sequence[Region]) -> None:
    """Its pages, if a file is behind them."""
    pages = _whole_pages(tensor, files)
    if pages is not None and _LIBC is not None:
        first, behind = pages
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(behind - first), mmap.MADV_DONTNEED)
