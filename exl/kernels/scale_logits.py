"""What becomes of the head's products before they are logits (``scale_logits.cu``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.spec import KernelSpec, Variant

NUM_THREADS, COLUMNS = 256, 1024  # of a block


def scale_logits(
    backend: Backend, x: torch.Tensor, scale: float, softcap: float | None, *, dependent: bool = False
) -> None:
    """x f32 [R, V] becomes ``scale * x``; with a softcap ``softcap * tanh(scale * x / softcap)``. Raises
    ``KernelError``."""
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or not x.numel():
        raise KernelError(f"x: expected [R, V], found {getattr(x, 'shape', type(x))}")
    num_rows, V = x.shape
    check_tensor("x", x, (torch.float32,), (num_rows, V), backend.device, rows_apart=True)
    if softcap is not None and not softcap > 0:
        raise KernelError(f"softcap is {softcap}: expected more than 0")
    args = [ptr(x), i32(V), i32(x.stride(0)), f32(scale), f32(softcap or 0.0)]
    launch(backend.load(_spec(backend.arch)), (-(-V // COLUMNS), num_rows), (NUM_THREADS,), args, dependent=dependent)


def _spec(arch: int) -> KernelSpec:
    return KernelSpec("scale_logits.cu", "scale_logits", {}, arch)


def variants(arch: int) -> Iterator[Variant]:
    yield Variant(_spec(arch))
