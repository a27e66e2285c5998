"""Decode attention's partial results put together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.attention import partial_bytes
from exl.cpu_kernels.attention_items import ROW
from exl.cpu_kernels.attention_tiles import NONE, combine, finish, with_sink
from exl.cpu_kernels.heads import num_vectors, store_head
from exl.cpu_kernels.ir import F32, I32, I64, F, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.quantize import ActivationForm, emit_record


@dataclass(frozen=True)
class MergeAttention(KernelSpec):
    """Partials of ``DecodeAttention`` -> rows of attention, and as activations of the linear that reads them.

    A row without splits becomes zeros. Quantized caches: the Hadamard rotation of V is undone.

    Slots, for H query heads, Hkv heads of K and V, D channels:
    0 partials [partial rows][H][``partial_bytes``]; 1 rows i32 [n][4] of ``decode_items``; 2 out f32 [T][H][D]; 3 H;
    4 Hkv; only with ``form``: 5 records out [R][M], 6 M; only with ``sinks``: 7 f32 [H], one more score of each head.

    Chunk: entry of the rows' table * Hkv + head of K and V, with the query heads that share it; n * Hkv in all.
    """

    kind: str  # a key of KV_BITS
    head_dim: int  # even
    form: ActivationForm | None = None  # its rows must divide H / Hkv * D
    sinks: bool = False

    @property
    def name(self) -> str:
        words = [self.form.name] if self.form else []
        return "_".join([f"merge_attention_{self.kind}_{self.head_dim}", *words, *["sinks"] * self.sinks])

    def emit(self, k: Kernel) -> None:
        b = k.b
        num_heads, num_kv = k.size(3), k.size(4)
        group, kv = b.sdiv(num_heads, num_kv), b.srem(k.chunk, num_kv)
        entry = k.at(k.pointer(1), k.mul(4 * ROW, b.sdiv(k.chunk, num_kv)))
        row, first, step, count = (b.sext(k.load(I32, entry, 4 * i), I64) for i in range(ROW))
        size = partial_bytes(self.head_dim)
        channels = self.head_dim if self.form is None else math.lcm(self.head_dim, self.form.rows)
        values, per_turn = k.memory(4 * channels), channels // self.head_dim  # heads that fill whole records
        with k.loop(k.mul(k.add(kv, 1), group), k.mul(kv, group), per_turn) as first_head:
            with k.loop(per_turn) as i:
                head = k.add(first_head, i)
                source = k.at(k.pointer(0), k.mul(k.add(k.mul(first, num_heads), head), size))
                result = self._merged(k, source, k.mul(k.mul(step, num_heads), size), count, head)
                target = k.mul(k.add(k.mul(row, num_heads), head), 4 * self.head_dim)
                store_head(k, result, self.head_dim, k.at(k.pointer(2), target))
                store_head(k, result, self.head_dim, k.at(values, k.mul(i, 4 * self.head_dim)))
            if self.form is not None:
                self._store_records(k, values, channels, k.mul(first_head, self.head_dim), row)

    def _store_records(self, k: Kernel, values: ir.Value, channels: int, start: ir.Value, row: ir.Value) -> None:
        """``channels`` of the row, from ``start`` on."""
        first = k.b.sdiv(start, I64(self.form.rows))
        with k.loop(channels // self.form.rows) as i:
            index = k.add(k.mul(k.add(first, i), k.size(6)), row)
            record = k.at(k.pointer(5), k.mul(index, self.form.num_bytes))
            emit_record(k, k.at(values, k.mul(i, 4 * self.form.rows)), record, self.form)

    def _merged(self, k: Kernel, source: ir.Value, stride: ir.Value, count: ir.Value, head: ir.Value) -> list[ir.Value]:
        """``count`` partials of a query of ``head``, ``stride`` bytes apart."""
        end = 64 * num_vectors(self.head_dim)
        maximum, total = k.var(F32(NONE)), k.var(F32(0.0))
        sums = [k.var(k.splat(0.0)) for _ in range(num_vectors(self.head_dim))]
        with k.loop(count) as split:
            partial = k.at(source, k.mul(split, stride))
            more = [k.load(F32, partial, end + offset) for offset in (0, 4)]
            top, both, old, new = combine(k, maximum.get(), total.get(), *more)
            maximum.set(top)
            total.set(both)
            for v, part in enumerate(sums):
                part.set(k.fma(part.get(), old, k.b.fmul(k.load(F, partial, 64 * v), new)))
        some = k.b.icmp_signed(">", count, I64(0))
        whole = with_sink(k, maximum.get(), total.get(), k.pointer(7) if self.sinks else None, head)
        divisor = k.b.select(some, whole, F32(1.0))
        return finish(k, [part.get() for part in sums], divisor, self.kind, self.head_dim)
