"""Linears as stages: their inputs in the form that each takes, and then the products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exl.batch import LoraRun
from exl.cpu_kernels.dense import dense_kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.linear import ROW_BLOCK, best_kind
from exl.cpu_kernels.linear import linear as integer_kernel
from exl.cpu_kernels.linear_f32 import GatherRows, best_f32_kind
from exl.cpu_kernels.linear_f32 import linear_f32 as f32_kernel
from exl.cpu_kernels.quantize import QuantizeRows, form_of
from exl.layout.columns import ColumnLayout
from exl.layout.cpu_steps import ARITHMETIC, input_bytes
from exl.layout.fields import DTYPE_BYTES
from exl.layout.layers import column_layout
from exl.ops.base import Linear, Loras, Segments
from exl.ops.compiled_tape import RecordForm, Records, Rows, Tape

# Of weights in one chunk: some ten microseconds, so that no thread waits long for another's last one, and so much that
# the processor reads ahead; 64 KB were 4 to 25 % slower. The head is one stage and has many chunks anyway.
CHUNK_BYTES = 256 << 10
DENSE_CHUNK_BYTES = 1 << 20
_CHUNKS_A_THREAD = 4  # at least, where there are columns for it
_RECORDS = 8  # quantized in one chunk
_NO_END = (None, None, 0, 1.0)  # bias, residual, its stride, scale


class LinearStages:
    """``arithmetic``: of quantized weights, a key of ``exl.layout.cpu_steps.ARITHMETIC``; dense ones are multiplied in
    f32."""

    def __init__(self, arithmetic: str, isa: str, num_threads: int) -> None:
        self._arithmetic, self._isa, self._num_threads = arithmetic, isa, num_threads

    def multiply(
        self, tape: Tape, x: Rows | Records, w: Segments, out: Rows, residual: Rows | None = None, scale: float = 1.0
    ) -> None:
        """out = x W + b, or residual + scale * (x W + b), which may be in the residual's own place where stages run
        once. ``x``: records only where ``record_form`` says so."""
        start = 0
        for linear in w:
            part = out.columns(start, linear.N)
            rest = None if residual is None else residual.columns(start, linear.N)
            if linear.layout.kind == "dense":
                self._dense(tape, x, linear, part, rest, scale)
            else:
                self._quantized(tape, x, linear, part, rest, scale)
            start += linear.N

    def add_loras(
        self, tape: Tape, x: Rows, loras: Loras, runs: Sequence[LoraRun], out: Rows, scale: float = 1.0
    ) -> None:
        """out += scale * what adapters add, in place: for stages that run once."""
        for start, stop, adapter in runs:
            for lora in loras[adapter]:
                r = lora.A.N
                inner = Rows(tape.memory.scratch("adapters' inner rows", 4 * (stop - start) * r), r, stop - start, r)
                part = out.some(start, stop).columns(lora.start, lora.B.N)
                self._dense(tape, x.some(start, stop), lora.A, inner, None, 1.0)
                self._dense(tape, inner, lora.B, part, part, scale * lora.scale)

    def record_form(self, w: Segments) -> RecordForm | None:
        """The form in which all of ``w`` take their input, so that whoever computes it can write it at once; None: they
        do not agree, or take f32."""
        parts = ARITHMETIC[self._arithmetic]
        if not w or not parts or any(linear.layout.kind != "columns" for linear in w):
            return None
        layouts = [column_layout(linear.layout.spec) for linear in w]
        forms = {(form_of(layout, parts), layout.num_records) for layout in layouts}
        sources = [linear.fields.get("source") for linear in w]
        if len(forms) > 1 or len({None if source is None else source.data_ptr() for source in sources}) > 1:
            return None
        return RecordForm(*forms.pop(), sources[0])

    def _dense(self, tape: Tape, x: Rows, linear: Linear, out: Rows, residual: Rows | None, scale: float) -> None:
        weight, dtype = linear.fields["weight"], linear.layout.spec.dtype
        self.multiply_dense(tape, x, weight, dtype, out, _end(linear, residual, scale))

    def multiply_dense(
        self, tape: Tape, x: Rows, weight: torch.Tensor, dtype: str, out: Rows, end: tuple[object, ...] = _NO_END
    ) -> None:
        """out = x @ weight.T. ``weight`` [N, K], contiguous, of ``dtype``."""
        N, K = weight.shape
        columns = self.share(N, K * DTYPE_BYTES[dtype], 16, DENSE_CHUNK_BYTES)
        tape.add(
            dense_kernel(dtype, x.num_rows, self._isa),
            -(-N // columns),
            *(weight, x.address, out.address, out.stride, K, x.num_rows, N, columns),
            *end,
            *(None, x.stride),
        )

    def _quantized(
        self, tape: Tape, x: Rows | Records, linear: Linear, out: Rows, residual: Rows | None, scale: float
    ) -> None:
        layout = column_layout(linear.layout.spec)
        parts = ARITHMETIC[self._arithmetic]
        inputs, stride = self._inputs(tape, x, linear, layout)
        kind = best_kind(self._isa, x.num_rows) if parts else best_f32_kind(x.num_rows)
        kernel: KernelSpec = integer_kernel(layout, parts, kind) if parts else f32_kernel(layout, kind)
        row_blocks = -(-x.num_rows // ROW_BLOCK) if kind == "panel" else 1
        blocks = 1 if kind == "panel" else self.share(layout.num_blocks, layout.num_records * layout.record_bytes, 1)
        tape.add(
            kernel,
            -(-layout.num_blocks // blocks) * row_blocks,
            *(linear.fields["records"], inputs, out.address, out.stride),
            *(layout.num_records, x.num_rows, layout.N, layout.num_blocks),
            *_end(linear, residual, scale),
            *(blocks, stride),
        )

    def share(self, count: int, num_bytes: int, multiple: int, chunk_bytes: int = CHUNK_BYTES) -> int:
        """How many of ``count`` columns or blocks, of ``num_bytes`` each, make a chunk of about ``chunk_bytes``: a
        multiple of ``multiple``."""
        most = max(1, count // (_CHUNKS_A_THREAD * self._num_threads))
        return max(1, min(most, chunk_bytes // num_bytes) // multiple) * multiple

    def _inputs(self, tape: Tape, x: Rows | Records, linear: Linear, layout: ColumnLayout) -> tuple[int, int]:
        """The address of a linear's inputs as it takes them, and the stride of f32 ones."""
        if isinstance(x, Records):
            return x.address, 0
        parts, source = ARITHMETIC[self._arithmetic], linear.fields.get("source")
        num_bytes = x.num_rows * input_bytes(linear.layout, self._arithmetic)
        where = None if source is None else source.data_ptr()
        if parts:
            form, num_records = form_of(layout, parts), layout.num_records

            def quantize(records: int) -> None:
                kernel = QuantizeRows(form, source is not None)
                chunks = x.num_rows * -(-num_records // _RECORDS)
                tape.add(
                    kernel, chunks,
                    *(x.address, records, x.stride, num_records, x.num_rows, source, _RECORDS, layout.K),
                )  # fmt: skip

            return tape.made((x.address, form, where), "inputs", num_bytes, quantize), 0
        if source is None:
            return x.address, x.stride

        def gather(rows: int) -> None:
            sizes = (layout.padded_K, layout.padded_K, x.num_rows, None, layout.padded_K)
            tape.add(GatherRows(), x.num_rows, x.address, source, rows, *sizes, *(None,) * 5, x.stride)

        return tape.made((x.address, "f32", where), "inputs", num_bytes, gather), layout.padded_K


def _end(linear: Linear, residual: Rows | None, scale: float) -> tuple[object, ...]:
    """What comes after the products, as ``_NO_END`` has it."""
    bias = linear.fields.get("bias")
    return (bias, *_NO_END[1:]) if residual is None else (bias, residual.address, residual.stride, float(scale))
