"""``cuLaunchKernelEx`` by ctypes: the launch attributes that CuPy's ``cuLaunchKernel`` cannot carry.

Structures follow ``cuda.h`` of CUDA 12 and 13 (section "Execution Control" of the driver API reference).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

from exl.errors import KernelError
from exl.kernels.args import Arg

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: an id of 4 bytes, 4 bytes of padding, a union of 64 bytes whose first member we use."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def pack_params(args: Sequence[Arg]) -> tuple[ctypes.Array, list[ctypes.Array]]:
    """``void* params[]`` for a launch, and the values that it points to, to be kept alive until the call is over."""
    values = [ctypes.create_string_buffer(data, len(data)) for data in (arg.pack() for arg in args)]
    params = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
    return params, values


def launch_config(
    grid: Sequence[int], block: Sequence[int], shared_bytes: int, stream: int, dependent: bool
) -> tuple[LaunchConfig, ctypes.Array]:
    """The structure for one launch, and the attributes that it points to."""
    attributes = (LaunchAttribute * 1)(LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=int(dependent)))
    config = LaunchConfig(*grid, *block, shared_bytes, stream, attributes, 1 if dependent else 0)
    return config, attributes


class Driver:
    """The CUDA driver's library, opened at the first launch that needs it. ``name`` defaults to the system's own."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self._library: ctypes.CDLL | None = None

    def _open(self) -> ctypes.CDLL:
        if self._library is None:
            try:
                library = ctypes.CDLL(self._name)
                entry = library.cuLaunchKernelEx
            except (OSError, AttributeError) as error:
                raise KernelError(f"the CUDA driver ({self._name}) has no cuLaunchKernelEx: {error}") from error
            entry.argtypes = [ctypes.POINTER(LaunchConfig), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
            entry.restype = ctypes.c_int
            library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
            self._library = library
        return self._library

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        stream: int,
        params: ctypes.Array,
        *,
        dependent: bool,
    ) -> None:
        """``cuLaunchKernelEx`` of the ``CUfunction`` handle on the ``CUstream`` handle. Raises ``KernelError``."""
        library = self._open()
        config, keep = launch_config(grid, block, shared_bytes, stream, dependent)
        status = library.cuLaunchKernelEx(ctypes.byref(config), function, params, None)
        del keep
        if status:
            text = ctypes.c_char_p()
            library.cuGetErrorString(status, ctypes.byref(text))
            raise KernelError(f"cuLaunchKernelEx failed with {status}: {(text.value or b'?').decode()}")
