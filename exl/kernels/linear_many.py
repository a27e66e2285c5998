"""Quantized linears for many tokens: a panel of the weight is dequantized, cuBLAS multiplies, ``finish_product`` ends.

From ``crossover_tokens`` on this is quicker than going through the codes 64 tokens at a time. Weights are rounded to
the activations' type here, products add up in f32: rows are not bit-equal to those of ``linear.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.dequantize import dequantize
from exl.kernels.launch import Backend, launch
from exl.kernels.linear import round_activations
from exl.kernels.linear_io import (
    ACTIVATIONS,
    OUT_TYPES,
    NormedInput,
    Output,
    activation_macros,
    check_input,
    check_output,
)
from exl.kernels.spec import KernelSpec, Variant
from exl.kernels.weights import TiledWeight, check_weight
from exl.layout.panels import PANEL_BYTES, panel_tiles
from exl.layout.tiles import ROWS, TileLayout

NUM_WARPS = 8


@dataclass(frozen=True)
class PanelScratch:
    """Memory that ``multiply_many`` needs, one launch at a time: see ``exl.layout.panels.panel_scratch_shapes``."""

    x: torch.Tensor  # f16 [T * K]: normalised activations
    panel: torch.Tensor  # f16, or the same bytes as bf16
    product: torch.Tensor  # f32 [T * rows of a panel]


def multiply_many(
    backend: Backend,
    weight: TiledWeight,
    x: torch.Tensor,
    out: Output,
    scratch: PanelScratch,
    norm: NormedInput | None = None,
) -> None:
    """``out`` (stored, gated or added) of x [T, K] W + bias, for any number of tokens.

    x is f16 or bf16, or with ``norm`` the f32 residual. Raises ``KernelError`` before anything is launched.
    """
    layout, num_tokens = weight.layout, x.shape[0]
    check_weight(weight, backend.device)
    check_input(layout.K, x, norm, backend.device)
    check_output(layout.num_tiles, num_tokens, out, backend.device)
    per_panel = _check_scratch(layout, num_tokens, scratch, norm is not None, backend.device)
    if norm is not None:
        rounded = scratch.x[: num_tokens * layout.K].view(num_tokens, layout.K)
        round_activations(backend, layout.stage_inputs, x, norm, rounded, None)
        x = rounded
    for first in range(0, layout.num_tiles, per_panel):
        count = min(per_panel, layout.num_tiles - first)
        panel = scratch.panel[: count * ROWS * layout.K].view(x.dtype).view(count * ROWS, layout.K)
        product = scratch.product[: num_tokens * count * ROWS].view(num_tokens, count * ROWS)
        dequantize(backend, weight, panel, first)
        backend.call(multiply_f32, x, panel, product)
        _finish(backend, weight, product, out, first)


def multiply_f32(x: torch.Tensor, panel: torch.Tensor, product: torch.Tensor) -> None:
    """product f32 [T, N] = x [T, K] panel [N, K]^T, both of one 16-bit type, summed in f32: cuBLAS with an f32 result
    never reduces in 16 bits."""
    if x.is_cuda:
        torch.mm(x, panel.t(), out_dtype=torch.float32, out=product)
    else:
        torch.mm(x.float(), panel.float().t(), out=product)


def _finish(backend: Backend, weight: TiledWeight, product: torch.Tensor, out: Output, first_tile: int) -> None:
    num_tokens, num_rows = product.shape
    args = [ptr(product), ptr(weight.bias), ptr(out.y), ptr(out.sumsq), ptr(out.permuted), ptr(out.channel_map)]
    args += [i32(out.y.shape[1]), i32(weight.layout.num_tiles), i32(first_tile), i32(num_rows // ROWS), i32(num_tokens)]
    args += [i32(out.kind), i32(OUT_TYPES[out.y.dtype]), i32(out.y.stride(0)), f32(out.scale)]
    grid = (-(-num_rows // ROWS // NUM_WARPS), -(-num_tokens // 8))
    launch(backend.load(_spec(backend.arch, out.macros)), grid, (32 * NUM_WARPS,), args)


def _check_scratch(
    layout: TileLayout, num_tokens: int, scratch: PanelScratch, normed: bool, device: torch.device
) -> int:
    """Tiles of a panel that the scratch memory has room for."""
    for name, dtype in (("x", torch.float16), ("panel", torch.float16), ("product", torch.float32)):
        tensor = getattr(scratch, name)
        check_tensor(f"scratch.{name}", tensor, (dtype,), (tensor.numel(),), device, 16)
    per_panel = panel_tiles(layout, min(scratch.panel.numel() * 2, PANEL_BYTES))
    least = {"x": num_tokens * layout.K if normed else 0, "product": num_tokens * per_panel * ROWS}
    for name, count in least.items():
        found = getattr(scratch, name).numel()
        if found < count:
            raise KernelError(f"scratch.{name} has {found} elements: expected {count} or more")
    return per_panel


def _spec(arch: int, ending: Mapping[str, int]) -> KernelSpec:
    return KernelSpec("finish_product.cu", "finish_product", ending, arch)


def variants(arch: int) -> Iterator[Variant]:
    for activation in ACTIVATIONS:
        yield Variant(_spec(arch, activation_macros(activation)))
