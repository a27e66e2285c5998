"""Emulates on Linux what exl uses of Windows: kernel32's memory calls, and files that cannot be replaced or removed
while they are open."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_COMMIT, _RESERVE, _DECOMMIT, _RELEASE = 0x1000, 0x2000, 0x4000, 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Function:
    """Stands for a library function, whose types ctypes code sets as attributes."""

    argtypes = restype = None

    def __init__(self, run) -> None:
        self._run = run

    def __call__(self, *args: object) -> object:
        return self._run(*args)


class FakeKernel32:
    """kernel32's memory calls by Linux's: decommitted memory may not be touched and takes no RAM. ``sizes``: reserved
    bytes by address. ``total_ram``: the RAM that the machine reports; half of it is available."""

    def __init__(self, total_ram: int = 16 << 30) -> None:
        self.sizes: dict[int, int] = {}
        self.total_ram, self.available_ram = total_ram, total_ram // 2
        self.VirtualAlloc, self.VirtualFree = _Function(self._allocate), _Function(self._free)
        self.GlobalMemoryStatusEx = _Function(self._status)
        self._c = ctypes.CDLL(None, use_errno=True)
        self._c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._c.mmap.restype = ctypes.c_void_p
        self._c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        for name in ("mprotect", "madvise"):
            getattr(self._c, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def _allocate(self, address: int | None, num_bytes: int, kind: int, protection: int) -> int | None:
        assert protection == 0x04
        if address is None:
            assert kind == _RESERVE | _COMMIT
            # Linux's numbers: a test may have removed the constants from Python's mmap module by now.
            address = self._c.mmap(None, num_bytes, 1 | 2, 0x02 | 0x20, -1, 0)
            if address == _MAP_FAILED:
                return None
            self.sizes[address] = num_bytes
            return address
        assert kind == _COMMIT
        assert num_bytes <= self.sizes[address]
        assert self._c.mprotect(address, num_bytes, 1 | 2) == 0
        return address

    def _free(self, address: int, num_bytes: int, kind: int) -> int:
        if kind == _RELEASE:
            assert num_bytes == 0
            return int(self._c.munmap(address, self.sizes.pop(address)) == 0)
        assert kind == _DECOMMIT
        assert self._c.madvise(address, num_bytes, 4) == 0  # MADV_DONTNEED
        return int(self._c.mprotect(address, num_bytes, 0) == 0)

    def _status(self, status) -> int:
        structure = ctypes.cast(status, ctypes.POINTER(ctypes.c_uint64))
        assert ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] == 64
        structure[1], structure[2] = self.total_ram, self.available_ram
        return 1


def open_here(path: str | os.PathLike[str]) -> bool:
    """Whether this process has the file open."""
    wanted = os.stat(path)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.path.samestat(os.fstat(int(descriptor)), wanted):
                return True
        except OSError:  # the descriptor of the listing itself, closed by now
            continue
    return False


def guard_open_files(monkeypatch) -> None:
    """Refuses to replace or remove an open file: Python on Windows opens files without FILE_SHARE_DELETE."""

    def guarded(function):
        def call(*paths: str | os.PathLike[str], **options: object) -> None:
            for path in paths:
                if os.path.exists(path) and open_here(path):
                    raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
            function(*paths, **options)

        return call

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    # Python 3.10's pathlib has taken these functions when it was imported; later ones look them up.
    monkeypatch.setattr(Path, "unlink", guarded(Path.unlink))


def play_windows_files(monkeypatch) -> None:
    """``guard_open_files``; file locks and positional reads are missing; memory comes from ``FakeKernel32``."""
    guard_open_files(monkeypatch)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("exl.replace_file._WAITS", (0.0, 0.0), raising=False)
    monkeypatch.setattr("exl.checkpoint.block_file.fcntl", None)
    monkeypatch.setattr("exl.weights.packed.fcntl", None)
    monkeypatch.setattr("exl.checkpoint.block_file._O_DIRECT", 0)
    monkeypatch.setattr("exl.checkpoint.block_file._POSITIONAL", False)
    kernel32 = FakeKernel32()
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel32, raising=False)
