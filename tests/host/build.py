"""Compiles kernels by g++: one shared library per kernel variant and build, cached by digest under ``build/host``."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from exl.errors import KernelError
from exl.kernels.spec import KernelSpec, flattened

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "host"
COMPILER = "g++"
MAX_FILES = 4000  # in the cache; beyond this the least recently used half is deleted

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
# Debug info has lines, for messages, but no variables: tracking them takes half of the compile time. No jump threading
# past a collective: two copies of one call would look like two call sites.
DEBUG = ("-g1", "-gdwarf-4", "-fno-var-tracking", "-fno-var-tracking-assignments")
KERNEL = ("-O1", *DEBUG, "-fno-omit-frame-pointer", "-fno-thread-jumps", "-fno-optimize-sibling-calls")
RUNTIME = ("-O2", *DEBUG, "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")
# UBSan's checks of null pointers, pointer overflow and object sizes are off: every access is checked exactly anyway.
UNDEFINED = (
    "-fsanitize=undefined,float-cast-overflow",
    "-fno-sanitize=vptr,return,null,object-size,pointer-overflow",
)
ADDRESS = ("-fsanitize=address", "-fsanitize-recover=address", "--param=asan-use-after-return=0")
# These paths are not part of a library's digest, their contents are (``shim_sources``): checkouts can share a cache.
INCLUDES = (f"-I{HERE / 'include'}", f"-I{HERE / 'include' / 'exl_host'}")
BUILDS = {  # name -> options of the kernel, options of the link
    "plain": ((), ()),
    "race": (("-fsanitize=thread", *UNDEFINED), ()),
    "asan": ((*ADDRESS, *UNDEFINED), ("-fsanitize=address",)),
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
    """Options for hardware half conversions, if the CPU has them: several times faster, the same bits."""
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
    text = f"{flattened(spec, folder)}#include <exl_host/kernel_main.hpp>\n"
    options = (*common, *KERNEL, *WARNINGS, *instrument, *spec.defines(), f"-DEXL_HOST_ENTRY={spec.entry}")
    library = _path(spec.entry, ".so", text, *options, *link)
    if not library.exists():
        runtime = _runtime(common)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            source, kernel = Path(scratch) / f"{spec.entry}.cpp", Path(scratch) / f"{spec.entry}.o"
            source.write_text(text)
            _run(str(spec), (*options, *INCLUDES, "-c", str(source), "-o", str(kernel)))
            linked = ("-shared", *link, str(kernel), str(runtime), "-Wl,--no-undefined", "-lm")
            _publish(str(spec), linked, library)
        prune()
    os.utime(library)
    return library


def _runtime(common: tuple[str, ...]) -> Path:
    path = _path("runtime", ".o", *common, *RUNTIME)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source = HERE / "src" / "runtime.cpp"
        _publish("the shim's runtime", (*common, *RUNTIME, *INCLUDES, f"-I{source.parent}", "-c", str(source)), path)
    os.utime(path)
    return path


def _path(name: str, suffix: str, *parts: str) -> Path:
    h = hashlib.sha256("\0".join((compiler_version(), shim_sources(), *parts)).encode())
    return CACHE / f"{name}-{h.hexdigest()[:24]}{suffix}"


def _publish(what: str, arguments: tuple[str, ...], path: Path) -> None:
    """Compiles to a temporary name, then renames: another process may compile the same library."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    _run(what, (*arguments, "-o", temporary))
    os.replace(temporary, path)


def _run(what: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise KernelError(
            f"{what} does not compile for the host:\n{done.stderr[:6000]}\n{COMPILER} {' '.join(arguments)}"
        )


def prune() -> None:
    """Deletes the least recently used half if there are more than ``MAX_FILES``."""
    files = list(CACHE.glob("*.*"))
    if len(files) > MAX_FILES:
        for path in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) // 2]:
            path.unlink(missing_ok=True)
