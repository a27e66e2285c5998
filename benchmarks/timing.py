"""Medians of events around single launches, with the L2 cache flushed before each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

REPEATS = 15
FLUSH_BYTES = 2**30  # larger than any L2
# The device is kept busy while the host prepares a launch; otherwise the host's time would count as the kernel's. The
# cycles are for the fastest clock of any GPU: a slower GPU sleeps longer, which costs time but does not change results.
CYCLES_A_SECOND = 3e9
LEAST_SLEEP = 200e-6  # seconds
MOST_SLEEP = 50e-3


class Timer(Protocol):
    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        """Median microseconds of the launches of ``run``."""


class GpuTimer:
    """Medians of events; before each timed launch a buffer larger than L2 is written."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        host_seconds = 0.0
        for _ in range(3):  # the first one may load kernels; the last one gives the host's time
            began = time.perf_counter()
            run()
            host_seconds = time.perf_counter() - began
        times = []
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            keep_busy(2 * host_seconds)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(times)


class HostTimer:
    """The clock of a machine without a GPU, for dry runs, whose figures mean nothing."""

    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6


def keep_busy(seconds: float) -> None:
    """Keeps the current stream busy for at least ``seconds``, while the host queues the launches to time."""
    torch.cuda._sleep(int(min(max(seconds, LEAST_SLEEP), MOST_SLEEP) * CYCLES_A_SECOND))


def make_timer(device: torch.device) -> Timer:
    return GpuTimer(device) if device.type == "cuda" else HostTimer()
