"""Memory on the device that computes, and memory of the host that it can copy from by itself."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import KernelError, MemoryBudgetError
from exl.memory.host import HostBuffer, host_tensor

logger = logging.getLogger(__name__)


def device_tensor(num_bytes: int, device: torch.device, purpose: str) -> torch.Tensor:
    """Zeroed, contiguous u8 [num_bytes]. Raises ``MemoryBudgetError`` if the device has no room."""
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
    """Returns the memory of freed tensors, which torch caches on a GPU, to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a GPU after the CUDA context and cuBLAS have started; torch's cache of freed tensors is
    released first and counts as free. Raises ``KernelError`` if the GPU cannot be started."""
    _start(device)
    release_cached(device)
    return torch.cuda.mem_get_info(device)


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after all work queued on the CUDA stream so far. A host thread that waits for it sleeps, which leaves
    the core to others, such as the thread that reads layers; by default CUDA spins."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


class Runtime(Protocol):
    """The functions of CUDA that page-locking needs. Errors are ``cudaError_t``, 0 is success."""

    def register(self, address: int, num_bytes: int) -> int: ...

    def unregister(self, address: int) -> int: ...

    def device_address(self, address: int) -> tuple[int, int]:
        """An error, and where the device sees registered memory that the host has at ``address``."""

    def text(self, error: int) -> str: ...

    def clear(self) -> None:
        """Forgets the last error, which torch would otherwise report at the next kernel."""


class TorchRuntime:
    """The runtime library that torch uses, with ``device`` as the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, num_bytes: int) -> int:
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))

    def unregister(self, address: int) -> int:
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostUnregister(address))

    def device_address(self, address: int) -> tuple[int, int]:
        """By the driver's library, which is always there; torch's binding lacks the runtime's function. Both number
        their errors alike. The thread has the device's context, because it has registered the memory."""
        found = ctypes.c_uint64()
        with torch.cuda.device(self._device):
            error = _driver().cuMemHostGetDevicePointer_v2(
                ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0)
            )
        return int(error), found.value

    def text(self, error: int) -> str:
        runtime = torch.cuda.cudart()
        return f"{runtime.cudaGetErrorString(runtime.cudaError(error))}, cudaError_t {error}"

    def clear(self) -> None:
        """torch's binding has no ``cudaGetLastError``."""
        library = _loaded_runtime()
        if library is not None and library.cudaGetLastError():
            return
        # Linked into torch, perhaps: the check behind each of its kernels reads the last error, and so clears it.
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _loaded_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that is loaded already; none is loaded for this."""
    major = (torch.version.cuda or "0").split(".")[0]
    try:
        if sys.platform == "win32":
            return ctypes.CDLL(f"cudart64_{major}.dll")  # by its bare name: the one that is loaded
        return ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


def _start(device: torch.device) -> None:
    """Runs a first matrix product, like those of prompts: it loads cuBLAS's handle, kernels and workspace."""
    try:
        x = torch.ones(16, 16, dtype=torch.float16, device=device)
        torch.mm(x, x, out_dtype=torch.float32)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise KernelError(
            f"{device}, {free} of {total} bytes free: a first product by cuBLAS failed ({error})"
        ) from error


@contextmanager
def pinned(
    buffer: HostBuffer,
    device: torch.device | None = None,
    runtime: Runtime | None = None,
    pieces: Sequence[int] | None = None,
) -> Iterator[HostBuffer]:
    """Page-locks exactly the bytes of a buffer for copies to ``device`` (default: the current one): torch's own pinned
    memory is rounded up to powers of two. A child process that is forked meanwhile does not have the buffer.

    ``pieces``: sizes of parts that are locked one by one, because Windows locks many smaller ranges when it refuses a
    large one. No copy may cross from one to the next. Raises ``MemoryBudgetError`` if the driver refuses; it says
    how many bytes were locked and which budget leaves the rest on the disk.
    """
    sizes = [buffer.num_bytes] if pieces is None else list(pieces)
    if any(size % mmap.PAGESIZE for size in sizes):  # a page has one owner
        sizes = [buffer.num_bytes]
    if runtime is None:
        runtime = TorchRuntime(torch.device("cuda") if device is None else device)
    with ExitStack() as stack:
        start = 0
        for size in sizes:
            try:
                stack.enter_context(_locked(buffer.array[start : start + size], runtime))
            except MemoryBudgetError as error:
                if len(sizes) == 1:
                    raise
                raise MemoryBudgetError(
                    f"{error}, after {start} of {buffer.num_bytes}: a smaller ram= leaves more layers on the disk"
                ) from error
            start += size
        buffer.share_with_children(False)
        stack.callback(buffer.share_with_children, True)
        yield buffer


@contextmanager
def _locked(memory: NDArray[np.uint8], runtime: Runtime) -> Iterator[None]:
    if not len(memory):
        yield
        return
    address, num_bytes = memory.ctypes.data, len(memory)
    error = runtime.register(address, num_bytes)
    if error:
        runtime.clear()
        raise MemoryBudgetError(f"pinned memory: the driver does not lock {num_bytes} bytes ({runtime.text(error)})")
    process = os.getpid()
    try:
        yield
    finally:
        forked = os.getpid() != process  # then neither the device nor the memory is there
        error = 0 if forked else runtime.unregister(address)
        if error:
            runtime.clear()
            logger.warning("pinned memory: %d bytes stay locked (%s)", num_bytes, runtime.text(error))
