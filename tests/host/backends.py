"""Backends for tests: the host shim's builds and, if the machine has one, the GPU."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from exl.errors import KernelError
from exl.kernels.launch import Backend, CudaBackend

from .shim import HostShim, ShimBackend

CUPY = pytest.param("cupy", marks=pytest.mark.gpu)
MODES = ("race", "asan", CUPY)
TEST_KERNELS = Path(__file__).resolve().parent / "kernels"


@dataclass
class _Options:
    """Options of pytest's command line (``tests/conftest.py``)."""

    require_gpu: bool = False
    kernel_cache: Path | None = None


_options = _Options()


def configure(*, require_gpu: bool, kernel_cache: Path | None) -> None:
    """``require_gpu``: tests fail if there is no GPU. ``kernel_cache``: folder of the GPU's compiled kernels."""
    _options.require_gpu, _options.kernel_cache = require_gpu, kernel_cache
    make_backend.cache_clear()


@functools.cache
def make_backend(mode: str, arch: int = 86, sources: Path | None = None) -> Backend:
    """A backend for ``mode`` ("race", "asan", "plain", "cupy"), cached per process, so that each kernel is loaded once.

    ``arch`` is for the host only. ``sources``: folder of the ``.cu`` files (default: exl's own). Skips the test if
    ``mode`` needs a GPU and the machine has none or lacks CuPy; with ``--require-gpu`` the test fails instead. Any
    other fault of a GPU is always an error.
    """
    if mode != "cupy":
        return ShimBackend(HostShim(mode, folder=sources), arch=arch)
    try:
        return CudaBackend(folder=_options.kernel_cache, sources=sources)
    except KernelError as error:
        if _options.require_gpu:
            pytest.fail(f"--require-gpu: {error}", pytrace=False)
        if has_gpu():
            raise
        pytest.skip(str(error))


def has_gpu() -> bool:
    """Whether torch finds a GPU and CuPy is installed. If so, failing to make a backend is an error."""
    return torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
