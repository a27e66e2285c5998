"""Copies between a device and memory of the host, beside the arithmetic: on a CUDA stream of their own."""

from __future__ import annotations

from typing import Protocol

import torch

from exl.memory.device import record_event


class Event(Protocol):
    """A point in a CUDA stream."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class CopyEngine(Protocol):
    """Copies beside the arithmetic. Nothing waits on the host."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Event | None) -> Event:
        """Queues ``dst = src`` behind earlier copies and ``after``; returns the event of its end."""

    def record(self) -> Event:
        """All arithmetic that has been queued so far."""

    def wait(self, event: Event) -> None:
        """Arithmetic that is queued from here on waits for the event."""


class TorchCopyEngine:
    """One CUDA device: its current stream, and a stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Event | None) -> Event:
        if after is not None:
            self._copies.wait_event(after)
        with torch.cuda.stream(self._copies):
            dst.copy_(src, non_blocking=True)
        return record_event(self._copies)

    def record(self) -> Event:
        return record_event(torch.cuda.current_stream(self._device))

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)


class HostCopyEngine:
    """A device that is the host itself, for tests: queued work is done at once."""

    class _Done:
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            pass

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Event | None) -> Event:
        dst.copy_(src)
        return self._Done()

    def record(self) -> Event:
        return self._Done()

    def wait(self, event: Event) -> None:
        pass


def copy_engine(device: torch.device) -> CopyEngine:
    """A GPU's copies, or those of a device that is the host itself."""
    return TorchCopyEngine(device) if device.type == "cuda" else HostCopyEngine()
