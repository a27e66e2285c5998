"""Memory on the device that computes, and memory of the host that it can copy from by itself."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import MemoryBudgetError
from exl.host_memory import HostBuffer, host_tensor


def device_tensor(num_bytes: int, device: torch.device, purpose: str) -> torch.Tensor:
    """Zeroed u8 [num_bytes] in one piece. Raises ``MemoryBudgetError`` where the device has no room."""
    if device.type == "cpu":
        return host_tensor([num_bytes], torch.uint8, purpose)
    try:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise MemoryBudgetError(
            f"{purpose}: {device} does not give {num_bytes} bytes; it has {free} of {total} free"
        ) from error


def release_cached(device: torch.device) -> None:
    """What torch keeps of freed tensors on a GPU goes back to the driver, for others to take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Free and all memory of a GPU; what torch keeps of freed tensors counts as free, and is."""
    release_cached(device)
    return torch.cuda.mem_get_info(device)


@contextmanager
def pinned(buffer: HostBuffer | _Piece) -> Iterator[HostBuffer | _Piece]:
    """Page-locks a buffer, whose exact bytes count: torch's own pinned memory is rounded up to powers of two. Raises
    ``MemoryBudgetError`` where the driver refuses."""
    if not buffer.num_bytes:
        yield buffer
        return
    runtime = torch.cuda.cudart()
    address = buffer.array.ctypes.data
    error = runtime.cudaHostRegister(address, buffer.num_bytes, 0)
    if int(error):
        with suppress(RuntimeError):  # the error stays until somebody asks for it
            torch.cuda.synchronize()
        raise MemoryBudgetError(f"pinned memory: the driver does not lock {buffer.num_bytes} bytes ({error})")
    try:
        yield buffer
    finally:
        runtime.cudaHostUnregister(address)


@dataclass(frozen=True)
class _Piece:
    """Part of a buffer, as ``pinned`` takes it."""

    array: NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        return len(self.array)


@contextmanager
def pinned_pieces(buffer: HostBuffer, sizes: Sequence[int]) -> Iterator[HostBuffer]:
    """``pinned``, each of the pieces that the buffer consists of by itself: Windows locks many smaller ranges where it
    refuses a large one. No copy may cross from one piece to the next. Raises ``MemoryBudgetError`` that says how far it
    came and which budget leaves the rest on the disk."""
    if any(size % mmap.PAGESIZE for size in sizes):  # a page has one owner
        sizes = [buffer.num_bytes]
    with ExitStack() as stack:
        start = 0
        for size in sizes:
            try:
                stack.enter_context(pinned(_Piece(buffer.array[start : start + size])))
            except MemoryBudgetError as error:
                if len(sizes) == 1:
                    raise
                raise MemoryBudgetError(
                    f"{error}, after {start} of {buffer.num_bytes}: a smaller ram= leaves more layers on the disk"
                ) from error
            start += size
        yield buffer
