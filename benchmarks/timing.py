"""Medians of events around single launches, with the L2 cache flushed before each."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

REPEATS = 15
FLUSH_BYTES = 2**30  # larger than any L2, and long enough to hide the wrapper's own time behind


class Timer:
    """Medians of events; a buffer larger than L2 is written before every launch that is timed."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def median_us(self, run: Callable[[], object], repeats: int = REPEATS) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(times)
