"""Panels of a quantized matrix as f16 or bf16, for many tokens: dequantize, then let cuBLAS multiply."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear import COMPILED
from exl.kernels.spec import KernelSpec, Variant
from exl.kernels.weights import TiledWeight, check_weight
from exl.layout.panels import PANEL_BYTES
from exl.layout.tiles import ROWS, TileLayout

NUM_WARPS = 8


def dequantize(
    backend: Backend, weight: TiledWeight, out: torch.Tensor, first_tile: int = 0, gated: bool = False
) -> None:
    """out [16 * n, K] f16 or bf16 = rows of n tiles from ``first_tile`` on, so that ``x @ out.T`` is their product.

    Each weight is ``scale * (code - zero)``, rounded once; where scales are f32, that product is rounded to f32 before.
    Rows come in the tiles' order; ``gated`` puts rows 0..7 of all n tiles before rows 8..15 of all. Rows past the
    matrix are zero. Raises ``KernelError`` for a panel of more than 64 MiB, beyond the matrix, or of another shape or
    type.
    """
    layout = weight.layout
    check_weight(weight, backend.device)
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[0] % ROWS or not out.shape[0]:
        raise KernelError(f"panel: expected [16 n, {layout.K}], found {getattr(out, 'shape', type(out))}")
    num_tiles = out.shape[0] // ROWS
    check_tensor("panel", out, (torch.float16, torch.bfloat16), (num_tiles * ROWS, layout.K), backend.device, 16)
    if first_tile < 0 or first_tile + num_tiles > layout.num_tiles:
        raise KernelError(
            f"panel of tiles {first_tile}..{first_tile + num_tiles - 1}: the matrix has {layout.num_tiles}"
        )
    if out.numel() * 2 > PANEL_BYTES:
        raise KernelError(f"panel of {out.numel() * 2} bytes: expected {PANEL_BYTES} or less")
    function = backend.load(_spec(layout, out.dtype == torch.bfloat16, backend.arch))
    args = [ptr(weight.codes), ptr(weight.qparams), ptr(out), i32(layout.K), i32(layout.num_tiles)]
    args += [i32(layout.num_blocks), i32(layout.group_units), i32(first_tile), i32(int(gated))]
    launch(function, (-(-layout.num_stages // NUM_WARPS), num_tiles), (32 * NUM_WARPS,), args)


def _spec(layout: TileLayout, bf16: bool, arch: int) -> KernelSpec:
    return KernelSpec("dequantize_q.cu", "dequantize_q", layout.macros | {"EXL_BF16": int(bf16)}, arch)


def variants(arch: int) -> Iterator[Variant]:
    """Every layout that ``linear`` compiles, to both types."""
    for layout in COMPILED:
        for bf16 in (False, True):
            yield Variant(_spec(layout, bf16, arch))
