"""What ``exl info`` tells: versions, hardware, and what is missing with the command that brings it."""

from __future__ import annotations

import platform
from importlib import metadata

import exl
from exl.kernels.compiler import default_cache_folder


def describe_system() -> dict[str, str]:
    import torch

    from exl.ops.torch_linear import probe_int4pack

    int4pack = probe_int4pack()
    facts = {
        "exl": exl.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "4-bit cpu kernel": f"torch int4pack, {int4pack}" if int4pack else "none: 4-bit weights run through f32 panels",
        "gpu": _describe_gpu(torch),
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "kernel cache": str(default_cache_folder()),
    }
    missing = _missing(torch)
    facts["missing"] = missing or "nothing"
    return facts


def _describe_gpu(torch) -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none" if built else "none that torch can see: this torch is built for the CPU"
    names = []
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        names.append(f"{props.name} (sm_{props.major}{props.minor}, {props.total_memory / 1e9:.1f} GB)")
    return ", ".join(names)


def _missing(torch) -> str | None:
    """The one thing to install next, if any."""
    if not torch.cuda.is_available():
        return None
    if _version("cupy-cuda13x", "cupy-cuda12x", "cupy") != "not installed":
        return None
    major = (torch.version.cuda or "12").split(".")[0]
    return f"CuPy, which compiles the kernels: pip install 'exl-engine[cuda{major}]'"


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
