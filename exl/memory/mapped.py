"""Page-locked memory of the host that a GPU's kernels read by themselves, over the bus: nothing is copied to the GPU.

For tables of which a step needs a few rows. CUDA calls it mapped or zero-copy memory (CUDA C++ Programming Guide,
"Mapped Memory"): with unified addressing, which all 64-bit systems have, registering memory also maps it.
"""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack

import torch

from exl.errors import KernelError
from exl.memory.device import Runtime, TorchRuntime, pinned
from exl.memory.host import HostBuffer


def mapped(
    num_bytes: int, purpose: str, device: torch.device, stack: ExitStack, runtime: Runtime | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bytes twice, u8 [num_bytes]: zeroed memory that the host fills, and a tensor on ``device`` of it.

    Reads of the second go over the bus each time. The memory is given back when ``stack`` closes or, if nobody closes
    it, with the last tensor on the device; both wait until the device has done its work. If the device is the CPU, both
    are one. Raises ``MemoryBudgetError`` if the driver does not lock the memory, ``KernelError`` if it does not map it.
    """
    buffer = HostBuffer(num_bytes, purpose)
    host = torch.from_numpy(buffer.array)
    if device.type != "cuda":
        stack.callback(buffer.close)
        return host, host
    runtime = TorchRuntime(device) if runtime is None else runtime
    with ExitStack() as owned:
        owned.callback(buffer.close)
        owned.enter_context(pinned(buffer, device, runtime))
        error, address = runtime.device_address(host.data_ptr())
        if error:
            runtime.clear()
            raise KernelError(f"{purpose}: {device} does not map page-locked memory ({runtime.text(error)})")
        memory = _DeviceMemory(address, num_bytes)
        tensor = _tensor_of(memory, device)
        if tensor.data_ptr() != address or tensor.device != device:  # it would be in VRAM, where nobody planned it
            raise KernelError(f"{purpose}: torch copied page-locked memory to {tensor.device} instead of using it")
        release = weakref.finalize(memory, _release, owned.pop_all(), device, os.getpid())
    # When the interpreter exits CUDA may be gone already, and the system takes the memory back.
    release.atexit = False
    stack.callback(release)
    return host, tensor


class _DeviceMemory:
    """Bytes that a device can address, as other libraries describe theirs to torch, whose tensors keep it alive
    (Numba's documentation, "CUDA Array Interface"). The address is the device's own, which need not be the host's."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def _tensor_of(memory: _DeviceMemory, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(memory, device=device)


def _release(owned: ExitStack, device: torch.device, process: int) -> None:
    if os.getpid() != process:  # forked: neither the device nor the page-locked memory is there
        return
    with owned:  # also if the device reports an error
        torch.cuda.synchronize(device)  # kernels may still read it
