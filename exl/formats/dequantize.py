"""A quantized matrix as a dense one of f32: for a router, whose products are never rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.specs import MatrixSpec


def exact_spec(spec: MatrixSpec) -> MatrixSpec:
    """Of a matrix that stays as it is, or becomes f32."""
    if not spec.quantized:
        return replace(spec, exact=True)
    return MatrixSpec(spec.name, spec.K, spec.N, 32, "f32", has_bias=spec.has_bias, rows=spec.rows, exact=True)


def dequantize(matrix: QuantizedMatrix) -> DenseMatrix:
    """``(code - zero) * scale`` in f32, inputs in the checkpoint's order: exact where scales are f16 or bf16, else
    rounded once."""
    group = np.arange(matrix.K) // matrix.group_size
    columns = slice(None) if matrix.order is None else np.argsort(matrix.order)

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        codes = matrix.codes(start, stop).astype(np.float32)
        scales, zeros = (some[:, start:stop].astype(np.float32)[group] for some in (matrix.scales, matrix.zeros))
        return np.ascontiguousarray(((codes - zeros) * scales)[columns].T)

    bias = None if matrix.bias is None else matrix.bias.astype(np.float32)
    return DenseMatrix("f32", matrix.K, matrix.N, bias, None if bias is None else "f32", read_rows)
