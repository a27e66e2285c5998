"""Memory straight from the operating system, and straight back to it: for weights, which are large and live long."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exl.control_groups import memory_limit
from exl.errors import MemoryBudgetError
from exl.memory.virtual import VirtualPages, available_ram, total_ram

if TYPE_CHECKING:
    import torch


_LARGE_BYTES = 4 << 20  # buffers from this size on use pages of 2 MiB, if the system has them


class HostBuffer:
    """Zeroed bytes that start at a memory page, as O_DIRECT and page-locking require. A page takes memory only when it
    is first touched."""

    def __init__(self, num_bytes: int, purpose: str) -> None:
        """``purpose`` is for messages. Raises ``MemoryBudgetError`` if the system refuses."""
        self._map: mmap.mmap | VirtualPages
        try:
            if sys.platform == "win32":
                self._map = VirtualPages(max(1, num_bytes))
            else:
                self._map = _anonymous(max(1, num_bytes))
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryBudgetError(f"{purpose}: the system does not give {num_bytes} bytes ({error})") from None
        self.num_bytes = num_bytes
        self._array: NDArray[np.uint8] | None
        if isinstance(self._map, VirtualPages):
            self._array = self._map.array[:num_bytes]
            return
        # Fewer faults while it is filled, fewer pages to pin for a direct read, fewer misses while it is multiplied.
        if num_bytes >= _LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._array = np.frombuffer(self._map, np.uint8, num_bytes)

    @property
    def array(self) -> NDArray[np.uint8]:
        """u8 [num_bytes]. ``ValueError`` after ``close``."""
        if self._array is None:
            raise ValueError("the buffer is closed")
        return self._array

    def share_with_children(self, share: bool) -> None:
        """Whether processes that are forked from now on get the pages, if the system lets one choose. Pages
        that are locked for a device would be duplicated by the fork itself, all of them at once."""
        advice = getattr(mmap, "MADV_DOFORK" if share else "MADV_DONTFORK", None)
        if advice is not None and self._array is not None and isinstance(self._map, mmap.mmap):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(advice)

    def close(self) -> None:
        """Gives the memory back now. Views that are still around stay valid and read as zeros, on Linux and Windows;
        elsewhere the memory may go only when they do. May be called again."""
        if self._array is None:
            return
        self._array = None
        if isinstance(self._map, VirtualPages):
            self._map.discard()
            return
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        with contextlib.suppress(BufferError):  # unmapped with the last view
            self._map.close()


def host_tensor(shape: Sequence[int], dtype: torch.dtype, purpose: str) -> torch.Tensor:
    """A zeroed tensor on the CPU in memory of its own, freed with its last view. No byte is touched: a
    buffer that is allocated early takes no memory before it is used."""
    import torch

    raw = HostBuffer(math.prod(shape) * dtype.itemsize, purpose).array
    return torch.from_numpy(raw).view(dtype).view(*shape)


def _anonymous(num_bytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):  # Python's own choice is shared memory, which MADV_DONTNEED would not free
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)


def pinned_limit() -> int | None:
    """Bytes of RAM that may be page-locked for a GPU: on Windows and WSL about half of it. None: the system sets no
    limit."""
    if sys.platform == "win32":
        total = total_ram()
        return None if total is None else total // 2
    if "microsoft" in platform.release().lower():  # WSL
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None


def system_ram() -> tuple[int | None, int | None]:
    """Bytes of RAM that this machine has, and that are available now; None: the system does not tell. A container's
    limit counts as what it has."""
    if sys.platform == "win32":
        return total_ram(), available_ram()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None, None
    available = proc_bytes("meminfo", "MemAvailable")
    limit = memory_limit()
    if limit is not None and limit < total:
        return limit, None if available is None else min(available, limit)
    return total, available


def proc_bytes(name: str, field: str) -> int | None:
    """A size that Linux tells in a line of ``/proc/<name>``: ``proc_bytes("self/status", "VmRSS")``; None: it does not
    tell it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc", name).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def trim_heap() -> None:
    """Returns freed memory that ``malloc`` still holds to the system, if the C library is glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return  # another C library
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    trim(0)
