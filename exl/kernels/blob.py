"""Linears in a layer's blob for a GPU: packed on the CPU as ``exl/layout/layers.py`` says, and seen by the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import CheckpointError, KernelError
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.kernels.linear_dense import DenseWeight
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.layers import LinearLayout, tile_layout
from exl.layout.tiles import gated_rows, natural_rows

BLOCK_ROWS = 1024  # of a dense matrix, converted at a time
_NUMPY = {"u8": np.uint8, "i32": np.int32, "f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def pack_linear(
    parts: Sequence[QuantizedMatrix | DenseMatrix],
    layout: LinearLayout,
    out: NDArray[np.uint8],
    output_order: NDArray[np.int32] | None = None,
) -> None:
    """Fills ``out`` u8 [layout.num_bytes] with matrices that lie side by side along N.

    ``output_order`` i32 [F], for gate and up: tile column i computes channel ``output_order[i]``, so that a
    ``down_proj`` under act-order finds its inputs sorted. Raises ``CheckpointError`` for zero points that are not what
    the configuration says, and for dense values that f16 cannot hold.
    """
    if out.dtype != np.uint8 or out.shape != (layout.num_bytes,):
        raise KernelError(f"blob: expected u8 [{layout.num_bytes}], found {out.dtype} {out.shape}")
    fields = {name: _view(out, layout, name) for name in layout.fields}
    spec = layout.spec
    rows = gated_rows(spec.N // 2, output_order) if spec.gated else natural_rows(spec.N)
    if layout.kind == "dense":
        if output_order is not None:
            raise KernelError(f"{spec.parts[0].name}: dense gate and up keep the order of their rows")
        _pack_dense(parts, fields["weight"], layout.fields["weight"].dtype)
    else:
        _pack_tiles(parts, layout, fields, rows)
    if "bias" in fields:
        bias = np.concatenate([_bias(part) for part in parts])
        fields["bias"][:] = np.where(rows >= 0, bias[rows], np.float32(0))
    if "channel_map" in fields:
        fields["channel_map"][parts[0].order] = np.arange(spec.K, dtype=np.int32)


def view_linear(layout: LinearLayout, fields: Mapping[str, torch.Tensor]) -> TiledWeight | DenseWeight:
    """What the kernels take, from the fields of a blob on their device; no copy."""
    if layout.kind == "dense":
        return DenseWeight(fields["weight"], fields.get("bias"), layout.spec.gated)
    return TiledWeight(tile_layout(layout.spec), fields["codes"], fields["qparams"], fields.get("bias"))


def _view(out: NDArray[np.uint8], layout: LinearLayout, name: str) -> NDArray:
    field = layout.fields[name]
    return out[field.offset : field.offset + field.num_bytes].view(_NUMPY[field.dtype]).reshape(field.shape)


def _pack_tiles(
    parts: Sequence[QuantizedMatrix], layout: LinearLayout, fields: Mapping[str, NDArray], rows: NDArray[np.int64]
) -> None:
    tiles = tile_layout(layout.spec)
    if tiles.symmetric:
        for part, spec in zip(parts, layout.spec.parts, strict=True):
            wrong = part.zeros[part.zeros != 1 << (part.bits - 1)]
            if len(wrong):
                raise CheckpointError(
                    f"{spec.name}.qzeros: found zero point {wrong[0]}, expected {1 << (part.bits - 1)} everywhere: "
                    'the quantization config says "sym": true'
                )
    packed = pack_matrix(parts, rows, tiles)
    fields["codes"].view(np.uint32)[:] = packed.codes
    fields["qparams"][:] = packed.qparams


def _pack_dense(parts: Sequence[DenseMatrix], weight: NDArray, dtype: str) -> None:
    at = 0
    for part in parts:
        for start in range(0, part.N, BLOCK_ROWS):
            block = part.rows(start, min(part.N, start + BLOCK_ROWS))
            weight[at : at + len(block), : part.K] = _convert(block, part.dtype, dtype)
            weight[at : at + len(block), part.K :] = 0
            at += len(block)


def _convert(values: NDArray, source: str, target: str) -> NDArray:
    """To f16; bf16 stays as it is where the GPU takes it."""
    if source == target:
        return values
    wide = values if source == "f32" else _widen_bf16(values)
    with np.errstate(over="ignore"):
        found = wide.astype(np.float16)
    if not np.isfinite(found).all():
        raise CheckpointError(f"dense weights of {source}: found {np.abs(wide).max()}, expected 65504 or less for f16")
    return found


def _widen_bf16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)


def _bias(part: QuantizedMatrix | DenseMatrix) -> NDArray[np.float32]:
    if part.bias is None:
        return np.zeros(part.N, np.float32)
    if isinstance(part, DenseMatrix) and part.bias_dtype == "bf16":
        return _widen_bf16(part.bias)
    return part.bias.astype(np.float32)
