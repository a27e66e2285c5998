"""Backends for kernel tests: the host shim's two builds, and the GPU where there is one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for the shim

from host.shim import HostShim

from exl.errors import KernelError
from exl.kernels.launch import Backend, CudaBackend, HostBackend

MODES = ("race", "asan", pytest.param("cupy", marks=pytest.mark.gpu))
TEST_KERNELS = Path(__file__).resolve().parents[1] / "host" / "kernels"


@functools.cache
def make_backend(mode: str, arch: int = 86, sources: Path | None = None) -> Backend:
    """A backend for ``mode``; one per process, so that each kernel is loaded once. ``arch`` is for the host only."""
    if mode == "cupy":
        return CudaBackend(sources=sources)
    return HostBackend(HostShim(mode, folder=sources), arch=arch)


def backend_or_skip(mode: str, arch: int = 86, sources: Path | None = None) -> Backend:
    if mode != "cupy":
        return make_backend(mode, arch, sources)
    try:
        return make_backend(mode, sources=sources)
    except KernelError as error:
        pytest.skip(str(error))


@pytest.fixture(params=MODES)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """exl's own kernels, on each backend in turn; tensors belong on ``backend.device``."""
    yield backend_or_skip(request.param)
    if request.param == "cupy":
        torch.cuda.synchronize()
