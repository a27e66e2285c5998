"""Memory from Windows' ``VirtualAlloc``, for ``exl/memory/host.py``.

What Python's ``mmap`` maps there is a section, whose pages cannot be given back while a view of it lives.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MEM_COMMIT, _MEM_RESERVE, _MEM_DECOMMIT, _MEM_RELEASE = 0x1000, 0x2000, 0x4000, 0x8000
_PAGE_READWRITE = 0x04


class VirtualPages:
    """Zeroed bytes by ``VirtualAlloc``, released with the last view of ``array``."""

    def __init__(self, num_bytes: int, kernel32: Any = None) -> None:
        """``kernel32``: a library with the system's functions (default: the system's). ``OSError`` if it refuses."""
        self._kernel32 = _typed(ctypes.WinDLL("kernel32", use_last_error=True) if kernel32 is None else kernel32)
        self.num_bytes = num_bytes
        self._address = self._kernel32.VirtualAlloc(None, num_bytes, _MEM_RESERVE | _MEM_COMMIT, _PAGE_READWRITE)
        if not self._address:
            raise OSError(f"VirtualAlloc fails with {_last_error()}")

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy keeps this object alive as long as an array of it."""
        return {"version": 3, "shape": (self.num_bytes,), "typestr": "|u1", "data": (self._address, False)}

    @property
    def array(self) -> NDArray[np.uint8]:
        return np.asarray(self)

    def discard(self) -> None:
        """The memory goes back now; the addresses stay, and read as zeros."""
        self._kernel32.VirtualFree(self._address, self.num_bytes, _MEM_DECOMMIT)
        if not self._kernel32.VirtualAlloc(self._address, self.num_bytes, _MEM_COMMIT, _PAGE_READWRITE):
            raise OSError(f"VirtualAlloc fails with {_last_error()}")  # views that are around must not be touched

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._kernel32.VirtualFree(self._address, 0, _MEM_RELEASE)


def _typed(kernel32: Any) -> Any:
    allocate, free = kernel32.VirtualAlloc, kernel32.VirtualFree
    allocate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32]
    allocate.restype = ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32], ctypes.c_int
    return kernel32


def _last_error() -> int:
    return ctypes.get_last_error() if hasattr(ctypes, "get_last_error") else 0


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX``."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "page_total", "page_free")),
        *((name, ctypes.c_uint64) for name in ("virtual_total", "virtual_free", "extended_free")),
    ]


def total_ram(kernel32: Any = None) -> int | None:
    """Bytes of RAM; None if the system does not tell."""
    status = _memory_status(kernel32)
    return None if status is None else status.total


def available_ram(kernel32: Any = None) -> int | None:
    """Bytes of RAM that no program uses; None if the system does not tell."""
    status = _memory_status(kernel32)
    return None if status is None else status.free


def _memory_status(kernel32: Any) -> _MemoryStatus | None:
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True) if kernel32 is None else kernel32
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    return status if kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
