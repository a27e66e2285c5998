"""The process in which AddressSanitizer's builds run: its runtime must be loaded before anything else.

The parent writes buffers into a file in shared memory and sends requests by pipe; the worker copies each buffer
between redzones, launches, and copies back what the kernel may write. If a worker dies (a wild access), only that
launch is lost; the next launch starts a new worker. Standard library only.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__:
    from .library import Fault, Library, Request
else:  # as the worker's main file
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from library import Fault, Library, Request

REDZONE = 4096
ALIGN = 256  # buffers keep their address modulo this
ENVIRONMENT = (
    "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1:abort_on_error=0:allocator_may_return_null=1"
)


def _send(pipe, message: object) -> None:
    data = pickle.dumps(message)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe) -> object:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (count,) = struct.unpack("<Q", head)
    return pickle.loads(pipe.read(count))


def regions(ranges: tuple[tuple[int, int, int, bool, bool], ...]) -> list[tuple[int, int]]:
    """Merges ranges that overlap; ranges that only touch stay separate."""
    merged: list[list[int]] = []
    for start, num_bytes, *_ in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], start + num_bytes)
        else:
            merged.append([start, start + num_bytes])
    return [(start, stop) for start, stop in merged]


def placed(pieces: list[tuple[int, int]]) -> tuple[list[int], int]:
    """Offset of each piece, with redzones between, and the total size. Offset = address modulo ``ALIGN``."""
    offsets, at = [], REDZONE
    for start, stop in pieces:
        at += (start - at) % ALIGN
        offsets.append(at)
        at += stop - start + REDZONE
    return offsets, at


# ---- the parent -----------------------------------------------------------------------------------------------------


class Worker:
    """A worker process and the shared-memory file through which it gets buffers."""

    _shared: Worker | None = None

    @classmethod
    def shared(cls) -> Worker:
        if cls._shared is None:
            cls._shared = cls()
            atexit.register(cls._shared.close)
        return cls._shared

    def __init__(self) -> None:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._file = tempfile.NamedTemporaryFile(prefix="exl-host-", dir=folder)  # noqa: SIM115
        self._log = tempfile.NamedTemporaryFile(prefix="exl-asan-")  # noqa: SIM115
        self._process: subprocess.Popen | None = None
        self.num_starts = 0

    def _start(self) -> subprocess.Popen:
        if self._process is None:
            runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
            environment = {
                **os.environ,
                "LD_PRELOAD": os.path.realpath(runtime.stdout.strip()),
                "ASAN_OPTIONS": ENVIRONMENT,
            }
            command = [sys.executable, "-S", "-E", __file__, self._file.name]
            self._log.truncate(0)
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
            )
            self.num_starts += 1
        return self._process

    def call(self, method: str, path: str, argument: object = None) -> object:
        process = self._start()
        try:
            _send(process.stdin, (method, path, argument))
            failed, answer = _receive(process.stdout)
            return Fault(*answer) if failed else answer
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self._process = None
            with open(self._log.name, errors="replace") as log:
                text = log.read()[-3000:]
            return Fault(f"the process died (exit status {code}):\n{text}", (), (0, 0, 0), (0, 0, 0), 0, 0)

    def load(self, path: str) -> RemoteLibrary:
        return RemoteLibrary(self, path)

    def launch(self, path: str, request: Request) -> Fault | None:
        pieces = regions(request.ranges)
        offsets, total = placed(pieces)
        os.ftruncate(self._file.fileno(), max(total, 1))
        with mmap.mmap(self._file.fileno(), max(total, 1)) as memory:
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for (start, stop), offset in zip(pieces, offsets, strict=True):
                ctypes.memmove(base + offset, start, stop - start)
            fault = self.call("launch", path, tuple(request))
            if fault is None:
                for start, num_bytes, _, writable, _ in request.ranges:
                    if writable:
                        i = next(i for i, (a, b) in enumerate(pieces) if a <= start < b)
                        ctypes.memmove(start, base + offsets[i] + start - pieces[i][0], num_bytes)
        return fault

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


class RemoteLibrary:
    """The interface of ``Library`` for a library that is loaded in the worker."""

    def __init__(self, worker: Worker, path: str) -> None:
        self._worker = worker
        self._path = path

    def _ask(self, method: str) -> object:
        answer = self._worker.call(method, self._path)
        if isinstance(answer, Fault):
            raise RuntimeError(answer.message)
        return answer

    def params(self) -> list[tuple[str, int, str, int, bool]]:
        return self._ask("params")

    def max_threads(self) -> int:
        return self._ask("max_threads")

    def stats(self) -> dict[str, int]:
        return self._ask("stats")

    def launch(self, request: Request) -> Fault | None:
        return self._worker.launch(self._path, request)


# ---- the worker -----------------------------------------------------------------------------------------------------


class Guarded:
    """Copies of a launch's buffers, with poisoned bytes around each."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self._poison = getattr(runtime, "__asan_poison_memory_region")
        self._unpoison = getattr(runtime, "__asan_unpoison_memory_region")
        for function in (self._poison, self._unpoison):
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._arena: mmap.mmap | None = None

    def run(self, library: Library, request: Request, shared: mmap.mmap) -> Fault | None:
        pieces = regions(request.ranges)
        offsets, total = placed(pieces)
        source = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        base = self._room(total)
        moved = {}
        for (start, stop), offset in zip(pieces, offsets, strict=True):
            ctypes.memmove(base + offset, source + offset, stop - start)
        self._poison(base, total)
        for (start, stop), offset in zip(pieces, offsets, strict=True):
            self._unpoison(base + offset, stop - start)
            moved[start, stop] = base + offset - start
        shift = {r[2]: next(d for (a, b), d in moved.items() if a <= r[0] < b) for r in request.ranges}
        slots = tuple(slot + shift.get(i, 0) for i, slot in enumerate(request.slots))
        ranges = tuple((start + shift[arg], count, arg, w, early) for start, count, arg, w, early in request.ranges)
        here = Request(
            request.grid, request.block, request.shared_bytes, request.seed, request.dependent, slots, ranges
        )
        fault = library.launch(here)
        self._unpoison(base, total)
        if fault is None:
            for (start, stop), offset in zip(pieces, offsets, strict=True):
                ctypes.memmove(source + offset, base + offset, stop - start)
        return fault

    def _room(self, total: int) -> int:
        if self._arena is None or len(self._arena) < total:
            self._arena = mmap.mmap(-1, max(2 * total, 1 << 20))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._arena))


def main(file_name: str) -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    libraries: dict[str, Library] = {}
    guarded = Guarded(ctypes.CDLL(None))
    with open(file_name, "r+b") as file:
        while True:
            try:
                method, path, argument = _receive(requests)
            except EOFError:
                return
            if path not in libraries:
                libraries[path] = Library(path)
            library = libraries[path]
            if method == "launch":
                shared = mmap.mmap(file.fileno(), 0)
                fault = guarded.run(library, Request(*argument), shared)
                _send(answers, (fault is not None, tuple(fault) if fault else None))
            else:
                _send(answers, (False, getattr(library, method)()))


if __name__ == "__main__":
    main(sys.argv[1])
