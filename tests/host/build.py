"""Kernels compiled by g++: one shared library per kernel variant and build, kept by digest under ``build/host``."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

from exl.errors import KernelError
from exl.kernels.compiler import write_file
from exl.kernels.spec import KernelSpec, flattened

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "host"
COMPILER = "g++"

# -ffp-contract=off for the same reason as NVRTC's --fmad=false: a fused operation is one that the source asks for.
COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fcf-protection=none",
    "-DEXL_HOST",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-unused-function")
KERNEL = ("-O1", "-g1", "-gdwarf-4", "-fno-omit-frame-pointer", "-fno-thread-jumps", "-fno-optimize-sibling-calls")
RUNTIME = ("-O2", "-g1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")
UNDEFINED = ("-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr,return")
BUILDS = {
    "plain": ((), ()),
    "race": (("-fsanitize=thread", *UNDEFINED), ()),
    "asan": (
        ("-fsanitize=address", "-fsanitize-recover=address", "--param=asan-stack=1", *UNDEFINED),
        ("-fsanitize=address",),
    ),
}


@functools.cache
def compiler_version() -> str:
    try:
        return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[
            0
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelError(f"the host shim needs {COMPILER} 12 or newer: {error}") from error


@functools.cache
def machine_options() -> tuple[str, ...]:
    """Hardware half conversions where there are some: several times faster, the same bits."""
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
        if {"avx2", "f16c", "fma", "bmi2", "movbe"} <= flags:
            return ("-march=x86-64-v3",)
    return ()


@functools.cache
def shim_sources() -> str:
    """Digest of every file that the shim itself consists of."""
    h = hashlib.sha256()
    for path in sorted([*HERE.glob("include/exl_host/*"), *HERE.glob("src/*")]):
        h.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return h.hexdigest()


def build(spec: KernelSpec, mode: str, folder: Path | None = None, extra: tuple[str, ...] = ()) -> Path:
    """The shared library of ``spec`` in one of ``BUILDS``; ``folder`` holds its source (default: exl's kernels).

    ``extra`` options reach the runtime too. Raises ``KernelError`` with the compiler's output.
    """
    instrument, link = BUILDS[mode]
    common = (*COMMON, *machine_options(), f"-DEXL_ARCH={spec.arch}", f"-DEXL_{mode.upper()}", *extra)
    common += (f"-I{HERE / 'include'}", f"-I{HERE / 'include' / 'exl_host'}")
    runtime = _cached(
        "runtime", (HERE / "src" / "runtime.cpp").read_text(), ".o", (*common, *RUNTIME, f"-I{HERE / 'src'}", "-c")
    )
    text = f"{flattened(spec, folder)}#include <exl_host/kernel_main.hpp>\n"
    options = (*common, *KERNEL, *WARNINGS, *instrument, *spec.defines(), f"-DEXL_HOST_ENTRY={spec.entry}", "-c")
    kernel = _cached(spec.entry, text, ".o", options)
    objects = (str(kernel), str(runtime))
    return _cached(spec.entry, "", ".so", ("-shared", *link, *objects, "-Wl,--no-undefined", "-lm"))


def _cached(name: str, text: str, suffix: str, options: tuple[str, ...]) -> Path:
    h = hashlib.sha256("\0".join((compiler_version(), shim_sources(), text, *options)).encode())
    path = CACHE / f"{name}-{h.hexdigest()[:24]}{suffix}"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{suffix}")
    command = [COMPILER, *options, "-o", str(temporary)]
    if text:
        source = path.with_suffix(".cpp")
        write_file(source, text.encode())
        command.append(str(source))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise KernelError(f"{name} does not compile for the host:\n{done.stderr[:6000]}\ncommand: {' '.join(command)}")
    os.replace(temporary, path)
    return path
