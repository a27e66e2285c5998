"""Some outputs of a module as a matrix of their own: q of a fused qkv, or channels in the order in which exl turns
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.specs import Rows


def select_rows(matrix: QuantizedMatrix | DenseMatrix, rows: Rows) -> QuantizedMatrix | DenseMatrix:
    """The outputs ``rows`` of a module. Its codes or weights are still read when they are asked for."""
    chosen = rows.indices()
    bias = None if matrix.bias is None else matrix.bias[chosen]
    if isinstance(matrix, DenseMatrix):
        read_rows = matrix.read_rows
        read = _some(lambda start, stop: read_rows(start, stop).T, chosen)
        return replace(
            matrix, N=rows.count, bias=bias, read_rows=lambda start, stop: read(start, stop).T, read_into=None
        )
    words = matrix.read_words
    return replace(
        matrix,
        N=rows.count,
        scales=np.ascontiguousarray(matrix.scales[:, chosen]),
        zeros=np.ascontiguousarray(matrix.zeros[:, chosen]),
        bias=bias,
        read_codes=_some(matrix.read_codes, chosen),
        read_words=None if words is None else lambda: np.ascontiguousarray(words()[:, chosen]),
    )


def _some(read: Callable[[int, int], NDArray], chosen: NDArray[np.int64]) -> Callable[[int, int], NDArray]:
    """``read(start, stop)``, columns of a module -> the same of the chosen columns."""

    def read_chosen(start: int, stop: int) -> NDArray:
        wanted = chosen[start:stop]
        if not len(wanted):
            return read(0, 0)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        columns = read(low, high)
        in_order = high - low == len(wanted) and bool((np.diff(wanted) == 1).all())
        return columns if in_order else np.ascontiguousarray(columns[:, wanted - low])

    return read_chosen
