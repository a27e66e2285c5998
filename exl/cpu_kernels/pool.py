"""Threads that run a list of stages in one call, and lose nothing to company.

Every thread, the caller's too, walks the whole list in one compiled call (``RunStages``), without Python's lock. There
is no barrier that must be kept: whoever waits too long does the missing work itself, in programs that allow it.
Between runs the workers sleep in a lock.
"""

from __future__ import annotations

import _thread
import collections
import ctypes
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.pool_kernels import CALLER, CLOSED, REPEAT, STAGE_SLOTS, RunStages

_RUN = RunStages()
_SPIN_CYCLES = 40_000  # some 15 us: longer than most chunks, shorter than a time slice
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Stage:
    """``num_chunks`` pieces of one kernel's work. ``args`` as for ``slots``; arrays are kept alive."""

    kernel: KernelSpec
    num_chunks: int
    args: tuple[NDArray | int | float | None, ...]
    most_chunks: int | None = None  # for a number that changes between runs (``Program.set_chunks``)


class Program:
    """Stages in memory, ready to run any number of times, one run after the other.

    ``repeats``: chunks may be run twice, and later than the rest of the program. So no stage may write what an earlier
    or the same stage of this program reads, nor may anybody before all threads have left (``Pool.settle``).
    """

    def __init__(self, library: Library, stages: Sequence[Stage], *, repeats: bool) -> None:
        self.repeats, self.num_stages = repeats, len(stages)
        self._keep: list[object] = [library]
        most = [max(1, stage.num_chunks, stage.most_chunks or 0) for stage in stages]
        self._flags = np.zeros(sum(most), np.uint8)  # one array, so that clearing them is one call
        raw = np.zeros((len(stages) + 1) * STAGE_SLOTS, np.int64)
        skip = -raw.ctypes.data // 8 % STAGE_SLOTS  # stages begin at a cache line
        self.table = raw[skip : skip + len(stages) * STAGE_SLOTS].reshape(-1, STAGE_SLOTS)
        self.active = np.full(8, CLOSED, np.int64)
        self.pid = os.getpid()  # of the process whose threads may be in it
        first_flag = self._flags.ctypes.data
        library.load(stage.kernel for stage in stages)
        for row, stage, size in zip(self.table, stages, most, strict=True):
            args = slots(*stage.args)
            self._keep += [args, *stage.args]
            row[:4] = library.address(stage.kernel), args.ctypes.data, stage.num_chunks, first_flag
            first_flag += size
        self._most = most

    def set_chunks(self, stage_idx: int, num_chunks: int) -> None:
        """Only after ``Pool.settle(self)``."""
        if num_chunks > self._most[stage_idx]:
            raise ValueError(f"{num_chunks} chunks of stage {stage_idx}, expected {self._most[stage_idx]} or fewer")
        self.table[stage_idx, 2] = num_chunks

    def clear(self) -> None:
        self.table[:, 8:10] = 0
        self._flags[:] = 0


class Pool:
    """``num_threads`` threads, of which the caller's is one. One run at a time, as models are used.

    Workers are started when they are first needed, in each process by itself: a fork has none of its parent's.
    """

    def __init__(self, library: Library, num_threads: int) -> None:
        self.library, self.num_threads = library, num_threads
        signature = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 5)  # gives Python's lock away during the call
        self._walk = functools.partial(_walk, signature(library.address(_RUN)))
        self._workers: list[_Worker] = []
        self._pid: int | None = None
        # A pool that nobody closes, at the latest when the interpreter exits; workers do not hold it.
        weakref.finalize(self, _stop, self._workers)

    def run(self, program: Program) -> None:
        """Returns when all stages are done. If the program repeats, a thread may still be in it: see ``settle``."""
        self.settle(program)
        program.clear()
        program.pid = os.getpid()
        for worker in self._ready():
            if worker.idle:  # the others would find this run done
                worker.wake(program)
        self._walk(program, CALLER)

    def settle(self, program: Program) -> None:
        """Waits until no thread is in the program's last run."""
        pause = 0.0
        while program.active[0] != CLOSED:
            if program.pid != os.getpid():  # the threads that were in it are the parent's
                program.active[0] = CLOSED
                return
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)

    def close(self) -> None:
        """Ends the workers. May be called again; a later run starts new ones."""
        _stop(self._workers)
        self._pid = None

    def _ready(self) -> list[_Worker]:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._workers.clear()
        while len(self._workers) < self.num_threads - 1:  # also after an interrupt in the middle
            self._workers.append(_Worker(self._walk))
        return self._workers


def _walk(enter: Callable[..., None], program: Program, mode: int = 0) -> None:
    """A thread's way through a program; ``enter`` is ``RunStages``."""
    table, active = program.table.ctypes.data, program.active.ctypes.data
    enter(table, program.num_stages, active, _SPIN_CYCLES, mode | (REPEAT if program.repeats else 0))


def _stop(workers: list[_Worker]) -> None:
    """Ends workers, those of this process, waits for them and empties the list. A thread that still runs Python when
    the interpreter is taken down is ended by force, which can end the process with an error."""
    stopped = [worker for worker in workers if worker.pid == os.getpid()]
    workers.clear()
    for worker in stopped:
        worker.stop()
    for worker in stopped:
        if worker.thread is not threading.current_thread():
            worker.thread.join(_CLOSE_SECONDS)


class _Worker:
    """Sleeps in a lock, which every platform has, until it is handed a program."""

    def __init__(self, walk: Callable[[Program], None]) -> None:
        self.pid, self._walk = os.getpid(), walk
        self._jobs: collections.deque[Program | None] = collections.deque()
        self._lock = _thread.allocate_lock()
        self._lock.acquire()
        self.thread = threading.Thread(target=self._work, name="exl computes", daemon=True)
        self.thread.start()

    @property
    def idle(self) -> bool:
        """Whether waking it does something. One that has been woken and does not run yet sees all jobs when it does."""
        return self._lock.locked()

    def wake(self, program: Program | None) -> None:
        self._jobs.append(program)
        self._lock.release()

    def stop(self) -> None:
        if self._lock.locked():
            self.wake(None)
        else:
            self._jobs.append(None)

    def _work(self) -> None:
        while True:
            self._lock.acquire()
            while self._jobs:
                program = self._jobs.popleft()
                if program is None:
                    return
                self._walk(program)
