"""Backends for tests: the host shim's builds, and the GPU where there is one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from exl.errors import KernelError
from exl.kernels.launch import Backend, CudaBackend, HostBackend

from .shim import HostShim

MODES = ("race", "asan", pytest.param("cupy", marks=pytest.mark.gpu))
TEST_KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def make_backend(mode: str, arch: int = 86, sources: Path | None = None) -> Backend:
    """A backend for ``mode`` ("race", "asan", "plain", "cupy"); one per process, so that each kernel is loaded once.

    ``arch`` is for the host only. ``sources``: where the ``.cu`` files lie (default: exl's own). Skips the test where
    ``mode`` needs a GPU and there is none.
    """
    if mode != "cupy":
        return HostBackend(HostShim(mode, folder=sources), arch=arch)
    try:
        return CudaBackend(sources=sources)
    except KernelError as error:
        pytest.skip(str(error))
