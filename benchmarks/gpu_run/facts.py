"""The *facts* stage: describes this machine, one independent fact per line; a missing part is also a fact."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from benchmarks.gpu_run.worker import append
from benchmarks.guard import one_line

# Distributions whose versions matter to a run. The first ones are required; the others are optional.
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "pytest")
WELCOME = ("transformers", "hypothesis", "triton")
NOT_NEEDED = ("pytest-xdist", "prompt_toolkit", "pexpect", "gradio", "typer", "rich", "nbformat", "ruff")
TOOLS = ("g++", "nvcc", "addr2line", "nvidia-smi")
SMI_FIELDS = "name,driver_version,compute_cap,memory.total,memory.used,clocks.max.sm,clocks.max.mem,pcie.link.gen.max"
SMI_FIELDS += ",pcie.link.width.current,compute_mode,persistence_mode,mig.mode.current,ecc.mode.current"


def nvidia_smi() -> str:
    """nvidia-smi's fields, or its whole page if this version lacks one of them."""
    for more in ([f"--query-gpu={SMI_FIELDS}", "--format=csv"], []):
        done = subprocess.run(["nvidia-smi", *more], capture_output=True, text=True, timeout=6)
        if done.returncode == 0:
            break
    return (done.stdout + done.stderr).strip()


def python() -> str:
    return f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} processors"


def packages() -> str:
    return ", ".join(f"{name} {_version(name) or 'missing'}" for name in (*NEEDED, *WELCOME))


def cuda_packages() -> str:
    """All installed packages of NVIDIA and CuPy: two builds of one library are worth knowing."""
    names = {d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"]}
    found = sorted(name for name in names if name.lower().startswith(("cupy", "nvidia-cuda", "nvidia-cublas", "cuda-")))
    return ", ".join(f"{name} {_version(name)}" for name in found) or "none"


def missing() -> str:
    absent = [name for name in (*NEEDED, *WELCOME) if _version(name) is None]
    without = [name for name in NOT_NEEDED if _version(name) is None]
    tools = [name for name in TOOLS if shutil.which(name) is None]
    return (
        f"{', '.join(absent) or 'nothing that is needed'}; also absent, not needed: {', '.join(without + tools) or '-'}"
    )


def torch() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"{torch.__version__}, built for CUDA {torch.version.cuda}: finds no GPU"
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    sleep = "is" if hasattr(torch.cuda, "_sleep") else "is NOT"  # timing.py keeps the device busy by it
    return (
        f"{torch.__version__}, built for CUDA {torch.version.cuda}: {properties.name}, compute capability "
        f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch.cuda._sleep {sleep} there"
    )


def cupy() -> str:
    import cupy

    runtime, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    return f"{cupy.__version__}, runtime {runtime}, driver {driver}, {cupy.cuda.runtime.getDeviceCount()} devices"


def nvrtc() -> str:
    """NVRTC's version, the loaded library, and the architectures that it supports."""
    from exl.kernels.launch import CupyCompiler

    compiler = CupyCompiler()
    return f"{compiler.version()} from {', '.join(_loaded('nvrtc')) or '?'}, knows {compiler.archs()}"


def kernel_cache(folder: Path | None, arch: int | None) -> str:
    """How many of exl's kernels are already in the cache."""
    from benchmarks.gpu_run.precompile import cached_count
    from exl.kernels.compiler import default_cache_folder
    from exl.kernels.launch import CupyCompiler

    if arch is None:
        import torch

        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    folder = default_cache_folder() if folder is None else folder
    compiler = CupyCompiler()
    found, total = cached_count(arch, folder, compiler)
    return f"{found} of {total} kernels for sm_{arch} by {compiler.version()} are in {folder}"


def imports() -> str:
    """Imports the parts of exl that later stages use, to find import errors apart from the GPU's."""
    found = []
    for name in ("exl", "exl.kernels.launch", "exl.engine.build", "benchmarks.end_to_end", "benchmarks.kernels"):
        found.append(name if importlib.util.find_spec(name) else f"{name} NOT FOUND")
        __import__(name)
    return ", ".join(found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _loaded(word: str) -> list[str]:
    """Libraries loaded in this process with ``word`` in their names."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if word in Path(path).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--kernel-cache", type=Path)
    arguments = parser.parse_args()
    facts: dict[str, Callable[[], str]] = {
        "nvidia-smi": nvidia_smi,
        "python": python,
        "packages": packages,
        "CUDA packages": cuda_packages,
        "missing": missing,
        "torch": torch,
        "CuPy": cupy,
        "NVRTC": nvrtc,
        "kernel cache": lambda: kernel_cache(arguments.kernel_cache, None),
        "imports": imports,
    }
    for name, tell in facts.items():
        try:
            text = tell()
        except Exception as error:
            text = f"not found out: {one_line(error)}"
        print(f"{name}: {text}", file=sys.stdout, flush=True)
        append(arguments.results, stage="facts", item=name, event="fact", text=text)


if __name__ == "__main__":
    main()
