"""Forked processes: what a child finds of torch's threads, and of models that its parent has loaded.

A forked child (multiprocessing's "fork", ``gunicorn --preload``) has one thread, a copy of the one that forked. The
other threads are gone, but locks that they held stay locked, and GNU OpenMP, which most builds of torch compute with,
still believes in its threads: the child's first parallel loop would wait for them for ever. ``import exl`` registers
hooks that run at every fork of the process:

- before it, the OpenMP threads of the thread that forks are ended; parent and child start new ones when they need them.
  Then the fork waits until threads that are ending have ended: they hold locks of MKL's, with which torch multiplies;
- objects that have locks or threads of their own are told (``register``): before, so that nothing is half done;
  afterwards, so that the child makes its own.

So a child can use a model that its parent loaded, if the model is on the CPU and no request was running. In all other
cases its ``ForkGuard`` raises an error that says what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Protocol

from exl.errors import ExlError

_REMEDY = 'start workers with multiprocessing\'s "spawn" method, or load the model in the worker, after the fork'
_MAPS = Path("/proc/self/maps")
_TASKS = Path("/proc/self/task")
_ENDING_SECONDS = 0.2  # how long a fork waits, at most, for threads that are ending
_PAUSE_HARD = 2  # omp_pause_hard, OpenMP 5.0 section 3.2.44: threads may be ended, too


class ForkAware(Protocol):
    """Told of each fork of the process, in the thread that forks. Must not wait for ever, and must not raise."""

    def before_fork(self) -> None: ...

    def after_fork(self, in_child: bool) -> None: ...


class _State:
    """Of this process."""

    def __init__(self) -> None:
        self.aware: list[weakref.ref[ForkAware]] = []
        self.turn = threading.RLock()  # two threads may fork at once
        self.told: list[ForkAware] = []  # of the fork that is being made; those are alive until it is done
        self.uses_gpu = False  # when it forked
        self.paused = True  # whether OpenMP's threads were ended before the fork
        self.lost_gpu = False  # forked from a process that used a GPU
        self.lost_threads = False  # forked, and OpenMP's threads could not be ended before


_state = _State()


def register(aware: ForkAware) -> None:
    """``aware`` is told of forks as long as it lives."""
    _state.aware = [ref for ref in _state.aware if ref() is not None]
    _state.aware.append(weakref.ref(aware))


def lost_gpu() -> bool:
    """Whether this process was forked from one that used a GPU: CUDA does not work in it."""
    return _state.lost_gpu


def lost_threads() -> bool:
    """Whether this process was forked and must compute with one thread: torch's others do not exist here, and its
    OpenMP library offers no way to end them before a fork."""
    return _state.lost_threads


def gpu_error() -> ExlError:
    """For a process in which ``lost_gpu`` is true."""
    return ExlError(f"this process was forked from one that uses a GPU, and a fork cannot use it: {_REMEDY}")


class ForkGuard:
    """Whether a model works in this process. Every request calls ``check``; who uses it outside of requests, ``begin``
    and ``end``. Whoever is told of a fork and knows that a request was running calls ``lose`` in the child."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._num_open = 0
        self._error: ExlError | None = None
        register(self)

    @property
    def lost_gpu(self) -> bool:
        """Whether the model's device does not exist in this process: nothing of it may be touched, or freed."""
        return self._on_gpu and self._error is not None

    @property
    def is_lost(self) -> bool:
        """Whether the model does not work in this process."""
        return self._error is not None

    def check(self) -> None:
        """Raises ``ExlError`` in a child of the process that loaded the model, if the model does not work there."""
        if self._error is not None:
            raise ExlError(str(self._error))

    def begin(self) -> None:
        self.check()
        self._num_open += 1

    def end(self) -> None:
        self._num_open -= 1

    def before_fork(self) -> None:
        pass

    def after_fork(self, in_child: bool) -> None:
        if not in_child or self._error is not None:
            return
        if self._on_gpu:
            self._error = gpu_error()
        elif self._num_open:
            self.lose()

    def lose(self) -> None:
        """In a child: a request was running."""
        if self._error is None:
            self._error = gpu_error() if self._on_gpu else _running_error()


def _running_error() -> ExlError:
    return ExlError(
        "this process was forked while a request to the model was running or a stream was unfinished, so the fork "
        f"cannot use the model: finish requests before you fork, {_REMEDY}"
    )


# --- hooks -------------------------------------------------------------------------------------------------------


def _before() -> None:
    state = _state
    state.turn.acquire()
    state.told = [aware for aware in (ref() for ref in state.aware) if aware is not None]
    for aware in state.told:
        aware.before_fork()
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # not there while torch is being imported
    state.uses_gpu = cuda is not None and cuda.is_initialized()
    state.paused = torch is None or _end_openmp_threads()
    if torch is not None:
        _wait_for_ending_threads()


def _in_parent() -> None:
    _tell(in_child=False)
    _state.turn.release()


def _in_child() -> None:
    _state.lost_gpu = _state.lost_gpu or _state.uses_gpu
    _state.lost_threads = _state.lost_threads or not _state.paused
    torch = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):
        # torch has a second pool, of pthreads, and makes it anew in a child only when it is next asked for it, as here.
        # Otherwise the child's exit joins threads that do not exist, and waits for ever if OpenMP has since been given
        # the same addresses. Where OpenMP's threads are lost, too, loops of one thread wait for nobody.
        torch.set_num_threads(1 if _state.lost_threads else torch.get_num_threads())
    _state.turn = threading.RLock()
    _tell(in_child=True)


def _tell(in_child: bool) -> None:
    told, _state.told = _state.told, []
    for aware in reversed(told):
        aware.after_fork(in_child)


def _end_openmp_threads() -> bool:
    """Ends the threads that GNU OpenMP keeps for this thread. Other threads' teams are their own, and the child has no
    use for them. LLVM's OpenMP, as on macOS, does the same by itself. Returns False if a library does not do it."""
    if not _MAPS.exists():  # not Linux
        return True
    paths = {line.split(maxsplit=5)[5] for line in _MAPS.read_text().splitlines() if "libgomp" in line}
    paused = [_pause(path.strip()) for path in paths]  # each of them, also after one that fails
    return all(paused)


def _wait_for_ending_threads() -> None:
    """MKL tidies up when a thread that has multiplied ends, under a lock that it takes for every product: a child that
    is forked meanwhile would wait for this lock for ever. Nothing tells which threads are ending. But they run, and
    Python does not know them, or no longer, also after ``join``; idle threads of OpenMP's sleep. Those of another
    thread that computes run, too, so the wait is short."""
    until = time.monotonic() + _ENDING_SECONDS
    while _an_unknown_thread_runs() and time.monotonic() < until:
        time.sleep(0.001)


def _an_unknown_thread_runs() -> bool:
    known = {str(thread.native_id) for thread in threading.enumerate()} | {str(threading.get_native_id())}
    with contextlib.suppress(OSError):  # not Linux
        return any(_runs(task) for task in os.listdir(_TASKS) if task not in known)
    return False


def _runs(task: str) -> bool:
    """Whether a thread runs, wants to, or waits for memory or a disk (proc(5), /proc/pid/stat)."""
    try:
        return (_TASKS / task / "stat").read_text().rpartition(")")[2].split()[0] in ("R", "D")
    except OSError:  # it has ended
        return False


def _pause(path: str) -> bool:
    try:
        pause = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all
    except (OSError, AttributeError):  # before GCC 9
        return False
    pause.argtypes, pause.restype = [ctypes.c_int], ctypes.c_int
    return pause(_PAUSE_HARD) == 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
