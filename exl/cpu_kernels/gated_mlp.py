"""Between the linears of a gated MLP: ``activation(gate) * up``."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.math import gelu_tanh, silu, times_sigmoid
from exl.cpu_kernels.quantize import ActivationForm
from exl.cpu_kernels.vectors import Part, Records, columns_of_chunk, each_part, load_part, row_of, store_part

ACTIVATIONS: Mapping[str, Callable[[Kernel, ir.Value], ir.Value]] = {"silu": silu, "gelu_tanh": gelu_tanh}
CLAMPED = "swiglu_oai"  # with a limit, and other factors


def gated_product(k: Kernel, activation: str, limit: float | None, gate: ir.Value, up: ir.Value) -> ir.Value:
    """``exl.ops.base.GatedMlp`` says which. NaN stays."""
    b = k.b
    if activation != CLAMPED:
        return b.fmul(ACTIVATIONS[activation](k, gate), up)
    if limit is not None:
        most, least = k.splat(limit), k.splat(-limit)
        gate = b.select(b.fcmp_ordered(">", gate, most), most, gate)
        up = b.select(b.fcmp_ordered(">", up, most), most, up)
        up = b.select(b.fcmp_ordered("<", up, least), least, up)
    activated = times_sigmoid(k, gate, b.fmul(gate, k.splat(1.702)))
    return b.fmul(activated, b.fadd(up, k.splat(1.0)))


@dataclass(frozen=True)
class GatedProduct(KernelSpec):
    """out = activation(gate) * up, for rows of ``[gate | up]``, as f32 (no ``form``) or records of integers.

    ``activation``: "silu" or "gelu_tanh", or "swiglu_oai" with its ``limit``.

    Slots: 0 gate and up f32 [M][stride], 1 stride, 2 width F of each, 3 out f32
    [M][stride] or records [R][M], 4 out's stride (f32), 5 columns or records a chunk, 6 chunks a row; with a form also
    7 M, 8 R, 9 i32 [R * rows] as in ``QuantizeRows`` (not read unless ``gathered``). Sizes in elements. Chunk c is the
    columns or records of number c mod slot 6 of row c / slot 6. ``out`` must not be the input.
    """

    activation: str
    form: ActivationForm | None = None
    gathered: bool = False
    limit: float | None = None

    @property
    def name(self) -> str:
        form = f"_{self.form.name}" if self.form else ""
        limit = "" if self.limit is None else f"_{struct.pack('>f', self.limit).hex()}"
        return f"gated_{self.activation}{limit}{form}{'_gathered' if self.gathered else ''}"

    def emit(self, k: Kernel) -> None:
        width = k.size(2)
        row, start, stop = columns_of_chunk(k, k.size(5), k.size(6), width if self.form is None else k.size(8))
        gate = row_of(k, k.pointer(0), row, k.size(1))
        up = k.at(gate, k.mul(width, 4))

        def product(part: Part) -> ir.Value:
            return gated_product(k, self.activation, self.limit, load_part(k, gate, part), load_part(k, up, part))

        if self.form is None:
            out = row_of(k, k.pointer(3), row, k.size(4))
            each_part(k, stop, lambda part: store_part(k, product(part), out, part), start)
        else:
            listed = k.pointer(9) if self.gathered else None
            Records(self.form, k.pointer(3), row, k.size(7), width, listed).emit(k, stop, product, start)
