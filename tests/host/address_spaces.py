"""A device that does not see the host's memory: only what was page-locked and mapped for it, and that at an address of
its own, as CUDA allows ("may or may not match the original host pointer", says the reference of cudaHostRegister).
"""

from __future__ import annotations

import mmap
import tempfile
from contextlib import ExitStack

import torch

from exl.errors import KernelError
from exl.kernels.args import Pointer
from exl.memory.host import HostBuffer
from exl.ops import cuda_batch, cuda_sampling
from exl.weights import placement

from .recording import Launch, RecordedCopies, RecordingBackend


class SeparateMemory(RecordingBackend):
    """Refuses launches with an argument in memory of the host. The shim's own "device" memory is any other memory."""

    def __init__(self, inner, monkeypatch) -> None:
        super().__init__(inner)
        self.host: list[tuple[int, int]] = []  # start and end of what the device does not see
        self.mapped: dict[str, tuple[int, int]] = {}  # by purpose: where the device sees it

        class Tracked(HostBuffer):
            def __init__(buffer, num_bytes, purpose):
                super().__init__(num_bytes, purpose)
                self.hide(torch.from_numpy(buffer.array))

        for module in (placement, cuda_batch, cuda_sampling):
            monkeypatch.setattr(module, "HostBuffer", Tracked)
        monkeypatch.setattr(placement, "mapped", self.map)
        monkeypatch.setattr(placement, "HostCopyEngine", lambda: RecordedCopies(self))

    def hide(self, tensor: torch.Tensor) -> None:
        self.host.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))

    def map(
        self, num_bytes: int, purpose: str, device: torch.device, stack: ExitStack
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of ``exl.memory.mapped.mapped``: one file, mapped twice."""
        with tempfile.TemporaryFile() as file:
            file.truncate(num_bytes)
            tensors = [torch.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=torch.uint8) for _ in range(2)]
        host, on_device = tensors
        self.hide(host)
        self.mapped[purpose] = on_device.data_ptr(), on_device.data_ptr() + num_bytes
        return host, on_device

    def note(self, launch: Launch) -> None:
        for i, arg in enumerate(launch.args):
            if isinstance(arg, Pointer) and arg.num_bytes:
                start, stop = arg.address, arg.address + arg.num_bytes
                if any(start < b and a < stop for a, b in self.host):
                    raise KernelError(
                        f"{launch.entry}: argument {i} is memory of the host that the device does not see"
                    )
        super().note(launch)
