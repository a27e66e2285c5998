"""Medians of events around single launches, with the L2 cache flushed before each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

REPEATS = 15
FLUSH_BYTES = 2**30  # larger than any L2
# The device is kept busy while the host prepares a launch, or the host's time would be counted as the kernel's. Cycles
# are given for the fastest clock that a GPU has: a slower one sleeps longer, which costs time and falsifies nothing.
CYCLES_A_SECOND = 3e9
LEAST_SLEEP = 200e-6  # seconds
MOST_SLEEP = 50e-3


class Timer(Protocol):
    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        """Microseconds of what ``run`` launches."""


class GpuTimer:
    """Medians of events; a buffer larger than L2 is written before every launch that is timed."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        host_seconds = 0.0
        for _ in range(3):  # the first one may load kernels; the last one tells what the host takes
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
    """The clock of a machine without a GPU: for dry runs, whose figures say nothing."""

    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6


def keep_busy(seconds: float) -> None:
    """The current stream does nothing for ``seconds`` or longer, while the host goes on to queue what is timed."""
    torch.cuda._sleep(int(min(max(seconds, LEAST_SLEEP), MOST_SLEEP) * CYCLES_A_SECOND))


def make_timer(device: torch.device) -> Timer:
    return GpuTimer(device) if device.type == "cuda" else HostTimer()
