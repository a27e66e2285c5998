"""Rows' experts -> which rows each expert computes, as tables that later stages read.

A pair is a row and one of its experts. Pairs are sorted by expert, then by row, and computed some at once, in waves; an
expert's pairs of a wave are in items of up to so many rows. All tables are i32:

    pairs  [T * k][4]   row, number of the item in its wave, expert, 0; behind the last pair: row -1
    items  [waves][most][4]   expert, first pair of the wave, pairs, 0; behind the last item: 0 pairs
    places [T * k]      the pair of each row and expert; -1: a row without experts
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.choose_experts import MOST_EXPERTS
from exl.cpu_kernels.ir import I32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.layout.cpu_steps import PAIR_ITEM

ENTRY = 4 * PAIR_ITEM  # bytes


@dataclass(frozen=True)
class PlanExperts(KernelSpec):
    """Slots: 0 ids i32 [T][k], 1 items, 2 pairs, 3 places, 4 T * k, 5 k, 6 E, 7 rows of an item, 8 pairs of a wave,
    9 items of a wave, 10 waves. One chunk.
    """

    @property
    def name(self) -> str:
        return "plan_experts"

    def emit(self, k: Kernel) -> None:
        _Plan(k).emit()


class _Plan:
    """Expert e's pairs are those from ``starts[e]`` on, and its first item is number ``items[e]`` of its wave; in later
    waves it is the first. Each entry of a table is written once, as the chunk may be run again while others read."""

    def __init__(self, k: Kernel) -> None:
        self.k = k
        self.starts, self.next, self.items = (k.memory(4 * (MOST_EXPERTS + 1)) for _ in range(3))  # i32
        self.num_experts, self.item_rows, self.wave, self.most = (k.size(slot) for slot in (6, 7, 8, 9))

    def emit(self) -> None:
        self._count()
        self._number()
        self._write_pairs()

    def _get(self, table: ir.Value, i: ir.Value) -> ir.Value:
        return self.k.b.sext(self.k.load(I32, table, self.k.mul(4, i)), I64)

    def _set(self, table: ir.Value, i: ir.Value, value: ir.Value) -> None:
        self.k.store(self.k.b.trunc(value, I32), table, self.k.mul(4, i))

    def _count(self) -> None:
        k, b = self.k, self.k.b
        with k.loop(k.add(self.num_experts, 1)) as i:
            self._set(self.starts, i, I64(0))
        with k.loop(k.size(4)) as i:
            expert = self._get(k.pointer(0), i)
            with b.if_then(b.icmp_signed(">=", expert, I64(0))):
                behind = k.add(expert, 1)
                self._set(self.starts, behind, k.add(self._get(self.starts, behind), 1))
        with k.loop(self.num_experts) as e:
            first, behind = self._get(self.starts, e), k.add(e, 1)
            self._set(self.starts, behind, k.add(first, self._get(self.starts, behind)))
            self._set(self.next, e, first)

    def _items_of(self, num_pairs: ir.Value) -> ir.Value:
        return self.k.b.sdiv(self.k.add(num_pairs, self.item_rows, -1), self.item_rows)

    def _number(self) -> None:
        """Numbers and writes the items, wave by wave."""
        k, b = self.k, self.k.b
        wave, used = k.var(I64(0)), k.var(I64(0))  # the wave that is being filled, and its items so far
        with k.loop(self.num_experts) as e:
            first, stop = self._get(self.starts, e), self._get(self.starts, k.add(e, 1))
            with b.if_then(b.icmp_signed("<", first, stop)):
                first_wave, last_wave = b.sdiv(first, self.wave), b.sdiv(k.add(stop, -1), self.wave)
                with b.if_then(b.icmp_signed("!=", first_wave, wave.get())):
                    self._leave_empty(wave.get(), used.get())
                    used.set(I64(0))
                self._set(self.items, e, used.get())
                one = b.icmp_signed("==", first_wave, last_wave)
                with b.if_then(b.not_(one)):
                    in_first = b.sub(k.mul(k.add(first_wave, 1), self.wave), first)
                    self._leave_empty(first_wave, k.add(used.get(), self._items_of(in_first)))
                    with k.loop(last_wave, k.add(first_wave, 1)) as whole:
                        self._leave_empty(whole, self._items_of(self.wave))
                here = b.sub(stop, b.select(one, first, k.mul(last_wave, self.wave)))
                used.set(k.add(b.select(one, used.get(), I64(0)), self._items_of(here)))
                wave.set(last_wave)
        self._leave_empty(wave.get(), used.get())
        with k.loop(k.size(10), k.add(wave.get(), 1)) as behind:
            self._leave_empty(behind, I64(0))

    def _leave_empty(self, wave: ir.Value, used: ir.Value) -> None:
        """Items of a wave behind those that are used."""
        k = self.k
        with k.loop(self.most, used) as i:
            k.store(I32(0), k.pointer(1), k.add(k.mul(ENTRY, k.add(k.mul(wave, self.most), i)), 8))

    def _write_pairs(self) -> None:
        k, b = self.k, self.k.b
        with k.loop(k.size(4)) as i:
            expert = self._get(k.pointer(0), i)
            place = k.var(I64(-1))
            with b.if_then(b.icmp_signed(">=", expert, I64(0))):
                place.set(self._get(self.next, expert))
                self._set(self.next, expert, k.add(place.get(), 1))
                self._write_pair(place.get(), expert, b.sdiv(i, k.size(5)))
            self._set(k.pointer(3), i, place.get())
        with k.loop(k.size(4), self._get(self.starts, self.num_experts)) as p:
            k.store(I32(-1), k.pointer(2), k.mul(ENTRY, p))

    def _write_pair(self, p: ir.Value, expert: ir.Value, row: ir.Value) -> None:
        """And the item that begins with it, if one does."""
        k, b = self.k, self.k.b
        first, stop = self._get(self.starts, expert), self._get(self.starts, k.add(expert, 1))
        wave = b.sdiv(p, self.wave)
        wave_first = k.mul(wave, self.wave)
        begun = b.icmp_signed(">=", first, wave_first)
        start = b.select(begun, first, wave_first)  # of the expert's pairs in this wave
        within = b.sub(p, start)
        base = b.select(begun, self._get(self.items, expert), I64(0))
        item = k.add(base, b.sdiv(within, self.item_rows))
        entry = k.at(k.pointer(2), k.mul(ENTRY, p))
        for place, value in enumerate((row, item, expert)):
            k.store(b.trunc(value, I32), entry, 4 * place)
        with b.if_then(b.icmp_signed("==", b.srem(within, self.item_rows), I64(0))):
            end = k.smaller(k.smaller(stop, k.add(wave_first, self.wave)), k.add(p, self.item_rows))
            entry = k.at(k.pointer(1), k.mul(ENTRY, k.add(k.mul(wave, self.most), item)))
            for place, value in enumerate((expert, b.sub(p, wave_first), b.sub(end, p))):
                k.store(b.trunc(value, I32), entry, 4 * place)
