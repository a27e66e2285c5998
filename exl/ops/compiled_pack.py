"""Linears for the CPU's own kernels: a checkpoint's matrices packed as ``exl/layout/layers.py`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.pack import PackColumns
from exl.errors import CheckpointError, KernelError
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.tensors import to_float
from exl.layout.columns import COLUMNS, ColumnLayout
from exl.layout.layers import LinearLayout, column_layout
from exl.layout.specs import MatrixSpec
from exl.layout.steps import PACK_COLUMNS

_NUMPY = {"u8": np.uint8, "i32": np.int32, "f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def pack_linear(
    parts: Sequence[QuantizedMatrix | DenseMatrix], layout: LinearLayout, out: NDArray[np.uint8], library: Library
) -> None:
    """Fills ``out`` u8 [layout.num_bytes], on the calling thread, with matrices that lie side by side along N.

    Words are packed as the file has them. A matrix that has codes only is packed ``PACK_COLUMNS`` outputs at a time.
    Raises ``CheckpointError`` for zero points that are not what the configuration says.
    """
    if out.dtype != np.uint8 or out.shape != (layout.num_bytes,):
        raise KernelError(f"blob: expected u8 [{layout.num_bytes}], found {out.dtype} {out.shape}")
    fields = {name: _view(out, layout, name) for name in layout.fields}
    if layout.kind == "dense":
        _pack_dense(parts, fields["weight"])
    else:
        _pack_columns(parts, layout, fields, library)
    if "bias" in fields:
        np.concatenate([_bias(part) for part in parts], out=fields["bias"])


def _view(out: NDArray[np.uint8], layout: LinearLayout, name: str) -> NDArray:
    field = layout.fields[name]
    return out[field.offset : field.offset + field.num_bytes].view(_NUMPY[field.dtype]).reshape(field.shape)


def _bias(part: QuantizedMatrix | DenseMatrix) -> NDArray[np.float32]:
    if part.bias is None:
        return np.zeros(part.N, np.float32)
    return to_float(part.bias, part.bias_dtype or "f32" if isinstance(part, DenseMatrix) else "f32")


def _pack_dense(parts: Sequence[DenseMatrix], weight: NDArray) -> None:
    """``weight`` [N, K] in the file's type, whose rows the file has in this order."""
    start = 0
    for part in parts:
        rows = weight[start : start + part.N]
        if part.read_into is not None:
            part.read_into(rows.reshape(-1).view(np.uint8))
        else:
            for i in range(0, part.N, PACK_COLUMNS):
                rows[i : i + PACK_COLUMNS] = part.rows(i, min(part.N, i + PACK_COLUMNS))
        start += part.N


def _pack_columns(
    parts: Sequence[QuantizedMatrix], layout: LinearLayout, fields: Mapping[str, NDArray], library: Library
) -> None:
    columns, records = column_layout(layout.spec), fields["records"]
    if columns.symmetric:
        for part, spec in zip(parts, layout.spec.parts, strict=True):
            _check_symmetric(part, spec)
    if columns.N % COLUMNS:
        records[-columns.num_records * columns.record_bytes :] = 0  # the columns of the last block that nobody has
    source = columns.source_rows()  # of sorted inputs
    order = parts[0].order
    inputs = source if order is None else np.where(source >= 0, order[source], np.int32(-1))
    if "source" in fields:
        fields["source"][:] = inputs
    start = 0
    for part in parts:
        if part.read_words is not None:
            words = part.read_words()
            _Packing(part, columns, library, records).run(_form(columns, order), words, inputs, start, 0)
        else:
            for i in range(0, part.N, PACK_COLUMNS):
                codes = np.ascontiguousarray(part.codes(i, min(part.N, i + PACK_COLUMNS)))
                _Packing(part, columns, library, records).run("codes", codes, source, start + i, i)
        start += part.N


def _form(columns: ColumnLayout, order: NDArray[np.int32] | None) -> str:
    """Of ``PackColumns``, for words."""
    if columns.padded or order is not None:
        return "gathered"
    return "stream" if columns.bits == 3 else "words"


def _check_symmetric(part: QuantizedMatrix, spec: MatrixSpec) -> None:
    middle = 1 << (part.bits - 1)
    wrong = part.zeros[part.zeros != middle]
    if len(wrong):
        raise CheckpointError(
            f"{spec.name}.qzeros: found zero point {wrong[0]}, expected {middle} everywhere: the quantization config "
            'says "sym": true'
        )


class _Packing:
    """One matrix into the records of a linear."""

    def __init__(
        self, part: QuantizedMatrix, columns: ColumnLayout, library: Library, records: NDArray[np.uint8]
    ) -> None:
        self._part, self._columns, self._library, self._records = part, columns, library, records
        self._scales = np.ascontiguousarray(part.scales)
        if columns.scale_dtype == "bf16":  # f32 in memory, whose upper half they are
            self._scales = (self._scales.view(np.uint32) >> 16).astype(np.uint16)
        self._zeros = np.ascontiguousarray(part.zeros)

    def run(self, form: str, source: NDArray, rows: NDArray[np.int32], column: int, first: int) -> None:
        """``source`` [rows, n]: the words or codes of the matrix's columns from ``first`` on, which are the linear's
        from ``column`` on."""
        columns, N = self._columns, self._part.N
        rows = np.ascontiguousarray(rows)
        kernel = PackColumns(form, columns.bits, columns.scale_dtype, columns.symmetric)
        count, block = source.shape[1], column // COLUMNS
        args = slots(
            source, self._scales[:, first:], self._zeros[:, first:], rows, self._records, source.strides[0],
            columns.num_records, columns.records_per_group, N, column, count, columns.words, block,
        )  # fmt: skip
        self._library.call(kernel, args, -(-(column + count) // COLUMNS) - block)
