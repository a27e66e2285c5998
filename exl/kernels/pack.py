"""A checkpoint's quantized tensors -> tiles, on the device. ``tile_pack.pack_matrix`` is the CPU twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear import TiledWeight, check_weight
from exl.kernels.spec import KernelSpec, Variant
from exl.kernels.tile_layout import BLOCK, ROWS

NUM_THREADS = 256
MAX_PARTS = 3  # q, k, v


@dataclass(frozen=True)
class GptqTensors:
    """One matrix as AutoGPTQ stores it. ``zero_offset``: 1 for ``checkpoint_format`` "gptq", 0 for "gptq_v2"."""

    qweight: torch.Tensor  # i32 [K * bits / 32, N]
    qzeros: torch.Tensor  # i32 [G, N * bits / 32]
    scales: torch.Tensor  # f16 [G, N]
    zero_offset: int


@dataclass(frozen=True)
class AwqTensors:
    """One 4-bit matrix as AutoAWQ's GEMM stores it."""

    qweight: torch.Tensor  # i32 [K, N / 8]
    qzeros: torch.Tensor  # i32 [G, N / 8]
    scales: torch.Tensor  # f16 [G, N]


def pack(
    backend: Backend,
    parts: Sequence[GptqTensors] | Sequence[AwqTensors],
    rows: torch.Tensor,
    out: TiledWeight,
    order: torch.Tensor | None = None,
) -> None:
    """Fills ``out.codes``, ``out.scales`` and ``out.zeros`` from one to three matrices side by side along N.

    ``rows`` i32 [16 * tiles] is ``tile_layout``'s row order; ``order`` i32 [K] sorts the file's rows by group (GPTQ
    under act-order). The bias is not touched. Values in ``rows`` and ``order`` are trusted: they are exl's own. Raises
    ``KernelError`` for shapes, types or places that do not fit ``out.layout``.
    """
    layout = out.layout
    check_weight(out, backend.device)
    if not 1 <= len(parts) <= MAX_PARTS or len({type(part) for part in parts}) != 1:
        raise KernelError(f"{len(parts)} matrices: expected one to {MAX_PARTS} of one kind")
    awq = isinstance(parts[0], AwqTensors)
    if awq and (layout.bits != 4 or order is not None):
        raise KernelError(
            f"AWQ has 4 bits and no order of K, found {layout.bits} bits{' and an order' if order is not None else ''}"
        )
    widths = [_check_part(part, out, backend.device) for part in parts]
    check_tensor("rows", rows, (torch.int32,), (layout.num_tiles * ROWS,), backend.device)
    if order is not None:
        check_tensor("order", order, (torch.int32,), (layout.K,), backend.device)
    offsets = {0 if awq else part.zero_offset for part in parts}
    if not offsets <= {0, 1} or len(offsets) != 1:
        raise KernelError(f"zero offsets {sorted(offsets)}: expected 1 (GPTQ version 1) or 0 for all matrices")
    empty = [None] * (MAX_PARTS - len(parts))

    def column(name: str) -> list:
        return [ptr(tensor) for tensor in [getattr(part, name) for part in parts] + empty]

    sizes = [i32(n) for n in widths + [0] * len(empty)]
    args = [*column("qweight"), ptr(order), ptr(rows), ptr(out.codes), i32(layout.K), *sizes]
    threads = layout.num_stages * layout.stage_inputs // BLOCK * 32
    function = backend.load(_spec("pack_codes", layout.bits, awq, backend.arch))
    launch(function, (-(-threads // NUM_THREADS), layout.num_tiles), (NUM_THREADS,), args)
    args = [*column("scales"), *column("qzeros"), ptr(rows), ptr(out.scales), ptr(out.zeros)]
    args += [i32(layout.K // layout.group_size), i32(layout.num_groups), *sizes, i32(offsets.pop())]
    function = backend.load(_spec("pack_meta", layout.bits, awq, backend.arch))
    launch(function, (-(-layout.num_groups * 8 // NUM_THREADS), layout.num_tiles), (NUM_THREADS,), args)


def _check_part(part: GptqTensors | AwqTensors, out: TiledWeight, device: torch.device) -> int:
    """Checks one matrix; its N."""
    layout = out.layout
    G = layout.K // layout.group_size
    if not isinstance(part.scales, torch.Tensor) or part.scales.dim() != 2:
        raise KernelError(f"scales: expected [{G}, N], found {getattr(part.scales, 'shape', type(part.scales))}")
    N = part.scales.shape[1]
    if N % 32 * layout.bits % 32 or (isinstance(part, AwqTensors) and N % 8):
        raise KernelError(f"N {N}: the file packs {layout.bits}-bit values along N into whole 32-bit words")
    check_tensor("scales", part.scales, (torch.float16,), (G, N), device)
    packed = layout.K, N // 8
    if isinstance(part, GptqTensors):
        packed = layout.K * layout.bits // 32, N
    check_tensor("qweight", part.qweight, (torch.int32,), packed, device)
    check_tensor("qzeros", part.qzeros, (torch.int32,), (G, N * layout.bits // 32), device)
    return N


def _spec(entry: str, bits: int, awq: bool, arch: int) -> KernelSpec:
    return KernelSpec("pack_q.cu", entry, {"EXL_BITS": bits, "EXL_AWQ": int(awq)}, arch)


def variants(arch: int) -> Iterator[Variant]:
    """All of them."""
    for bits, awq in ((2, False), (3, False), (4, False), (4, True), (8, False)):
        for entry in ("pack_codes", "pack_meta"):
            yield Variant(_spec(entry, bits, awq, arch))
