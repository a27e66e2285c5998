"""Memory on the device that computes, and memory of the host that it can copy from by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def pinned(buffer: HostBuffer) -> Iterator[HostBuffer]:
    """Page-locks a buffer, whose exact bytes count: torch's own pinned memory is rounded up to powers of two. Raises
    ``MemoryBudgetError`` where the driver refuses."""
    if not buffer.num_bytes:
        yield buffer
        return
    runtime = torch.cuda.cudart()
    address = buffer.array.ctypes.data
    error = runtime.cudaHostRegister(address, buffer.num_bytes, 0)
    if int(error):
        raise MemoryBudgetError(f"pinned memory: the driver does not lock {buffer.num_bytes} bytes ({error})")
    try:
        yield buffer
    finally:
        runtime.cudaHostUnregister(address)
