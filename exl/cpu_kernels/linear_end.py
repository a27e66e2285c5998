"""What linears share: which blocks and rows a chunk is, and the end, bias, residual, scale and the stores. Slots: see
``exl.cpu_kernels.dense``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from exl.cpu_kernels.ir import I64, LANES, F, Kernel
from exl.layout.columns import COLUMNS

ROW_BLOCK = 128  # rows of a chunk of "panel"


@contextmanager
def each_block(k: Kernel, kind: str) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Around code for one block of 64 columns: the block, the first of its rows and how many they are. ``kind``: "row",
    "rows", or "panel", whose chunks have ``ROW_BLOCK`` rows."""
    b, blocks, per = k.b, k.size(7), k.size(12)
    chunks = b.sdiv(k.add(blocks, per, -1), per)
    columns, first, count = k.chunk, I64(0), I64(1) if kind == "row" else k.size(5)
    if kind == "panel":
        columns, first = b.srem(k.chunk, chunks), k.mul(b.sdiv(k.chunk, chunks), ROW_BLOCK)
        count = k.smaller(b.sub(k.size(5), first), ROW_BLOCK)
    start = k.mul(columns, per)
    with k.loop(k.smaller(blocks, k.add(start, per)), start) as block:
        yield block, first, count


def finish_block(k: Kernel, sums: ir.Value, block: ir.Value, first: ir.Value, count: ir.Value) -> None:
    """A block of columns of the rows ``first`` to ``first + count - 1``. ``sums``: f32 [count][64], aligned to 64."""
    with k.loop(count) as row, k.loop(COLUMNS, step=LANES) as i:
        y = k.load(F, sums, k.mul(4, k.add(k.mul(row, COLUMNS), i)), 64)
        column = k.add(k.mul(block, COLUMNS), i)
        finish(k, y, k.add(first, row), column, k.b.sub(k.size(6), column))


def finish(k: Kernel, y: ir.Value, row: ir.Value, column: ir.Value, count: ir.Value) -> None:
    """Bias, residual and scale, then stores: the first ``count`` lanes of ``y``, columns from ``column`` on."""
    with k.b.if_else(k.b.icmp_signed(">=", count, k.n(y.type.count))) as (whole, some):
        with whole:
            _finish(k, y, row, column, None)
        with some:
            _finish(k, y, row, column, count)


def _finish(k: Kernel, y: ir.Value, row: ir.Value, column: ir.Value, count: ir.Value | None) -> None:
    """``count`` None: all lanes."""
    b, offset = k.b, k.mul(4, column)

    def load(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return k.load(y.type, pointer, offset) if count is None else k.load_first(y.type, count, pointer, offset)

    result = k.var(y)
    with b.if_then(b.icmp_signed("!=", k.size(8), k.n(0))):
        result.set(b.fadd(result.get(), load(k.pointer(8), offset)))
    with b.if_then(b.icmp_signed("!=", k.size(9), k.n(0))):
        h = load(k.pointer(9), k.add(k.mul(4, k.mul(row, k.size(10))), offset))
        result.set(k.fma(k.splat(k.number(11), y.type), result.get(), h))
    place = k.add(k.mul(4, k.mul(row, k.size(3))), offset)
    if count is None:
        k.store(result.get(), k.pointer(2), place)
    else:
        k.store_first(result.get(), count, k.pointer(2), place)
