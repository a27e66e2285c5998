"""What this machine has for computing on a GPU, and the command that brings what it lacks.

The parts fail in their own words, or without a word: a torch that is built for the CPU sees no GPU and says nothing,
CuPy for CUDA 13 fails in its first call on a driver that knows CUDA 12. So the driver is asked directly, by ctypes,
and what pip has installed is compared with it. Nothing here imports torch or CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CUPY_WHEELS = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy")
_CUDA13_WHEELS = ("cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13")  # that bring an NVRTC
# The first driver of each CUDA major; CUDA's minor versions are compatible ("CUDA Compatibility", NVIDIA).
_DRIVERS = {12: 525, 13: 580}
# CUDA 13 and what is built for it begin at Turing; CUDA 12.6, whose wheels PyTorch has besides, ends at Hopper.
_MIN_CUDA13_ARCH, _MIN_BLACKWELL_ARCH = 75, 100
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class DriverFacts:
    """What NVIDIA's driver says of itself."""

    cuda: int = 0  # the newest CUDA that it knows: 12080 is 12.8; 0: it does not say
    error: str = ""  # why it does not start
    archs: tuple[int, ...] = ()  # compute capability of each GPU that it shows: 86 is 8.6


@dataclass(frozen=True)
class GpuFacts:
    has_nvidia: bool = False  # an NVIDIA GPU on the PCI bus, or traces of its driver
    driver: DriverFacts | None = None  # None: its library cannot be loaded
    hidden: bool = False  # CUDA_VISIBLE_DEVICES is set
    torch_version: str = ""  # "2.13.0+cpu"; empty: not installed
    torch_cuda: str | None = None  # "13.0", what torch is built for; None: not for CUDA
    cupy: tuple[str, ...] = ()  # CuPy's wheels that are installed


@dataclass(frozen=True)
class Finding:
    """Why exl cannot use a GPU, as far as this can be told before one is used."""

    has_gpu: bool  # False: there is none, or none is shown, and nothing needs to be installed
    problem: str
    remedy: str = ""  # the command, or what else to do

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}" if self.remedy else self.problem


def torch_command(cuda: int = 13) -> str:
    """What replaces an installed torch by one for CUDA 12 or 13. The index is PyTorch's own, and the old one goes
    first: to pip, a build for the CPU is that version already."""
    index = "https://download.pytorch.org/whl/" + ("cu130" if cuda >= 13 else "cu126")
    return f"pip uninstall -y torch, then pip install torch --index-url {index}"


def cupy_command(cuda: int = 13, remove: Iterable[str] = ()) -> str:
    """What brings CuPy for CUDA 12 or 13, with its NVRTC."""
    removed = " ".join(remove)
    return (f"pip uninstall -y {removed}, then " if removed else "") + f'pip install "cupy-cuda{cuda}x[ctk]"'


def nvrtc_command(installed: Callable[[str], str] = metadata.version) -> str:
    """What makes CuPy take CUDA 12's NVRTC: wheels that bring CUDA 13's go, as the first found is loaded."""
    return f"{cupy_command(12, installed_of(_CUDA13_WHEELS, installed))} nvidia-cuda-nvrtc-cu12"


def diagnose(facts: GpuFacts) -> Finding | None:
    """The first thing that is in the way; None: nothing that can be told beforehand."""
    return _diagnose_driver(facts) or _diagnose_torch(facts) or _diagnose_cupy(facts)


def _diagnose_driver(facts: GpuFacts) -> Finding | None:
    driver = facts.driver
    if driver is None:
        if not facts.has_nvidia:
            return Finding(False, "no NVIDIA GPU was found")
        return Finding(
            True,
            "there is an NVIDIA GPU, but its driver's library was not found",
            f"install NVIDIA's driver, {_DRIVERS[13]} or newer (in a container: start it with its GPUs)",
        )
    if driver.error:
        return Finding(True, f"NVIDIA's driver does not start ({driver.error})", "install it anew, restart the machine")
    if not driver.archs:
        hidden = ", CUDA_VISIBLE_DEVICES is set" if facts.hidden else ""
        return Finding(False, f"NVIDIA's driver shows no GPU{hidden}")
    if 0 < driver.cuda < 12000:
        return Finding(True, _old(driver), f"install {_DRIVERS[13]} or newer")
    return None


def _diagnose_torch(facts: GpuFacts) -> Finding | None:
    driver, wanted = facts.driver, _cuda_major(facts.driver)
    if facts.torch_cuda is None:
        name = f"torch {facts.torch_version}" if facts.torch_version else "torch"
        return Finding(
            True, f"there is an NVIDIA GPU, but {name} is not built for CUDA", _or_driver(driver, torch_command(wanted))
        )
    major = int(facts.torch_cuda.split(".")[0])
    if driver.cuda and major > driver.cuda // 1000:
        problem = f"{_old(driver)}, torch is built for CUDA {facts.torch_cuda}"
        update = f"install driver {_DRIVERS.get(major, _DRIVERS[13])} or newer"
        if min(driver.archs) >= _MIN_BLACKWELL_ARCH:
            return Finding(True, problem, update)
        return Finding(True, problem, f"{update}, or keep it: {torch_command(12)}")
    if major >= 13 and min(driver.archs) < _MIN_CUDA13_ARCH:
        problem = f"torch is built for CUDA {facts.torch_cuda}, which no longer knows compute capability "
        return Finding(True, f"{problem}{min(driver.archs) / 10}", torch_command(12))
    return None


def _diagnose_cupy(facts: GpuFacts) -> Finding | None:
    driver, wanted = facts.driver, _cuda_major(facts.driver)
    if not facts.cupy:
        return Finding(True, "CuPy, through which kernels are compiled, is not installed", cupy_command(wanted))
    if len(facts.cupy) > 1:
        found = " and ".join(facts.cupy)
        return Finding(True, f"{found} are installed, which disturb each other", cupy_command(wanted, facts.cupy))
    (wheel,) = facts.cupy
    if wheel != "cupy-cuda13x" or wanted >= 13:
        return None
    if driver.cuda and driver.cuda < 13000:
        problem, update = f"{_old(driver)}, {wheel} needs {_DRIVERS[13]}", f"install driver {_DRIVERS[13]} or newer"
        return Finding(True, problem, f"{update}, or keep it: {cupy_command(12, facts.cupy)}")
    problem = f"{wheel} no longer knows compute capability {min(driver.archs) / 10}"
    return Finding(True, problem, cupy_command(12, facts.cupy))


def _cuda_major(driver: DriverFacts) -> int:
    """The CUDA whose wheels suit this machine."""
    if min(driver.archs) < _MIN_CUDA13_ARCH:
        return 12
    return 12 if driver.cuda and driver.cuda < 13000 and min(driver.archs) < _MIN_BLACKWELL_ARCH else 13


def _or_driver(driver: DriverFacts, command: str) -> str:
    """A Blackwell GPU has no wheels for an older driver."""
    old = bool(driver.cuda) and driver.cuda < 13000 and min(driver.archs) >= _MIN_BLACKWELL_ARCH
    return f"install driver {_DRIVERS[13]} or newer, then {command}" if old else command


def _old(driver: DriverFacts) -> str:
    return f"NVIDIA's driver is too old: it knows CUDA {driver.cuda // 1000}.{driver.cuda % 1000 // 10}"


# ---- asking the machine ---------------------------------------------------------------------------------------------


@functools.cache
def gpu_facts() -> GpuFacts:
    """Asked once a process."""
    import torch

    return find_facts(torch.__version__, torch.version.cuda)


def find_facts(
    torch_version: str,
    torch_cuda: str | None,
    *,
    load: Callable[[str], Any] = ctypes.CDLL,
    root: Path = Path("/"),
    which: Callable[[str], str | None] = shutil.which,
    installed: Callable[[str], str] = metadata.version,
) -> GpuFacts:
    """``load`` opens the driver's library, ``root`` has ``proc`` and ``sys``, ``installed`` raises for what pip has
    not: tests bring their own."""
    driver = _ask_driver(load)
    traces = driver is not None or (root / "proc/driver/nvidia/version").exists() or which("nvidia-smi") is not None
    return GpuFacts(
        has_nvidia=traces or _on_pci_bus(root / "sys/bus/pci/devices"),
        driver=driver,
        hidden="CUDA_VISIBLE_DEVICES" in os.environ,
        torch_version=torch_version,
        torch_cuda=torch_cuda,
        cupy=installed_of(CUPY_WHEELS, installed),
    )


def installed_of(names: Iterable[str], installed: Callable[[str], str] = metadata.version) -> tuple[str, ...]:
    """Those of these distributions that pip has installed."""
    found = []
    for name in names:
        try:
            installed(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def loaded_nvrtc(major: int, maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The file that this process has loaded as that CUDA's NVRTC; None where the system does not tell."""
    if sys.platform == "win32":
        return _loaded_dll(f"nvrtc64_{major}0_0.dll")
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    name = re.compile(rf"libnvrtc(\.alt)?\.so\.{major}(\.|$)")
    paths = (Path(line[line.index("/") :]) for line in lines if "/" in line)
    return next((path for path in paths if name.match(path.name)), None)


def _loaded_dll(name: str) -> Path | None:
    kernel32 = ctypes.windll.kernel32
    kernel32.GetModuleHandleW.argtypes, kernel32.GetModuleHandleW.restype = [ctypes.c_wchar_p], ctypes.c_void_p
    kernel32.GetModuleFileNameW.argtypes = [ctypes.c_void_p, ctypes.c_wchar_p, ctypes.c_uint32]
    handle = kernel32.GetModuleHandleW(name)
    text = ctypes.create_unicode_buffer(32768)
    if not handle or not kernel32.GetModuleFileNameW(handle, text, len(text)):
        return None
    return Path(text.value)


def driver_library() -> str:
    """The name by which the system finds it."""
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def _ask_driver(load: Callable[[str], Any]) -> DriverFacts | None:
    try:
        library = load(driver_library())
        init, version, count = library.cuInit, library.cuDriverGetVersion, library.cuDeviceGetCount
        attribute = library.cuDeviceGetAttribute
    except (OSError, AttributeError):
        return None
    cuda, number = ctypes.c_int(), ctypes.c_int()
    version(ctypes.byref(cuda))  # the one call that needs no cuInit
    status = init(0)
    if status in (0, _NO_DEVICE):
        status = count(ctypes.byref(number)) if status == 0 else 0
    if status:
        return DriverFacts(cuda.value, _error_text(library, status))
    archs = []
    for device in range(number.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        attribute(ctypes.byref(major), _MAJOR_ATTRIBUTE, device)
        attribute(ctypes.byref(minor), _MINOR_ATTRIBUTE, device)
        archs.append(major.value * 10 + minor.value)
    return DriverFacts(cuda.value, archs=tuple(archs))


def _error_text(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown').decode()}, error {status}"


def _on_pci_bus(devices: Path) -> bool:
    """A display controller of NVIDIA's, as Linux lists them."""
    for vendor in devices.glob("*/vendor"):
        try:
            if vendor.read_text("ascii").strip() != "0x10de":
                continue
            if (vendor.parent / "class").read_text("ascii").startswith("0x03"):
                return True
        except (OSError, UnicodeDecodeError):
            continue
    return False
