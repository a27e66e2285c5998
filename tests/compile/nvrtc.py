"""NVRTC by ctypes, from the wheels of CUDA 12 and CUDA 13: compiles for every GPU on a machine without one.

``nvidia-cuda-nvrtc-cu12`` and ``nvidia-cuda-nvrtc`` install to different folders, so both can be present.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from exl.kernels.compiler import CompileFailed

PACKAGES = {12: "nvidia.cuda_nvrtc", 13: "nvidia.cu13"}  # CUDA version -> package
WHEELS = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}


def library_path(version: int) -> Path | None:
    """libnvrtc of the installed wheel of CUDA ``version``, 12 or 13."""
    try:
        spec = importlib.util.find_spec(PACKAGES[version])
    except ModuleNotFoundError:
        return None
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        found = sorted(Path(folder).glob("lib/libnvrtc.so.*"))
        found = [path for path in found if "alt" not in path.name]
        if found:
            return found[0]
    return None


class Nvrtc:
    """A ``Compiler``. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        # NVRTC opens this by its name alone, and that of CUDA 13.0 does not look in its own folder.
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
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
        real = any(option.startswith("--gpu-architecture=sm_") for option in options)
        (code,), log = self._compile(text, name, options, ("CUBIN" if real else "PTX",))
        return code, log

    def compile_both(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        """Machine code for a real architecture, and the PTX that it was made of."""
        (cubin, ptx), _ = self._compile(text, name, options, ("CUBIN", "PTX"))
        return cubin, ptx.decode()

    def _compile(
        self, text: str, name: str, options: tuple[str, ...], wanted: tuple[str, ...]
    ) -> tuple[list[bytes], str]:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileFailed(f"{log}\n{self._library.nvrtcGetErrorString(status).decode()}")
            codes = [self._read(program, what) for what in wanted]
            return [
                code.rstrip(b"\0") if what == "PTX" else code for what, code in zip(wanted, codes, strict=True)
            ], log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


@functools.cache
def nvrtc(version: int | None = None) -> Nvrtc | None:
    """The NVRTC of CUDA ``version``, or None if its wheel is not installed. Without a version: any that is installed,
    preferably CUDA 12's, because CUDA 13's does not support sm_61 and sm_70."""
    for wanted in PACKAGES if version is None else (version,):
        path = library_path(wanted)
        if path is not None:
            return Nvrtc(path)
    return None
