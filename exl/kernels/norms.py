"""Norms that compute their sums themselves: of any rows (``row_norm.cu``), and of what joins the residual stream
(``norm_add.cu``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import OUT_TYPES
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.tiles import ROWS

NUM_THREADS, SHARED_BYTES = 256, 64
KINDS = ("rms", "layer")  # RMSNorm, LayerNorm without bias


@dataclass(frozen=True)
class RowNorm:
    """``weight`` f32 [K]; ``kind`` of ``KINDS``: "layer" subtracts a row's mean first."""

    weight: torch.Tensor
    eps: float
    kind: str = "rms"


def row_norm(
    backend: Backend,
    x: torch.Tensor,
    norm: RowNorm | None,
    y: torch.Tensor,
    second: RowNorm | None = None,
    *,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """y [T, K] = x [T, K] normalised; without a norm x as it is. f16 (saturated), bf16 or f32, each rounded once.

    Rows of both may lie apart; y may be x. ``second``: x and y are the channels of ``norm`` and then those of
    ``second``, each normalised with its own sums; both norms have one kind and epsilon. ``channel_map`` i32 [K]: where
    a consumer under act-order expects each channel; y is not x then. A row's bits do not depend on the others. Sizes
    are multiples of 8. Raises ``KernelError``.
    """
    num_tokens, K = _check_rows("x", x, backend, tuple(OUT_TYPES))
    check_tensor("y", y, tuple(OUT_TYPES), (num_tokens, K), backend.device, 16, rows_apart=True)
    first_K, second_K = K, 0
    if second is not None:
        if norm is None or channel_map is not None or (second.kind, second.eps) != (norm.kind, norm.eps):
            raise KernelError("second norm: expected a first one of the same kind and epsilon, and no channel_map")
        second_K = second.weight.numel()
        first_K = K - second_K
        _check_norm("second norm", second, second_K, backend)
    if norm is not None:
        _check_norm("norm", norm, first_K, backend)
    if channel_map is not None:
        check_tensor("channel_map", channel_map, (torch.int32,), (K,), backend.device)
        if y.data_ptr() == x.data_ptr():
            raise KernelError("y is x: expected another tensor, where channels change places")
    kind, eps, weights = None, 0.0, [None, None]
    if norm is not None:
        kind, eps, weights = norm.kind, norm.eps, [norm.weight, None if second is None else second.weight]
    args = [ptr(x), *map(ptr, weights), ptr(y), ptr(channel_map), i32(first_K), i32(second_K)]
    args += [i32(x.stride(0)), i32(y.stride(0)), i32(OUT_TYPES[x.dtype]), i32(OUT_TYPES[y.dtype]), f32(eps)]
    grid = (num_tokens, 1 if second is None else 2)
    launch(backend.load(_row_spec(kind, backend.arch)), grid, (NUM_THREADS,), args, SHARED_BYTES, dependent=dependent)


def norm_add(
    backend: Backend,
    y: torch.Tensor,
    norm: RowNorm,
    h: torch.Tensor,
    sumsq: torch.Tensor,
    scale: float = 1.0,
    *,
    dependent: bool = False,
) -> None:
    """h f32 [T, C] += scale * norm(y f32 [T, C]); sumsq f32 [T, ceil(C / 16)] becomes the sums of h^2 over 16 channels
    each, as ``Output.residual`` leaves them. C is a multiple of 8. Raises ``KernelError``."""
    num_tokens, C = _check_rows("y", y, backend, (torch.float32,))
    check_tensor("h", h, (torch.float32,), (num_tokens, C), backend.device, 16, rows_apart=True)
    check_tensor("sumsq", sumsq, (torch.float32,), (num_tokens, -(-C // ROWS)), backend.device)
    _check_norm("norm", norm, C, backend)
    args = [ptr(y), ptr(norm.weight), ptr(h), ptr(sumsq), i32(C), i32(y.stride(0)), i32(h.stride(0))]
    args += [f32(norm.eps), f32(scale)]
    function = backend.load(_add_spec(norm.kind, backend.arch))
    launch(function, (num_tokens,), (NUM_THREADS,), args, SHARED_BYTES, dependent=dependent)


def _check_rows(name: str, x: torch.Tensor, backend: Backend, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.shape[1] % 8 or not x.numel():
        raise KernelError(f"{name}: expected [T, K], K a multiple of 8, found {getattr(x, 'shape', type(x))}")
    check_tensor(name, x, dtypes, tuple(x.shape), backend.device, 16, rows_apart=True)
    return tuple(x.shape)


def _check_norm(name: str, norm: RowNorm, K: int, backend: Backend) -> None:
    if norm.kind not in KINDS:
        raise KernelError(f"kind of the {name}: found {norm.kind!r}, expected {' or '.join(KINDS)}")
    if K % 8:
        raise KernelError(f"{name} of {K} channels: expected a multiple of 8")
    check_tensor(f"weight of the {name}", norm.weight, (torch.float32,), (K,), backend.device, 16)
    if not norm.eps >= 0:
        raise KernelError(f"eps of the {name} is {norm.eps}: expected 0 or more")


def _row_spec(kind: str | None, arch: int) -> KernelSpec:
    return KernelSpec("row_norm.cu", "row_norm", {"EXL_NORM": 0 if kind is None else 1 + KINDS.index(kind)}, arch)


def _add_spec(kind: str, arch: int) -> KernelSpec:
    return KernelSpec("norm_add.cu", "norm_add", {"EXL_CENTRED": KINDS.index(kind)}, arch)


def variants(arch: int) -> Iterator[Variant]:
    for kind in (None, *KINDS):
        yield Variant(_row_spec(kind, arch))
    for kind in KINDS:
        yield Variant(_add_spec(kind, arch))
