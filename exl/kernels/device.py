"""A GPU that is ready to compute, or one error that says what is missing."""

from __future__ import annotations

import warnings

import torch

from exl.errors import KernelError, NoGpuError
from exl.gpu_environment import Finding, diagnose, gpu_facts
from exl.kernels.launch import CudaBackend


def open_backend() -> CudaBackend:
    """Raises ``NoGpuError`` where there is no NVIDIA GPU or none is shown, ``KernelError`` where there is one that exl
    cannot use. Each names the cause and, where something has to be installed, the command."""
    finding = diagnose(gpu_facts())
    if finding is not None and not _torch_disagrees(finding):
        raise (KernelError if finding.has_gpu else NoGpuError)(str(finding))
    return CudaBackend()


def _torch_disagrees(finding: Finding) -> bool:
    """torch sees a GPU although the driver's own library was not found or shows none: then torch is right."""
    if gpu_facts().driver is not None and finding.has_gpu:
        return False
    with warnings.catch_warnings():  # torch's own line about the driver, beside ours
        warnings.simplefilter("ignore")
        return torch.version.cuda is not None and torch.cuda.is_available()  # AMD's builds say available, too
