"""Another kernel, for each expert's rows: which expert and which rows, it reads from ``plan_experts``' tables."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import I32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.plan_experts import ENTRY

_MOST_SLOTS = 16  # of a kernel
FIXED = 6  # slots before those of ``weights`` and ``rows``


@dataclass(frozen=True)
class ForItems(KernelSpec):
    """Calls ``inner`` with slots of its own for each item. Nothing is done for items without pairs.

    ``weights``: slots of ``inner`` that are fields of the expert's blob; ``rows``: those that point to the item's first
    pair; ``count``: the one that is the number of its pairs. ``by_pair``: chunks are shared out by pairs instead of by
    items, of a kernel whose chunk c is piece c / M of row c mod M.

    Slots: 0 items of a wave, 1 its pairs (``by_pair``), 2 the slots of ``inner`` i64, ``rows`` as for pair 0, 3 chunks
    of an item, or pieces of a row, 4 addresses of the experts' blobs i64 [E], 5 number of slots of ``inner``; then for
    each of ``weights`` the field's place in the blob, and for each of ``rows`` bytes of a pair. Chunk c: chunk
    c mod slot 3 of item c / slot 3, or piece c mod slot 3 of pair c / slot 3.
    """

    inner: KernelSpec
    weights: tuple[int, ...]
    rows: tuple[int, ...]
    count: int | None
    by_pair: bool = False

    @property
    def name(self) -> str:
        places = "_".join(map(str, (*self.weights, "r", *self.rows, "c", self.count)))
        return f"for_{'pairs' if self.by_pair else 'items'}_{places}_{self.inner.name}"

    def emit(self, k: Kernel) -> None:
        b, per = k.b, k.size(3)
        number, piece = b.sdiv(k.chunk, per), b.srem(k.chunk, per)
        if not self.by_pair:
            item = k.at(k.pointer(0), k.mul(ENTRY, number))
            with b.if_then(b.icmp_signed(">", k.load(I32, item, 8), I32(0))):
                self._call(k, item, piece)
            return
        pair = k.at(k.pointer(1), k.mul(ENTRY, number))
        with b.if_then(b.icmp_signed(">=", k.load(I32, pair), I32(0))):
            item = k.at(k.pointer(0), k.mul(ENTRY, b.sext(k.load(I32, pair, 4), I64)))
            first, count = (b.sext(k.load(I32, item, place), I64) for place in (4, 8))
            self._call(k, item, k.add(b.sub(number, first), k.mul(piece, count)))

    def _call(self, k: Kernel, item: ir.Value, chunk: ir.Value) -> None:
        b = k.b
        slots, given = k.memory(8 * _MOST_SLOTS), k.pointer(2)
        with k.loop(k.size(5)) as i:
            k.store(k.load(I64, given, k.mul(8, i)), slots, k.mul(8, i))
        expert, first, count = (b.sext(k.load(I32, item, place), I64) for place in (0, 4, 8))
        blob = k.load(I64, k.pointer(4), k.mul(8, expert))
        for i, slot in enumerate(self.weights):
            k.store(k.add(blob, k.size(FIXED + i)), slots, 8 * slot)
        for i, slot in enumerate(self.rows):
            step = k.mul(first, k.size(FIXED + len(self.weights) + i))
            k.store(k.add(k.load(I64, given, 8 * slot), step), slots, 8 * slot)
        if self.count is not None:
            k.store(count, slots, 8 * self.count)
        b.call(self._function(k), [slots, chunk])

    def _function(self, k: Kernel) -> ir.Function:
        """``inner`` in this module, under a name of its own."""
        name = f"inner_{self.inner.name}"
        function = k.module.globals.get(name)
        if function is None:
            made = Kernel(k.module, name, k.isa, self.inner.types)
            self.inner.emit(made)
            made.finish()
            function = made.function
            function.linkage = "internal"
        return function
