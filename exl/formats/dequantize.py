"""Codes as a dense matrix: an embedding, whose rows are looked up and never multiplied, or a router, whose products
are never rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from exl.formats.matrix import FP4_VALUES, DenseMatrix, QuantizedMatrix
from exl.layout.specs import MatrixSpec


def exact_spec(spec: MatrixSpec) -> MatrixSpec:
    """Of a matrix that stays as it is, or becomes f32."""
    if not spec.quantized:
        return replace(spec, exact=True)
    return MatrixSpec(spec.name, spec.K, spec.N, 32, "f32", has_bias=spec.has_bias, rows=spec.rows, exact=True)


def dequantize(matrix: QuantizedMatrix) -> DenseMatrix:
    """In f32, row by row as rows are read. ``code - zero`` has 9 bits at most: products with f16 and bf16 scales are
    exact, those with f32 scales are rounded once."""
    group = np.arange(matrix.K) // matrix.group_size
    scales, zeros = matrix.scales.astype(np.float32), matrix.zeros.astype(np.float32)
    values = np.array(FP4_VALUES, np.float32)

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        codes = matrix.codes(start, stop)
        numbers = values[codes] if matrix.code_kind == "fp4" else codes - zeros[group, start:stop]
        weights = numbers * scales[group, start:stop]  # [K, n], sorted
        rows = np.empty((stop - start, matrix.K), np.float32)
        rows[:, slice(None) if matrix.order is None else matrix.order] = weights.T
        return rows

    bias = None if matrix.bias is None else matrix.bias.astype(np.float32)
    return DenseMatrix("f32", matrix.K, matrix.N, bias, None if bias is None else "f32", read_rows)
