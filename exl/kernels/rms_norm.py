"""RMSNorm of the residual stream, if no linear kernel does it on the way (``rms_norm.cu``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import OUT_TYPES, NormedInput, check_input
from exl.kernels.spec import KernelSpec, Variant

NUM_THREADS = 256


def rms_norm(
    backend: Backend,
    h: torch.Tensor,
    norm: NormedInput,
    y: torch.Tensor,
    *,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """y [T, K] f16, bf16 or f32 = h f32 [T, K] normalised; a row's bits do not depend on the others.

    To f16 the bits are those that the linear kernels make on the way. K is a multiple of 8. ``channel_map`` i32 [K]:
    where a consumer under act-order expects each channel. Raises ``KernelError``.
    """
    if not isinstance(h, torch.Tensor) or h.dim() != 2 or h.shape[1] % 8 or not h.shape[1]:
        raise KernelError(f"h: expected [T, K], K a multiple of 8, found {getattr(h, 'shape', type(h))}")
    num_tokens, K = h.shape
    check_input(K, h, norm, backend.device)
    check_tensor("y", y, tuple(OUT_TYPES), (num_tokens, K), backend.device, 16)
    if channel_map is not None:
        check_tensor("channel_map", channel_map, (torch.int32,), (K,), backend.device)
    args = [ptr(h), ptr(norm.sumsq), ptr(norm.weight), ptr(y), ptr(channel_map), i32(K), i32(h.stride(0))]
    args += [i32(num_tokens), i32(OUT_TYPES[y.dtype]), f32(norm.eps)]
    launch(backend.load(_spec(backend.arch)), (num_tokens,), (NUM_THREADS,), args, dependent=dependent)


def _spec(arch: int) -> KernelSpec:
    return KernelSpec("rms_norm.cu", "rms_norm", {}, arch)


def variants(arch: int) -> Iterator[Variant]:
    yield Variant(_spec(arch))
