"""``cuLaunchKernelEx`` by ctypes: it carries the launch attributes that CuPy's ``cuLaunchKernel`` cannot, and takes
structures that are filled in once.

Structures follow ``cuda.h`` of CUDA 12 and 13 (section "Execution Control" of the driver API reference).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

from exl.errors import KernelError
from exl.kernels.params import Params

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


class DriverLaunch:
    """One launch as ``cuLaunchKernelEx`` takes it, every structure filled in but for the stream."""

    def __init__(
        self,
        driver: Driver,
        what: str,
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        params: Params,
        shared_bytes: int,
        dependent: bool,
    ) -> None:
        """``what`` is for messages, ``function`` a ``CUfunction`` handle."""
        attributes = (LaunchAttribute * 1)(LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=int(dependent)))
        self._config = LaunchConfig(*grid, *block, shared_bytes, None, attributes, 1 if dependent else 0)
        self._stream = 0
        self._driver, self._what, self._params = driver, what, params
        # Made once: ctypes turns no argument into another when it is called with these.
        self._entry = driver.open().cuLaunchKernelEx
        self._arguments = ctypes.byref(self._config), ctypes.c_void_p(function), params.pointers, None

    def start(self, stream: int) -> None:
        """On the ``CUstream`` handle. Raises ``KernelError``. The driver copies the arguments before it returns."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        status = self._entry(*self._arguments)
        if status:
            raise KernelError(f"{self._what}: cuLaunchKernelEx failed with {status}: {self._driver.error_text(status)}")


class Driver:
    """The CUDA driver's library, opened when the first launch is prepared. ``name`` defaults to the system's own."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self._library: ctypes.CDLL | None = None

    def open(self) -> ctypes.CDLL:
        """Raises ``KernelError``. No ``argtypes`` for the launch: its arguments are ctypes' own objects already."""
        if self._library is None:
            try:
                library = ctypes.CDLL(self._name)
                library.cuLaunchKernelEx.restype = ctypes.c_int
            except (OSError, AttributeError) as error:
                raise KernelError(f"the CUDA driver ({self._name}) has no cuLaunchKernelEx: {error}") from error
            library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
            self._library = library
        return self._library

    def error_text(self, status: int) -> str:
        text = ctypes.c_char_p()
        self.open().cuGetErrorString(status, ctypes.byref(text))
        return (text.value or b"?").decode()
