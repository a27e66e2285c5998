"""Kernels of loaded modules on a GPU: how their launches are prepared and started."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from exl.errors import KernelError
from exl.kernels.args import Arg
from exl.kernels.driver import Driver, DriverLaunch
from exl.kernels.params import Params
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Dim, Work
from exl.layout.arch import DEFAULT_SHARED_BYTES

MAX_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_THREAD = threading.local()  # bound: devices whose context this thread has


def cuda_errors(cupy: Any) -> tuple[type[Exception], ...]:
    """What CuPy's calls raise: those to the driver, and those to CUDA's runtime, such as entering a device, which fail
    first if the driver is older than the runtime that CuPy brings."""
    return cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError


def start_work(device: torch.device, work: Sequence[Work]) -> None:
    """On torch's current stream of ``device``, asked for once; the driver needs the device's context to be current."""
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            start_work(device, work)
        return
    stream = torch.cuda.current_stream(device)
    bound = _THREAD.__dict__.setdefault("bound", set())
    if device.index not in bound:
        # The driver's own calls, unlike the runtime's, do not make the device's context current in a new thread. A
        # capture was begun by the runtime, and would be broken by a query.
        if not torch.cuda.is_current_stream_capturing():
            stream.query()
        bound.add(device.index)
    for one in work:
        one.start(stream.cuda_stream)


class CudaFunction:
    """A kernel of a loaded module."""

    def __init__(self, spec: KernelSpec, device: torch.device, function: Any, driver: Driver, cupy: Any) -> None:
        self.spec = spec
        self.device = device
        self._function = function  # keeps its module loaded
        self._driver = driver
        self._cupy = cupy
        self._errors = cuda_errors(cupy)
        self._shared_bytes = DEFAULT_SHARED_BYTES

    def prepare(self, grid: Dim, block: Dim, params: Params, shared_bytes: int, dependent: bool) -> DriverLaunch:
        if shared_bytes > self._shared_bytes:
            try:
                with self._cupy.cuda.Device(self.device.index):
                    self._cupy.cuda.driver.funcSetAttribute(self._function.ptr, MAX_SHARED_ATTRIBUTE, shared_bytes)
            except self._errors as error:
                raise KernelError(f"{self.spec} with {shared_bytes} bytes of shared memory: {error}") from error
            self._shared_bytes = shared_bytes
        what = f"{self.spec} on grid {grid}, block {block}, {shared_bytes} bytes"
        dependent = dependent and self.spec.arch >= 90
        return DriverLaunch(self._driver, what, self._function.ptr, grid, block, params, shared_bytes, dependent)

    def run(self, grid: Dim, block: Dim, args: Sequence[Arg], shared_bytes: int, dependent: bool) -> None:
        start_work(self.device, (self.prepare(grid, block, Params(args), shared_bytes, dependent),))
