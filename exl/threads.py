"""How many threads compute on the CPU: at most what the process may use, and fewer while others use the processors.

torch's OpenMP threads meet at a barrier after every operation, hundreds of times per token, and wait there for each
other by spinning. Beside another busy process one of them is often descheduled, and the others wait for its next time
slice: then two threads on two processors can be ten times slower than one. So each kind of work is timed, and the
number of threads follows the wall time: it is what is fastest now.

This never changes a result. All operations that are run with a varying number of threads give the same bits with any
number: torch splits them by rows or outputs, each of which one thread computes. The few that do not (``Threads.all``)
always run with the same number. ``tests/model/test_threads.py`` compares the bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from exl.control_groups import cpu_quota
from exl.errors import ConfigError
from exl.forks import lost_threads

_WINDOW = 0.02  # seconds of work that make one measurement: several time slices of a scheduler
_GAIN = 0.95  # another number of threads must take at most this share of the time
_CHANGED = (0.75, 1.33)  # the time of the number in use has changed: measure the others again
_PAUSE = 0.5  # seconds between two trials of the same number, at least
_SHORT_PAUSE = 0.1  # the same after such a change, which may cost 10 %
_PRICE = 100.0  # a trial that cost a second more than usual is followed by this many without it: 1 % in the long run
_LOST = 3.0  # a trial ends early when it has taken this many times what is usual
_LOST_SECONDS = 0.004

DECODE = "decode"  # the kind of work of layers that see one row


# --- what the process may use ------------------------------------------------------------------------------------


def usable_processors() -> int:
    """Processors that this process may run on: by its affinity, and by the quota of its control group
    (``docker --cpus=1.5`` gives 2)."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def check_threads(threads: object) -> None:
    """Raises ``ConfigError`` unless ``threads`` is None or a number of processors that this process may use."""
    most = usable_processors()
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise ConfigError(
            f"threads: found {threads!r}, expected a whole number from 1 to {most}, the processors that this process "
            "may use"
        )


def thread_limit(threads: int | None = None) -> int:
    """The largest number of threads to compute with: ``threads``, as checked by ``check_threads``, or by default
    torch's own number, but no more than ``usable_processors``."""
    import torch

    check_threads(threads)
    if lost_threads():
        return 1
    return min(torch.get_num_threads(), usable_processors()) if threads is None else threads


def describe_threads() -> str:
    limit, usable, there = thread_limit(), usable_processors(), os.cpu_count() or 1
    return f"{limit} threads at most; {usable} of {there} processors may be used"


# --- the choice --------------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """What is known of a number of threads."""

    seconds: float | None = None  # per unit of work, when it was last measured
    soon: float = 0.0  # time from which on it may be tried again if the time of the number in use has changed
    next: float = 0.0  # time from which on it is tried again, even if nothing has changed
    usual: float = 0.0  # seconds per unit of the number in use when this one was last tried


class ThreadChoice:
    """For one kind of work, whose units take about equally long. Starts with ``limit`` threads, tries neighbouring
    numbers for some milliseconds, and keeps what is fastest."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.perf_counter) -> None:
        counts = {limit, limit * 3 // 4, 1} | {limit >> i for i in range(1, limit.bit_length())}
        self._counts = sorted(count for count in counts if count >= 1)
        self._trials = [_Trial() for _ in self._counts]
        self._best = len(self._counts) - 1
        self._trying: int | None = None
        self._clock = clock
        self._units = self._seconds = 0.0

    @property
    def now(self) -> int:
        """Threads for the next piece of work."""
        return self._counts[self._best if self._trying is None else self._trying]

    @property
    def settled(self) -> int:
        """The number that was fastest so far, also while another one is tried."""
        return self._counts[self._best]

    def took(self, units: float, seconds: float) -> None:
        """A piece of work with ``now`` threads."""
        if len(self._counts) == 1:
            return
        self._units += units
        self._seconds += seconds
        if self._trying is not None:
            self._judge(self._trying)
        elif self._seconds >= _WINDOW:
            best, measured = self._trials[self._best], self._end_window()
            best.seconds = measured if best.seconds is None else (best.seconds + measured) / 2
            self._trying = self._candidate(best.seconds)

    def _end_window(self) -> float:
        measured = self._seconds / self._units
        self._units = self._seconds = 0.0
        return measured

    def _judge(self, trying: int) -> None:
        usual = self._trials[self._best].seconds * self._units
        if self._seconds < _WINDOW and self._seconds < _LOST * usual + _LOST_SECONDS:
            return
        cost, now = max(0.0, self._seconds - usual), self._clock()
        trial, best = self._trials[trying], self._trials[self._best]
        trial.seconds = self._end_window()
        trial.usual, trial.soon = best.seconds, now + max(_SHORT_PAUSE, _PRICE / 10 * cost)
        trial.next = now + max(_PAUSE, _PRICE * cost)
        self._trying = None
        if trial.seconds < _GAIN * best.seconds:
            best.usual, best.soon, best.next = trial.seconds, now + _SHORT_PAUSE, now + _PAUSE
            self._best = trying

    def _candidate(self, usual: float) -> int | None:
        now = self._clock()
        for index in (self._best - 1, self._best + 1):
            if not 0 <= index < len(self._counts):
                continue
            trial = self._trials[index]
            if trial.seconds is None or now >= trial.next:
                return index
            changed = not _CHANGED[0] < usual / trial.usual < _CHANGED[1]
            if changed and now >= trial.soon:
                return index
        return None


def layer_kind(num_rows: int) -> str:
    """The kind of work of a layer that sees so many rows: each power of two is one."""
    return DECODE if num_rows == 1 else f"{1 << (num_rows - 1).bit_length()} rows"


class Threads:
    """The choices of one model, by kind of work. Used by one thread at a time, like the model."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._choices: dict[str, ThreadChoice] = {}

    def _choice(self, kind: str) -> ThreadChoice:
        choice = self._choices.get(kind)
        if choice is None:
            choice = self._choices[kind] = ThreadChoice(self.limit)
        return choice

    @contextmanager
    def measured(self, kind: str, units: float) -> Iterator[None]:
        """Runs the block with as many threads as are fastest for this kind now, and times it."""
        choice = self._choice(kind)
        with using(choice.now):
            began = time.perf_counter()
            yield
            choice.took(units, time.perf_counter() - began)

    @contextmanager
    def all(self) -> Iterator[None]:
        """``limit`` threads: for operations whose bits depend on how they are split."""
        with using(self.limit):
            yield

    @contextmanager
    def like(self, kind: str) -> Iterator[None]:
        """As many threads as that kind of work has settled on; not timed."""
        with using(self._choice(kind).settled):
            yield


@contextmanager
def using(count: int) -> Iterator[None]:
    """torch computes with ``count`` threads inside the block, with as many as before after it. In a fork that has lost
    torch's threads one computes, whatever was fastest before."""
    import torch

    count = 1 if lost_threads() else count
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
