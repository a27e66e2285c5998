"""Memory that ends where the process may not read: a kernel that touches one byte too many crashes the test run."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
from numpy.typing import NDArray


def guarded_array(values: NDArray, *, before: bool = False) -> NDArray:
    """A copy of ``values`` whose last byte is the last one before a page that faults; ``before``: whose first byte is
    the first one after such a page. The array may then be misaligned for its type, as any row of a matrix may be for
    a vector. Skips the test where pages cannot be protected."""
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are protected with Linux's mprotect")
    page = mmap.PAGESIZE
    inner = max(1, -(-values.nbytes // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for guard in (address, address + page + inner):
        if libc.mprotect(guard, page, 0):  # PROT_NONE
            pytest.skip(f"pages cannot be protected here (errno {ctypes.get_errno()})")
    start = page if before else page + inner - values.nbytes
    array = np.frombuffer(memory, values.dtype, values.size, start).reshape(values.shape)
    array[...] = values
    return array
