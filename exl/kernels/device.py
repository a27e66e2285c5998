"""A GPU that is ready to compute, or one error that says what is missing.

Whatever is wrong with driver, torch, CuPy or NVRTC shows here, before a byte of a model has been read: one small kernel
is compiled, loaded and launched as all others are, and its result compared.
"""

from __future__ import annotations

import math
import warnings

import torch

from exl.errors import KernelError, NoGpuError
from exl.kernels.environment import Finding, diagnose, gpu_facts
from exl.kernels.gated_product import gated_product
from exl.kernels.launch import Backend, CudaBackend

_NUM_VALUES = 64
_INPUT = 2.0


def open_backend() -> CudaBackend:
    """Raises ``NoGpuError`` where there is no NVIDIA GPU or none is shown, ``KernelError`` where there is one that exl
    cannot use. Each names the cause and, where something has to be installed, the command."""
    finding = diagnose(gpu_facts())
    if finding is not None and not _torch_disagrees(finding):
        raise (KernelError if finding.has_gpu else NoGpuError)(str(finding))
    backend = CudaBackend()
    check_backend(backend)
    return backend


def _torch_disagrees(finding: Finding) -> bool:
    """torch sees a GPU although the driver's own library was not found or shows none: then torch is right."""
    if gpu_facts().driver is not None and finding.has_gpu:
        return False
    with warnings.catch_warnings():  # torch's own line about the driver, beside ours
        warnings.simplefilter("ignore")
        return torch.version.cuda is not None and torch.cuda.is_available()  # AMD's builds say available, too


def check_backend(backend: Backend) -> None:
    """Runs one small kernel, on values that torch's own kernel has written. Raises ``KernelError``."""
    try:
        gate = torch.full((1, _NUM_VALUES), _INPUT, dtype=torch.float16, device=backend.device)
        y = torch.zeros(1, _NUM_VALUES, dtype=torch.float32, device=backend.device)
        gated_product(backend, gate, gate, y)
        found = y.cpu()
    except RuntimeError as error:  # torch's
        raise KernelError(f"{backend.device} does not run a first kernel: {error}") from error
    expected = _INPUT * _INPUT / (1 + math.exp(-_INPUT))
    if not torch.allclose(found, torch.full_like(found, expected), rtol=1e-4):  # f32 arithmetic on exact inputs
        raise KernelError(f"{backend.device} runs a first kernel wrongly: found {found[0, 0]}, expected {expected}")
