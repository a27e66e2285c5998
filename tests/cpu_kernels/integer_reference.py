"""What integer linears compute, in NumPy, step by step as ``exl.cpu_kernels.quantize`` and ``linear`` state it.

Integers are exact here in 64 bits, whatever the kernels do to keep within 32; floats round as f32 do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.layout.columns import ColumnLayout
from tests.cpu_kernels.packer import from_scale_dtype

LIMITS = {1: np.float32(127), 2: np.float32(32512)}


def fma32(a: NDArray, b: NDArray, c: NDArray) -> NDArray[np.float32]:
    """a * b + c of f32, rounded once. The product is exact in f64; the sum is rounded to odd there (Boldo, Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008), after which rounding to f32 is right."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    with np.errstate(invalid="ignore"):
        virtual = total - product  # Knuth's two-sum
        error = (product - (total - virtual)) + (c - virtual)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + toward, bits).view(np.float64).astype(np.float32)


@dataclass(frozen=True)
class Records:
    """Of some rows. ``q`` i64 [M, R, rows], ``step`` f32 [M, R]."""

    q: NDArray[np.int64]
    step: NDArray[np.float32]


def quantized(x: NDArray[np.float32], layout: ColumnLayout, parts: int) -> Records:
    """``x`` [M, K] in sorted order."""
    source = layout.source_rows()
    inputs = np.where(source >= 0, x[:, source], np.float32(0)).reshape(len(x), layout.num_records, layout.rows)
    limit = LIMITS[parts]
    top = np.abs(inputs).max(2)
    finite = np.isfinite(top)
    some = finite & (top >= np.float32(1e-30))
    safe = np.where(some, top, np.float32(1))
    kept = np.where(some[:, :, None], inputs, np.float32(0))
    q = np.rint(kept * (limit / safe)[:, :, None]).astype(np.int64)
    step = np.where(some, safe / limit, np.where(finite, np.float32(0), np.float32(np.nan)))
    return Records(q, step.astype(np.float32))


def record_bytes(records: Records, bits: int, parts: int) -> NDArray[np.uint8]:
    """[R, M, bytes], with zeros where nothing is written."""
    m, r, rows = records.q.shape
    out = np.zeros((r, m, parts * rows + 16), np.uint8)
    for i, q in enumerate(np.moveaxis(records.q, 2, 0)):
        high = (q + 128) // 256
        for part, value in enumerate([high, q - 256 * high] if parts == 2 else [q]):
            out[:, :, part * rows + _byte_of_input(i, bits)] = value.T.astype(np.int8).view(np.uint8)
    out[:, :, parts * rows : parts * rows + 4] = np.ascontiguousarray(records.step.T)[:, :, None].view(np.uint8)
    total = records.q.sum(2).T.astype(np.int32)
    out[:, :, parts * rows + 4 : parts * rows + 8] = np.ascontiguousarray(total)[:, :, None].view(np.uint8)
    return out


def _byte_of_input(i: int, bits: int) -> int:
    """Four bytes meet the codes that a shift and a mask leave in a word's four bytes."""
    if bits == 8:
        return i
    if bits == 4:  # byte b of shift s is input 2 b + s of 8
        return i // 8 * 8 + 4 * (i % 2) + i % 8 // 2
    return i // 16 * 16 + 4 * (i % 4) + i % 16 // 4  # byte b of shift s is input s + 4 b of 16


def product(
    records: Records, layout: ColumnLayout, codes: NDArray, scales: NDArray, zeros: NDArray
) -> NDArray[np.float32]:
    """f32 [M, N]. ``codes`` [K, N], ``scales`` as stored and ``zeros`` [groups, N]."""
    source = layout.source_rows()
    padded = np.where(source[:, None] >= 0, codes[source], 0).astype(np.int64)
    padded = padded.reshape(layout.num_records, layout.rows, layout.N)
    y = np.zeros((len(records.q), layout.N), np.float32)
    for r, group in enumerate(layout.group_of_record()):
        q = records.q[:, r]
        exact = q @ padded[r] - zeros[group].astype(np.int64) * q.sum(1, keepdims=True)
        assert np.abs(exact).max(initial=0) < 2**31, "must fit in 32 bits"
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            factor = from_scale_dtype(scales[group]) * records.step[:, r, None]
            y = fma32(exact.astype(np.float32), factor, y)
    return y
