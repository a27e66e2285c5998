"""Quantized linears on GPUs without tensor cores (compute capability 6.0 to 7.2): ``linear.py`` sends them here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import INPUT_KINDS, NO_MACROS, OUT_TYPES, NormedInput, Output
from exl.kernels.spec import KernelSpec
from exl.kernels.weights import TiledWeight
from exl.layout.arch import arch_limits
from exl.layout.tiles import TileLayout

MAX_TOKENS = 4  # per launch
NUM_WARPS = 8
NUM_SLICES = 8


def simt_spec(layout: TileLayout, num_tokens: int, arch: int, ending: Mapping[str, int] = NO_MACROS) -> KernelSpec:
    """``num_tokens``: 1, 2 or 4, and no other count runs on that variant. ``ending``: ``Output.macros``."""
    macros = layout.macros | ending | {"EXL_R": 1, "EXL_STAGES": 2, "EXL_TOKENS": num_tokens}
    return KernelSpec("linear_q_simt.cu", "linear_q_simt", macros, arch)


def simt_shared_bytes(layout: TileLayout, num_tokens: int, x_stages: int) -> int:
    return max(NUM_WARPS * num_tokens * x_stages * layout.stage_inputs * 4, NUM_SLICES * 512)


def choose_x_stages(layout: TileLayout, num_tokens: int, arch: int) -> int:
    """As many stages of a slice's activations as fit a block. Pure."""
    whole = -(-layout.num_stages // NUM_SLICES)
    limit = arch_limits(arch).max_shared_bytes
    for x_stages in range(whole, 0, -1):
        if simt_shared_bytes(layout, num_tokens, x_stages) <= limit:
            return x_stages
    raise KernelError(f"linear_q_simt does not fit sm_{arch}: {layout}, {num_tokens} tokens")


def token_counts(num_tokens: int) -> list[int]:
    """Launches of 4, 2 and 1 tokens: ``token_counts(7) == [4, 2, 1]``."""
    return [4] * (num_tokens // 4) + [2] * (num_tokens % 4 // 2) + [1] * (num_tokens % 2)


def run_simt(backend: Backend, weight: TiledWeight, x: torch.Tensor, out: Output, norm: NormedInput | None) -> None:
    """Checked arguments of ``linear.py``, any number of tokens."""
    start = 0
    for count in token_counts(x.shape[0]):
        stop = start + count
        part = None if norm is None else norm.rows(start, stop)
        _launch(backend, weight, x[start:stop], out.rows(start, stop), part)
        start = stop


def _launch(backend: Backend, weight: TiledWeight, x: torch.Tensor, out: Output, norm: NormedInput | None) -> None:
    layout, num_tokens = weight.layout, x.shape[0]
    x_stages = choose_x_stages(layout, num_tokens, backend.arch)
    sumsq, norm_weight, eps = (None, None, 0.0) if norm is None else (norm.sumsq, norm.weight, norm.eps)
    args = [ptr(weight.codes), ptr(weight.qparams), ptr(weight.bias)]
    args += [ptr(x), ptr(sumsq), ptr(norm_weight), ptr(out.y), ptr(out.sumsq), ptr(out.permuted), ptr(out.channel_map)]
    args += [i32(layout.K), i32(out.y.shape[1]), i32(layout.num_tiles), i32(layout.num_blocks), i32(layout.group_units)]
    args += [i32(num_tokens), i32(INPUT_KINDS[x.dtype]), i32(x.stride(0)), i32(x_stages)]
    args += [i32(out.kind), i32(OUT_TYPES[out.y.dtype]), i32(out.y.stride(0)), f32(eps), f32(out.scale)]
    shared = simt_shared_bytes(layout, num_tokens, x_stages)
    function = backend.load(simt_spec(layout, num_tokens, backend.arch, out.macros))
    launch(function, (layout.num_tiles,), (32 * NUM_WARPS,), args, shared)
