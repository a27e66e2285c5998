"""Opening a GPU succeeds, or says at once why not: each part is made to fail in turn, on a fake GPU."""

from __future__ import annotations

import ctypes
import logging
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.engine import build
from exl.engine.build import choose_device
from exl.errors import ConfigError, KernelError
from exl.kernels import compiler
from exl.kernels.device import check_backend, open_backend
from exl.kernels.environment import DriverFacts, GpuFacts, loaded_nvrtc, nvrtc_command
from exl.planning.options import EngineOptions
from tests.compile.nvrtc import nvrtc
from tests.host.fake_gpu import TOO_OLD, CUDADriverError, CUDARuntimeError, FakeGpu, NVRTCError
from tests.host.shim import HostShim, ShimBackend

GOOD = GpuFacts(True, DriverFacts(13000, archs=(86,)), torch_version="2.13", torch_cuda="13.0", cupy=("cupy-cuda13x",))


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> FakeGpu:
    fake = FakeGpu()
    fake.install(monkeypatch)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(compiler, "default_cache_folder", lambda: tmp_path)
    monkeypatch.setattr("exl.kernels.device.gpu_facts", lambda: GOOD)
    build._say_once.cache_clear()
    return fake


def test_a_gpu_that_works_is_taken(gpu, caplog):
    options, backend = choose_device(EngineOptions())
    assert backend.arch == 86
    assert options.vram > 4 << 30
    assert not caplog.records


BROKEN = {
    "the driver is older than CuPy's runtime": ("device", CUDARuntimeError(TOO_OLD)),
    "a module is made in no context": ("module", CUDARuntimeError("cudaErrorInitializationError")),
    "code is refused": ("load", CUDADriverError("CUDA_ERROR_NO_BINARY_FOR_GPU")),
    "a launch fails": ("launch", CUDADriverError("CUDA_ERROR_LAUNCH_FAILED")),
    "torch has no stream": ("stream", RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")),
    "torch cannot use it": ("torch", RuntimeError("CUDA error: out of memory")),
    "cuBLAS has no room": ("product", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    "no NVRTC": ("version", RuntimeError("CuPy failed to load libnvrtc.so.13")),
    "NVRTC makes no program": ("nvrtc", NVRTCError("NVRTC_ERROR_OUT_OF_MEMORY")),
    "the kernel does not compile": ("compile", NVRTCError("NVRTC_ERROR_INVALID_OPTION")),
}


@pytest.mark.parametrize(("call", "error"), BROKEN.values(), ids=BROKEN)
def test_a_gpu_that_does_not_work_is_left_alone_with_one_line(gpu, caplog, call, error):
    gpu.failing[call] = error
    options, backend = choose_device(EngineOptions())
    assert backend is None
    assert options.vram is None
    (record,) = [
        record for record in caplog.records if record.levelno >= logging.WARNING and record.name == "exl.engine.build"
    ]
    text = record.getMessage()
    assert text.startswith("computing on the CPU: ")
    assert "\n" not in text
    if call != "compile":  # its first line names the kernel; the log follows
        assert str(error) in text
    choose_device(EngineOptions())
    assert len([r for r in caplog.records if r.getMessage() == text]) == 1  # once per process
    with pytest.raises(ConfigError, match="device='cuda': found no GPU that exl can use") as raised:
        choose_device(EngineOptions(device="cuda"))
    assert str(error).split(":")[0] in str(raised.value)


def test_a_gpu_that_computes_wrongly_is_not_used(gpu):
    gpu.answer = lambda gate, up: np.zeros_like(gate)
    with pytest.raises(KernelError, match=r"runs a first kernel wrongly: found 0.0, expected 3.52"):
        open_backend()


def test_errors_of_a_later_launch_are_kernel_errors(gpu):
    """The device is lost after it was opened."""
    backend = open_backend()
    gpu.failing["launch"] = CUDADriverError("CUDA_ERROR_DEVICE_UNAVAILABLE")
    with pytest.raises(KernelError, match="CUDA_ERROR_DEVICE_UNAVAILABLE"):
        check_backend(backend)


def test_without_cupy_the_gpu_is_left_alone(gpu, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert choose_device(EngineOptions())[1] is None
    assert "CuPy is not installed" in caplog.text


def test_the_first_kernel_is_right_where_kernels_run():
    check_backend(ShimBackend(HostShim("race")))


# ---- which NVRTC ----------------------------------------------------------------------------------------------------

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 11  /venv/lib/libnvrtc-builtins.so.13.0
7f02-7f03 r-xp 00000000 08:01 12  /venv/my env/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
7f04-7f05 r-xp 00000000 08:01 13  /venv/my env/nvidia/cu13/lib/libnvrtc.so.13
7f06-7f07 rw-p 00000000 00:00 0
"""


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "cupy-cuda12x"), "pip uninstall -y nvidia-cuda-nvrtc, then "),
        (("cupy-cuda13x", "nvidia-cuda-nvrtc"), "pip uninstall -y cupy-cuda13x nvidia-cuda-nvrtc, then "),
        ((), ""),
    ],
)
def test_an_nvrtc_that_is_too_new_is_named_with_the_wheel_to_remove(gpu, monkeypatch, tmp_path, installed, command):
    """Pascal with both CUDA 12 and 13 installed: CuPy found CUDA 13's NVRTC first."""

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "13.0.88"

    (tmp_path / "maps").write_text(MAPS)
    gpu.arch = 61
    monkeypatch.setattr("exl.kernels.launch.nvrtc_command", lambda: nvrtc_command(version))
    monkeypatch.setattr("exl.kernels.launch.loaded_nvrtc", lambda major: loaded_nvrtc(major, tmp_path / "maps"))
    with pytest.raises(ConfigError) as raised:
        choose_device(EngineOptions(device="cuda"))
    assert (
        "NVRTC 13.0 (/venv/my env/nvidia/cu13/lib/libnvrtc.so.13) cannot compile for compute capability 6.1: it begins "
        f"at 7.5, and CUDA 12 is the last that knows 6.x and 7.0: {command}"
        'pip install "cupy-cuda12x[ctk]" nvidia-cuda-nvrtc-cu12'
    ) in str(raised.value)


def test_the_nvrtc_that_is_loaded_is_found():
    """The real NVRTC, if it is installed, as loaded in this process."""
    if nvrtc() is None or sys.platform != "linux":
        pytest.skip("NVRTC is not installed")
    major = int(nvrtc().version().split()[1].split(".")[0])
    path = loaded_nvrtc(major)
    assert path.name.startswith("libnvrtc")
    assert path.is_file()
    assert loaded_nvrtc(major + 50) is None
    assert loaded_nvrtc(major, path / "nothing") is None


def test_windows_is_asked_for_the_file(monkeypatch):
    def file_name(handle: int, text, size: int) -> int:
        text.value = r"C:\env\nvrtc64_130_0.dll"
        return len(text.value)

    names = {"nvrtc64_130_0.dll": 0x7FF0}
    kernel32 = SimpleNamespace(GetModuleHandleW=FakeFunction(names.get), GetModuleFileNameW=FakeFunction(file_name))
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert str(loaded_nvrtc(13)) == r"C:\env\nvrtc64_130_0.dll"
    assert loaded_nvrtc(12) is None


class FakeFunction:
    """Stands for a library function, whose types ctypes code sets as attributes."""

    argtypes = restype = None

    def __init__(self, run) -> None:
        self._run = run

    def __call__(self, *args: object) -> object:
        return self._run(*args)
