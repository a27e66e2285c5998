"""What ``exl info`` shows: versions, hardware, and what is missing with the command that installs it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

import exl
from exl.errors import KernelError, NoGpuError
from exl.kernels.compiler import default_cache_folder
from exl.kernels.environment import CUPY_WHEELS, diagnose, gpu_facts, installed_of


def describe_system() -> dict[str, str]:
    import torch

    from exl.threads import describe_threads

    facts = {
        "exl": exl.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {describe_threads()}",
        "cpu kernels": _describe_cpu_kernels(),
        "gpu": _describe_gpu(torch),
        "cupy": _versions(CUPY_WHEELS),
        "nvrtc": _describe_nvrtc(),
        "kernel cache": str(default_cache_folder()),
    }
    facts["missing"] = _missing() or "nothing"
    return facts


def _describe_cpu_kernels() -> str:
    from exl.ops.cpu_target import torch_target, why_not_compiled

    reason = why_not_compiled()
    if reason is not None:
        int4pack = torch_target().int4pack
        return f"torch's, 4 bits by {'int4pack' if int4pack else 'f32 panels'}: exl's own cannot run: {reason}"
    from llvmlite.binding import llvm_version_info

    from exl.cpu_kernels.library import shared_library

    version = ".".join(map(str, llvm_version_info))
    return f"exl's own for {shared_library().isa}, compiled by llvmlite {metadata.version('llvmlite')} (LLVM {version})"


def _describe_gpu(torch) -> str:
    if not torch.cuda.is_available():
        driver = gpu_facts().driver
        if driver is None or not driver.archs:
            return str(diagnose(gpu_facts()))
        return f"compute capability {', '.join(str(arch / 10) for arch in driver.archs)}, which torch does not see"
    names = []
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        names.append(f"{props.name} (sm_{props.major}{props.minor}, {props.total_memory / 1e9:.1f} GB)")
    return ", ".join(names)


def _describe_nvrtc() -> str:
    """The NVRTC that compiles kernels: several may be installed."""
    from exl.kernels.launch import CupyCompiler

    try:
        return CupyCompiler().describe()
    except KernelError:
        return "not found"


def _missing() -> str | None:
    """The next thing to install or repair, if any: a GPU that is present must run a first kernel."""
    from exl.kernels.device import open_backend

    try:
        open_backend()
    except NoGpuError:
        return None
    except KernelError as error:
        return " ".join(str(error).strip().splitlines()[0].split())
    return None


def _versions(distributions: Sequence[str]) -> str:
    found = [f"{name} {metadata.version(name)}" for name in installed_of(distributions)]
    return ", ".join(found) or "not installed"
