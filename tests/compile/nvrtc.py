"""NVRTC by ctypes, from the wheel ``nvidia-cuda-nvrtc-cu12``: compiles for every GPU on a machine without one."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from exl.kernels.compiler import CompileFailed

PACKAGES = ("nvidia.cuda_nvrtc", "nvidia.cu13")  # of CUDA 12 and of CUDA 13


def library_path(packages: Sequence[str] = PACKAGES) -> Path | None:
    """libnvrtc of an installed wheel, by default CUDA 12's first: it alone knows sm_61 and sm_70."""
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
            found = sorted(Path(folder).glob("lib/libnvrtc.so.*"))
            found = [path for path in found if "alt" not in path.name]
            if found:
                return found[0]
    return None


class Nvrtc:
    """A ``Compiler``. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise CompileFailed(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"nvrtc {major.value}.{minor.value}"

    def archs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        return tuple(sorted(archs))

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileFailed(f"{log}\n{self._library.nvrtcGetErrorString(status).decode()}")
            real = any(option.startswith("--gpu-architecture=sm_") for option in options)
            return self._read(program, "CUBIN") if real else self._read(program, "PTX").rstrip(b"\0"), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


@functools.cache
def nvrtc() -> Nvrtc | None:
    """The installed NVRTC, or None."""
    path = library_path()
    return None if path is None else Nvrtc(path)
