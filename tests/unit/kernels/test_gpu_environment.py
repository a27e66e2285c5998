"""For every reason why a GPU is not used: the missing part is named, with the command that installs it."""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from exl.commands import system_info
from exl.engine import build
from exl.engine.build import choose_device
from exl.errors import ConfigError
from exl.kernels import environment
from exl.kernels.environment import CUPY_WHEELS, DriverFacts, GpuFacts, diagnose, find_facts
from exl.planning.options import EngineOptions

README = Path(__file__).parents[3] / "README.md"
TORCH13 = "pip uninstall -y torch, then pip install torch --index-url https://download.pytorch.org/whl/cu130"
TORCH12 = TORCH13.replace("cu130", "cu126")
CUPY13, CUPY12 = 'pip install "cupy-cuda13x[ctk]"', 'pip install "cupy-cuda12x[ctk]"'


def facts(
    cuda: int = 13000,
    arch: int = 89,
    torch_cuda: str | None = "13.0",
    cupy: tuple[str, ...] = ("cupy-cuda13x",),
    error: str = "",
) -> GpuFacts:
    archs = () if error else (arch,)
    version = "2.13.0+cpu" if torch_cuda is None else f"2.13.0+cu{torch_cuda.replace('.', '')}"
    return GpuFacts(True, DriverFacts(cuda, error, archs), torch_version=version, torch_cuda=torch_cuda, cupy=cupy)


NO_CUDA = "there is an NVIDIA GPU, but torch 2.13.0+cpu is not built for CUDA: "
# The machine's facts -> the expected message; each command in it fixes the problem.
CASES = {
    "torch for the CPU": (facts(torch_cuda=None), NO_CUDA + TORCH13),
    "torch for the CPU, driver 550": (facts(12040, torch_cuda=None), NO_CUDA + TORCH12),
    "torch for the CPU, Pascal": (facts(arch=61, torch_cuda=None), NO_CUDA + TORCH12),
    "torch for the CPU, Volta": (facts(12020, 70, None), NO_CUDA + TORCH12),
    "torch for the CPU, Blackwell on an older driver": (
        facts(12080, 120, None),
        f"{NO_CUDA}install driver 580 or newer, then {TORCH13}",
    ),
    "no driver": (
        GpuFacts(True, None, torch_version="2.13.0", torch_cuda="13.0"),
        "there is an NVIDIA GPU, but its driver's library was not found: install NVIDIA's driver, 580 or newer (in a "
        "container: start it with its GPUs)",
    ),
    "a driver that does not start": (
        facts(error="system has unsupported display driver, error 803"),
        "NVIDIA's driver does not start (system has unsupported display driver, error 803): install it anew, restart "
        "the machine",
    ),
    "a driver older than torch": (
        facts(12020),
        "NVIDIA's driver is too old: it knows CUDA 12.2, torch is built for CUDA 13.0: install driver 580 or newer, or "
        f"keep it: {TORCH12}",
    ),
    "a driver older than torch, Blackwell": (
        facts(12080, 120),
        "NVIDIA's driver is too old: it knows CUDA 12.8, torch is built for CUDA 13.0: install driver 580 or newer",
    ),
    "a driver older than all": (
        facts(11080),
        "NVIDIA's driver is too old: it knows CUDA 11.8: install 580 or newer",
    ),
    "a driver older than CuPy": (
        facts(12060, torch_cuda="12.6"),
        "NVIDIA's driver is too old: it knows CUDA 12.6, cupy-cuda13x needs 580: install driver 580 or newer, or keep "
        f"it: pip uninstall -y cupy-cuda13x, then {CUPY12}",
    ),
    "torch without Pascal": (
        facts(arch=61),
        f"torch is built for CUDA 13.0, which no longer knows compute capability 6.1: {TORCH12}",
    ),
    "CuPy without Pascal": (
        facts(arch=61, torch_cuda="12.6"),
        f"cupy-cuda13x no longer knows compute capability 6.1: pip uninstall -y cupy-cuda13x, then {CUPY12}",
    ),
    "no CuPy": (facts(cupy=()), f"CuPy, through which kernels are compiled, is not installed: {CUPY13}"),
    "no CuPy, driver 550": (
        facts(12040, torch_cuda="12.6", cupy=()),
        f"CuPy, through which kernels are compiled, is not installed: {CUPY12}",
    ),
    "two CuPys": (
        facts(cupy=("cupy-cuda12x", "cupy-cuda13x")),
        "cupy-cuda12x and cupy-cuda13x are installed, which disturb each other: pip uninstall -y cupy-cuda12x "
        f"cupy-cuda13x, then {CUPY13}",
    ),
    "two CuPys, Pascal": (
        facts(arch=61, torch_cuda="12.6", cupy=("cupy-cuda12x", "cupy-cuda13x")),
        "cupy-cuda12x and cupy-cuda13x are installed, which disturb each other: pip uninstall -y cupy-cuda12x "
        f"cupy-cuda13x, then {CUPY12}",
    ),
}
QUIET = {
    "no GPU": (GpuFacts(torch_version="2.13.0+cpu"), "no NVIDIA GPU was found"),
    "no GPU is shown": (GpuFacts(True, DriverFacts(13000), hidden=True), "NVIDIA's driver shows no GPU, CUDA_VIS"),
}
WORKING = {
    "CUDA 13": facts(),
    "a newer driver": facts(13020),
    "CUDA 12": facts(12040, torch_cuda="12.6", cupy=("cupy-cuda12x",)),
    "Pascal": facts(13000, 61, "12.6", ("cupy-cuda12x",)),
    "CuPy from its sources": facts(cupy=("cupy",)),
    "torch for 12, CuPy for 13": facts(torch_cuda="12.8"),
}


@pytest.mark.parametrize(("found", "text"), (CASES | QUIET).values(), ids=CASES | QUIET)
def test_what_is_in_the_way_is_named(found, text):
    finding = diagnose(found)
    assert str(finding).startswith(text)
    assert finding.has_gpu == (text not in [text for _, text in QUIET.values()])


@pytest.mark.parametrize("found", WORKING.values(), ids=WORKING)
def test_nothing_is_said_of_what_works(found):
    assert diagnose(found) is None


@pytest.fixture
def machine(monkeypatch):
    """Simulates a machine by its facts, with a torch that sees no GPU."""

    def put(found: GpuFacts) -> None:
        for module in (system_info, environment):
            monkeypatch.setattr(module, "gpu_facts", lambda: found)
        monkeypatch.setattr("exl.kernels.device.gpu_facts", lambda: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        build._say_once.cache_clear()

    return put


@pytest.mark.parametrize(("found", "text"), CASES.values(), ids=CASES)
def test_whoever_loads_a_model_is_told(machine, caplog, found, text):
    """One line if the CPU is used, an error if a GPU was requested, and the same text in ``exl info``."""
    machine(found)
    for _ in range(2):
        assert choose_device(EngineOptions())[1] is None
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [f"computing on the CPU: {text}"]
    for options in (EngineOptions(device="cuda"), EngineOptions(vram="8GB")):
        with pytest.raises(ConfigError) as raised:
            choose_device(options)
        assert text in str(raised.value)
    info = system_info.describe_system()
    assert info["missing"] == text
    if found.driver is not None and found.driver.archs:
        arch = found.driver.archs[0] / 10
        assert info["gpu"] == f"compute capability {arch}, which torch does not see"
    else:
        assert info["gpu"] == text


@pytest.mark.parametrize(("found", "text"), QUIET.values(), ids=QUIET)
def test_where_there_is_no_gpu_the_cpu_needs_no_excuse(machine, caplog, found, text):
    machine(found)
    assert choose_device(EngineOptions())[1] is None
    assert not caplog.records
    with pytest.raises(ConfigError, match=re.escape(text)):
        choose_device(EngineOptions(device="cuda"))
    info = system_info.describe_system()
    assert info["missing"] == "nothing"
    assert info["gpu"].startswith(text)


def test_device_cpu_asks_nothing(machine, caplog):
    machine(CASES["torch for the CPU"][0])
    assert choose_device(EngineOptions(device="cpu"))[1] is None
    assert not caplog.records


# ---- asking the machine ---------------------------------------------------------------------------------------------

DRIVER = r"""
extern "C" {
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* v) { *v = 12080; return 0; }
int cuDeviceGetCount(int* n) { if (INIT) return 3; *n = COUNT; return 0; }
int cuDeviceGetAttribute(int* v, int what, int device) {
  *v = what == 75 ? (device ? 6 : 8) : what == 76 ? (device ? 1 : 9) : -1;
  return 0;
}
int cuGetErrorString(int status, const char** text) { *text = status == 803 ? "wrong driver" : "?"; return 0; }
}
"""


def build_driver(folder: Path, init: int, count: int) -> str:
    path = folder / f"libdriver-{init}-{count}.so"
    command = ["g++", "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}", "-x", "c++", "-o", str(path), "-"]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return str(path)


def not_installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def ask(root: Path, load, which=lambda name: None, installed=not_installed) -> GpuFacts:
    return find_facts("2.13.0+cpu", None, load=load, root=root, which=which, installed=installed)


def no_library(name: str):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("init", "count", "expected"),
    [
        (0, 2, DriverFacts(12080, archs=(89, 61))),
        (0, 0, DriverFacts(12080)),
        (100, 0, DriverFacts(12080)),  # CUDA_ERROR_NO_DEVICE: all are hidden, or there is none
        (803, 0, DriverFacts(12080, "wrong driver, error 803")),
    ],
)
def test_the_driver_is_asked(tmp_path, init, count, expected):
    path = build_driver(tmp_path, init, count)
    found = ask(tmp_path, lambda name: ctypes.CDLL(path))
    assert found.driver == expected
    assert found.has_nvidia


def test_a_library_that_is_no_driver(tmp_path):
    assert ask(tmp_path, lambda name: object()).driver is None


@pytest.mark.parametrize("trace", ["proc", "nvidia-smi", "pci", "audio", "other vendor", "none"])
def test_traces_of_a_gpu_without_its_library(tmp_path, trace):
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1002\n" if trace == "other vendor" else "0x10de\n")
    (device / "class").write_text("0x030000\n" if trace in ("pci", "other vendor") else "0x040300\n")
    if trace == "proc":
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version")
    found = ask(tmp_path, no_library, which=lambda name: name if trace == name else None)
    assert found.driver is None
    assert found.has_nvidia == (trace in ("proc", "nvidia-smi", "pci"))


def test_wheels_are_found(tmp_path):
    def installed(name: str) -> str:
        return "14.2" if name in ("cupy-cuda12x", "cupy-cuda13x") else not_installed(name)

    assert ask(tmp_path, no_library, installed=installed).cupy == ("cupy-cuda12x", "cupy-cuda13x")
    assert set(environment.installed_of(CUPY_WHEELS)) <= set(CUPY_WHEELS)


@pytest.mark.parametrize(("platform", "name"), [("win32", "nvcuda.dll"), ("linux", "libcuda.so.1")])
def test_each_system_has_its_name_for_the_driver(monkeypatch, platform, name):
    monkeypatch.setattr("sys.platform", platform)
    assert environment.driver_library() == name


def test_the_readme_has_the_commands():
    """The commands are not run: they download gigabytes."""
    text = README.read_text(encoding="utf-8")
    assert f"\n{TORCH13.split(', then ')[1]}\n" in text
    assert "/".join(TORCH12.split("/")[-2:]) in text
    setup = (README.parent / "setup.py").read_text(encoding="utf-8")
    for extra, command in {"cuda13": CUPY13, "cuda12": CUPY12}.items():
        assert f".[{extra}]" in text
        wheel = command.split('"')[1]
        assert f'"{extra}": ["{wheel}>=' in setup
