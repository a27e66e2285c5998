"""A fake GPU on the CPU, with its driver and CuPy. Each of its calls can be made to fail.

Tensors that exl takes for GPU tensors are in the CPU's memory. The one kernel that runs when a GPU is opened
(``gated_product``) is computed here from the launch's raw parameters.
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from exl.kernels import cuda_function, device, launch
from exl.kernels.launch import CudaBackend


class CUDADriverError(RuntimeError):
    """Replaces CuPy's, which is a RuntimeError, too."""


class CUDARuntimeError(RuntimeError):
    """In the place of CuPy's."""


class NVRTCError(RuntimeError):
    """In the place of CuPy's."""


TOO_OLD = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


class FakeGpu:
    """``failing``: a call ("torch", "version", "nvrtc", "compile", "module", "device", "load", "stream", "launch",
    "product") -> the exception that it raises."""

    def __init__(self, arch: int = 86, nvrtc: tuple[int, int] = (13, 0), archs: tuple[int, ...] = (75, 86)) -> None:
        self.arch, self.nvrtc, self.archs = arch, nvrtc, archs
        self.failing: dict[str, Exception] = {}
        self.answer = lambda gate, up: gate / (1 + np.exp(-gate)) * up

    def call(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]

    # fakes for torch, CuPy and its binding of NVRTC

    def install(self, monkeypatch) -> None:
        def get_properties(device: torch.device) -> SimpleNamespace:
            self.call("torch")
            return SimpleNamespace(major=self.arch // 10, minor=self.arch % 10, multi_processor_count=4)

        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "init": lambda: None,
            "get_device_properties": get_properties,
            "get_device_name": lambda device: "a GPU",
            "current_stream": lambda device: self.call("stream"),
            "is_current_stream_capturing": lambda: False,
            "mem_get_info": lambda device: (8 << 30, 8 << 30),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        cupy = ModuleType("cupy")
        cupy.cuda = SimpleNamespace(
            driver=SimpleNamespace(CUDADriverError=CUDADriverError, funcSetAttribute=lambda *_: self.call("attribute")),
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError),
            function=SimpleNamespace(Module=self._module),
            Device=self._device,
        )
        binding = SimpleNamespace(
            NVRTCError=NVRTCError,
            getVersion=self._version,
            getSupportedArchs=lambda: list(self.archs),
            createProgram=lambda *_: self.call("nvrtc") or 1,
            compileProgram=lambda *_: self.call("compile"),
            getProgramLog=lambda _: "",
            getCUBIN=lambda _: b"code",
            getPTX=lambda _: b"code",
            destroyProgram=lambda _: None,
        )
        libs = SimpleNamespace(nvrtc=binding)
        for name, module in {
            "cupy": cupy,
            "cupy_backends": SimpleNamespace(cuda=SimpleNamespace(libs=libs)),
            "cupy_backends.cuda": SimpleNamespace(libs=libs),
            "cupy_backends.cuda.libs": libs,
            "cupy_backends.cuda.libs.nvrtc": binding,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(device, "CudaBackend", _OnTheCpu)
        monkeypatch.setattr(launch, "Driver", lambda: _Driver(self))
        for module in (launch, cuda_function):
            monkeypatch.setattr(module, "start_work", _start_work)
        monkeypatch.setattr(torch, "mm", lambda x, y, out_dtype: self.call("product"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def _version(self) -> tuple[int, int]:
        self.call("version")
        return self.nvrtc

    def _module(self) -> SimpleNamespace:
        self.call("module")
        return SimpleNamespace(
            load=lambda code: self.call("load"), get_function=lambda name: SimpleNamespace(ptr=1, name=name)
        )

    def _device(self, index: int | None):
        outer = self

        class Scope:
            def __enter__(self) -> None:
                outer.call("device")

            def __exit__(self, *_: object) -> None:
                pass

        return Scope()

    def launch(self, slots: ctypes.Array) -> None:
        """``slots``: addresses of the kernel's arguments."""

        def array(slot: int, count: int, dtype: type) -> np.ndarray:
            address = ctypes.c_uint64.from_address(slots[slot]).value
            raw = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
            return np.frombuffer(raw, dtype)

        count = ctypes.c_int32.from_address(slots[4]).value
        gate, up = (array(i, count, np.float16).astype(np.float32) for i in (0, 1))
        array(2, count, np.float32)[:] = self.answer(gate, up)


class _Driver:
    """Replaces ``exl.kernels.driver.Driver``."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._error = gpu, ""

    def open(self) -> SimpleNamespace:
        return SimpleNamespace(cuLaunchKernelEx=self._launch)

    def _launch(self, config: object, function: object, slots: ctypes.Array, extra: None) -> int:
        try:
            self._gpu.call("launch")
        except CUDADriverError as error:
            self._error = str(error)
            return 719
        self._gpu.launch(slots)
        return 0

    def error_text(self, status: int) -> str:
        return self._error


def _start_work(device: torch.device, work: list) -> None:
    torch.cuda.current_stream(device)
    for one in work:
        one.start(0)


class _OnTheCpu(CudaBackend):
    """A backend whose tensors are in CPU memory, where the test can read them."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.device = torch.device("cpu")
