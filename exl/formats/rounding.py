"""A dense matrix rounded to codes while it is loaded: for a head that the file keeps in f16 and memory should not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.formats.matrix import DenseMatrix, QuantizedMatrix

_BLOCK_ROWS = 1024  # outputs in f32 at a time


def rounding_group(K: int) -> int:
    """The largest of the usual group sizes that divides K; else all of K is one group."""
    return next((size for size in (128, 64, 32) if K % size == 0), K)


def round_to_nearest(matrix: DenseMatrix, bits: int, group_size: int) -> QuantizedMatrix:
    """Asymmetric: a group's codes reach from its least to its largest weight, both widened to include zero.

    Scales are rounded up to f16 first and codes chosen for them, so that no weight is off by more than half a step.
    Rows are read twice and never all at once.
    """
    top = 2**bits - 1
    num_groups = matrix.K // group_size
    scales = np.empty((num_groups, matrix.N), np.float16)
    zeros = np.empty((num_groups, matrix.N), np.uint8)
    for start in range(0, matrix.N, _BLOCK_ROWS):
        stop = min(matrix.N, start + _BLOCK_ROWS)
        groups = _rows_f32(matrix, start, stop).reshape(stop - start, num_groups, group_size)
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        step = (high - low) / top
        step[step == 0] = 1
        scale = _round_up(step)
        scales[:, start:stop] = scale.T
        zeros[:, start:stop] = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top).T

    def read_codes(start: int, stop: int) -> NDArray[np.uint8]:
        groups = _rows_f32(matrix, start, stop).reshape(stop - start, num_groups, group_size)
        scale = scales[:, start:stop].T.astype(np.float32)[:, :, None]
        codes = np.rint(groups / scale) + zeros[:, start:stop].T[:, :, None]
        return np.ascontiguousarray(np.clip(codes, 0, top).astype(np.uint8).reshape(stop - start, matrix.K).T)

    return QuantizedMatrix(
        bits=bits,
        group_size=group_size,
        K=matrix.K,
        N=matrix.N,
        scales=scales,
        zeros=zeros,
        order=None,
        bias=None if matrix.bias is None else _f32(matrix.bias, matrix.bias_dtype),
        read_codes=read_codes,
    )


def _round_up(step: NDArray[np.float32]) -> NDArray[np.float16]:
    """To f16 and never down: a smaller step would cut the ends of the range off."""
    scale = step.astype(np.float16)
    return np.where(scale.astype(np.float32) < step, np.nextafter(scale, np.float16(np.inf)), scale)


def _rows_f32(matrix: DenseMatrix, start: int, stop: int) -> NDArray[np.float32]:
    return _f32(matrix.rows(start, stop), matrix.dtype)


def _f32(values: NDArray, dtype: str | None) -> NDArray[np.float32]:
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
