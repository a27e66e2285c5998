"""Attention of some queries to one split of 256 tokens: what decode and prefill have in common, so that their bits are
the same.

A *query* is one head of one row. Splits lie at absolute positions. For each query and split there is one result, the
maximum m of its scores s, l = sum of e^(s - m) and the vector sum of e^(s - m) v, and each is computed in an order that
nothing but positions decides: a score is one chain of fma over channels, lane i of l takes tokens at i modulo 16, and
each channel of the vector is one chain over tokens. Splits are combined in order (``combine``). What a query does not
see is masked in scores and left out of sums, not multiplied by 0: it may be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from exl.batch import PAGE_SIZE
from exl.cpu_kernels.heads import hadamard, load_exact, num_vectors, runs
from exl.cpu_kernels.ir import F32, I32, I64, LANES, F, I, Kernel, Var, vec
from exl.cpu_kernels.math import exp, tanh
from exl.cpu_kernels.unpack_kv import unpack_keys, unpack_value
from exl.layout.cpu_steps import SPLIT
from exl.layout.kv import KV_BITS, page_offsets

NONE = float("-inf")  # the maximum of no scores
_TILE = 4  # queries that share what is loaded


def queries_of_a_block(head_dim: int) -> int:
    """Queries whose state is kept on the stack at once, some 100 KB with what else is there."""
    return 32 if head_dim <= 128 else 16


class Tiles:
    """Code for up to ``queries_of_a_block`` queries of one sequence and kv head.

    ``pages``: the layer's slab; ``table``: i32, the sequence's pages.
    """

    def __init__(
        self, k: Kernel, kind: str, head_dim: int, pages: ir.Value, table: ir.Value, kv: ir.Value, num_kv: ir.Value
    ) -> None:
        self.k, self.kind, self.head_dim = k, kind, head_dim
        self.stride = 4 * LANES * num_vectors(head_dim)  # bytes of a query, and of a sum
        offsets = page_offsets(kind, head_dim)
        self._page_bytes, self._v_codes = offsets.num_bytes, offsets.v_codes
        self._pages, self._table, self._num_kv = k.at(pages, k.mul(kv, self._page_bytes)), table, num_kv
        self._unit = PAGE_SIZE if head_dim <= 64 else PAGE_SIZE // 2  # tokens that are unpacked at once
        most = queries_of_a_block(head_dim)
        self.queries, self.sums = k.memory(most * self.stride), k.memory(most * self.stride)
        self._scores, self._lows, self._highs = k.memory(4 * most * SPLIT), k.memory(8 * most), k.memory(8 * most)
        self.maxima, self.totals = k.memory(4 * most), k.memory(4 * most)
        self._unpacked = k.memory(self._unit * self.stride)

    def load_query(self, i: ir.Value, source: ir.Value, scale: ir.Value, position: ir.Value, window: ir.Value) -> None:
        """Query ``i`` of the block: f32 [D] at ``source``, which sees ``window`` tokens up to ``position`` (i64).
        Positions must not fall from one query to the next."""
        k, factor = self.k, self.k.splat(scale)
        for first, count in runs(self.head_dim):
            value = k.b.fmul(load_exact(k, F32, count, source, 4 * first), factor)
            k.store(value, self.queries, k.add(k.mul(i, self.stride), 4 * first), 64)
        high = k.add(position, 1)
        low = k.b.sub(high, window)
        k.store(k.b.select(k.b.icmp_signed(">", low, I64(0)), low, I64(0)), self._lows, k.mul(i, 8))
        k.store(high, self._highs, k.mul(i, 8))

    def visible(self, i: ir.Value, start: ir.Value, size: int = SPLIT) -> tuple[ir.Value, ir.Value]:
        """The tokens [low, high) of ``start`` to ``start + size`` that query ``i`` sees; low = high if none."""
        k = self.k
        stop = k.add(start, size)
        low, high = (k.smaller(k.load(I64, ends, k.mul(i, 8)), stop) for ends in (self._lows, self._highs))
        low = k.b.select(k.b.icmp_signed(">", low, start), low, start)
        return low, k.b.select(k.b.icmp_signed("<", high, low), low, high)

    def begins(self, i: ir.Value, start: ir.Value) -> ir.Value:
        """Whether query ``i``, which sees some of the split at ``start``, sees nothing before."""
        return self.k.b.icmp_signed(">=", self.k.load(I64, self._lows, self.k.mul(i, 8)), start)

    def first_token(self) -> ir.Value:
        """That a query of the block sees."""
        return self.k.load(I64, self._lows)

    def attend(self, count: ir.Value, start: ir.Value, softcap: ir.Value | None) -> None:
        """The first ``count`` queries and the split that begins at ``start`` -> ``maxima``, ``totals``, ``sums``.

        If none of them sees any of the split, sums hold anything, totals 0.
        """
        k, b = self.k, self.k.b
        low, _ = self.visible(I64(0), start)
        _, high = self.visible(k.add(count, -1), start)
        low = b.and_(low, I64(-self._unit))
        with k.loop(high, low, self._unit) as first:
            self._unpack_keys(first, low, high)
            self._score(count, b.sub(first, start))
        with k.loop(count) as i:
            self._softmax(i, start, b.sub(low, start), b.sub(high, start), softcap)
        with k.loop(high, low, self._unit) as first:
            self._unpack_values(first, high)
            self._sum(count, first, start, b.icmp_signed("==", first, low))

    def _unpack_keys(self, first: ir.Value, low: ir.Value, high: ir.Value) -> None:
        """K of the unit at token ``first`` -> f32 [D][unit]. Meanwhile the next page's K comes from memory; after the
        last page it is the first one's V."""
        k = self.k
        page, token = self._page(first)
        after, is_last = self._after(first, high)
        ahead, _ = self._page(k.b.select(is_last, low, after))
        ahead = k.at(ahead, k.b.select(is_last, I64(self._v_codes), I64(0)))
        unpack_keys(k, self.kind, self.head_dim, page, token, self._unit, self._unpacked, ahead)

    def _unpack_values(self, first: ir.Value, high: ir.Value) -> None:
        """V of the unit at token ``first`` -> f32 [unit][``stride`` bytes], without tokens from ``high`` on."""
        k = self.k
        page, token = self._page(first)
        after, is_last = self._after(first, high)
        ahead, _ = self._page(k.b.select(is_last, first, after))
        with k.loop(k.smaller(self._unit, k.b.sub(high, first))) as t:
            target = k.at(self._unpacked, k.mul(t, self.stride))
            unpack_value(k, self.kind, self.head_dim, page, k.add(token, t), target, ahead)

    def _after(self, first: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first token of the next page, and whether that is ``high`` or beyond."""
        after = self.k.add(self.k.b.or_(first, I64(PAGE_SIZE - 1)), 1)
        return after, self.k.b.icmp_signed(">=", after, high)

    def _page(self, position: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(page of the kv head, token in it)."""
        k = self.k
        page = k.b.sext(k.load(I32, self._table, k.mul(4, k.b.ashr(position, I64(6)))), I64)
        place = k.at(self._pages, k.mul(k.mul(page, self._num_kv), self._page_bytes))
        return place, k.b.and_(position, I64(PAGE_SIZE - 1))

    def _score(self, count: ir.Value, column: ir.Value) -> None:
        """Of all queries and the unit's tokens, from ``column`` on."""
        k = self.k
        whole = k.b.and_(count, I64(-_TILE))
        for start, stop, rows in ((I64(0), whole, _TILE), (whole, count, 1)):
            vectors = min(self._unit // LANES, self._accumulators // rows)
            with k.loop(stop, start, rows) as i, k.loop(self._unit // LANES, 0, vectors) as part:
                at = k.at(self._scores, k.mul(4, k.add(k.mul(i, SPLIT), column, k.mul(part, LANES))))
                queries = k.at(self.queries, k.mul(i, self.stride))
                sums = [[k.var(k.splat(0.0)) for _ in range(vectors)] for _ in range(rows)]
                with k.loop(self.head_dim) as channel:
                    line = k.at(self._unpacked, k.add(k.mul(channel, 4 * self._unit), k.mul(part, 4 * LANES)))
                    lanes = [k.load(F, line, 64 * v) for v in range(vectors)]
                    for r in range(rows):
                        query = k.splat(k.load(F32, queries, k.add(k.mul(channel, 4), r * self.stride)))
                        _add_products(k, sums[r], query, lanes)
                for r in range(rows):
                    for v in range(vectors):
                        k.store(sums[r][v].get(), at, 4 * (r * SPLIT + v * LANES), 64)

    @property
    def _accumulators(self) -> int:
        """Vectors of 16 lanes that registers hold besides what is loaded."""
        return 16 if self.k.isa == "avx512vnni" else 4

    def _softmax(self, i: ir.Value, start: ir.Value, begin: ir.Value, end: ir.Value, softcap: ir.Value | None) -> None:
        """Scores ``begin`` to ``end`` of query ``i`` -> e^(s - m), 0 where it does not see, and m and l."""
        k, b = self.k, self.k.b
        line = k.at(self._scores, k.mul(i, 4 * SPLIT))
        low, high = self.visible(i, start)
        offset = k.splat(b.trunc(b.sub(low, start), I32), I)
        size = k.splat(b.trunc(b.sub(high, low), I32), I)
        inverse = None if softcap is None else k.splat(b.fdiv(F32(1.0), softcap))

        def sees(at: ir.Value) -> ir.Value:
            tokens = b.add(k.splat(b.trunc(at, I32), I), ir.Constant(I, list(range(LANES))))
            return b.icmp_unsigned("<", b.sub(tokens, offset), size)

        top = k.var(k.splat(NONE))
        with k.loop(end, begin, LANES) as at:
            s = k.load(F, line, k.mul(at, 4), 64)
            if softcap is not None:
                s = b.fmul(tanh(k, b.fmul(s, inverse)), k.splat(softcap))
                k.store(s, line, k.mul(at, 4), 64)
            top.set(k.maximum(b.select(sees(at), s, k.splat(NONE)), top.get()))
        m = k.total(top.get(), k.maximum)
        total, maximum = k.var(k.splat(0.0)), k.splat(m)
        with k.loop(end, begin, LANES) as at:
            p = exp(k, b.fsub(k.load(F, line, k.mul(at, 4), 64), maximum))
            p = b.select(sees(at), p, k.splat(0.0))
            k.store(p, line, k.mul(at, 4), 64)
            total.set(b.fadd(total.get(), p))
        k.store(m, self.maxima, k.mul(i, 4))
        k.store(k.total(total.get(), b.fadd), self.totals, k.mul(i, 4))

    def _sum(self, count: ir.Value, first: ir.Value, start: ir.Value, fresh: ir.Value) -> None:
        """``sums``, or 0 if ``fresh``, += weights times values of the unit's tokens, from ``first`` on.

        Queries that see the same tokens of the unit go together, others one by one.
        """
        k, b = self.k, self.k.b
        after = k.var(I64(0))
        with k.loop(count) as i, b.if_then(b.icmp_signed(">=", i, after.get())):
            last = k.smaller(k.add(i, _TILE - 1), k.add(count, -1))
            (low, high), (low2, high2) = (self.visible(query, first, self._unit) for query in (i, last))
            same = b.and_(b.icmp_signed("==", low, low2), b.icmp_signed("==", high, high2))
            same = b.and_(same, b.icmp_signed("==", b.sub(last, i), I64(_TILE - 1)))
            with b.if_else(same) as (together, alone):
                with together:
                    self._sum_rows(_TILE, i, low, high, first, start, fresh)
                    after.set(k.add(i, _TILE))
                with alone:
                    self._sum_rows(1, i, low, high, first, start, fresh)

    def _sum_rows(
        self,
        rows: int,
        i: ir.Value,
        low: ir.Value,
        high: ir.Value,
        first: ir.Value,
        start: ir.Value,
        fresh: ir.Value,
    ) -> None:
        """``rows`` queries from ``i`` on, which all see the tokens [low, high)."""
        k, vectors = self.k, num_vectors(self.head_dim)
        width = min(vectors, self._accumulators // rows)
        weights = k.at(self._scores, k.mul(4, k.b.sub(k.mul(i, SPLIT), start)))
        values = k.at(self._unpacked, k.mul(self.stride, k.b.sub(I64(0), first)))
        target = k.at(self.sums, k.mul(i, self.stride))

        def before(place: ir.Value) -> ir.Value:
            return k.b.select(fresh, k.splat(0.0), k.load(F, target, place, 64))

        def columns(at: ir.Value | int, width: int) -> None:
            places = [[k.add(at, r * self.stride + 64 * v) for v in range(width)] for r in range(rows)]
            sums = [[k.var(before(place)) for place in line] for line in places]
            with k.loop(high, low) as token:
                line = k.at(values, k.add(k.mul(token, self.stride), at))
                lanes = [k.load(F, line, 64 * v) for v in range(width)]
                for r in range(rows):
                    weight = k.splat(k.load(F32, weights, k.add(k.mul(token, 4), 4 * SPLIT * r)))
                    _add_products(k, sums[r], weight, lanes)
            for r in range(rows):
                for v in range(width):
                    k.store(sums[r][v].get(), target, places[r][v], 64)

        with k.loop(64 * (vectors - vectors % width), step=64 * width) as at:
            columns(at, width)
        if vectors % width:
            columns(64 * (vectors - vectors % width), vectors % width)


def _add_products(k: Kernel, sums: Sequence[Var], factor: ir.Value, lanes: Sequence[ir.Value]) -> None:
    for total, value in zip(sums, lanes, strict=True):
        total.set(k.fma(value, factor, total.get()))


def combine(
    k: Kernel, top: ir.Value, total: ir.Value, more_top: ir.Value, more_total: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """m and l of the splits so far and of the next -> m and l of both, and factors (vectors of equal lanes) of their
    sums: ``fma(sums, a, more * b)``. The first split is added to m = -inf, l = 0 and sums of 0."""
    b, four = k.b, vec(F32, 4)
    both = k.maximum(more_top, top)
    pair = ir.Constant(four, None)
    for lane, value in enumerate((top, more_top)):
        pair = b.insert_element(pair, b.fsub(value, both), I32(lane))
    factors = exp(k, pair)
    old, new = (b.extract_element(factors, I32(lane)) for lane in (0, 1))
    return both, k.fma(total, old, b.fmul(more_total, new)), k.splat(old), k.splat(new)


def with_sink(k: Kernel, top: ir.Value, total: ir.Value, sinks: ir.Value | None, head: ir.Value) -> ir.Value:
    """l of all splits with the weight of query head ``head``'s sink, f32 [H]: a score that has no value."""
    if sinks is None:
        return total
    four = vec(F32, 4)
    score = k.b.insert_element(ir.Constant(four, None), k.b.fsub(k.load(F32, sinks, k.mul(4, head)), top), I32(0))
    return k.b.fadd(total, k.b.extract_element(exp(k, score), I32(0)))


def finish(k: Kernel, sums: Sequence[ir.Value], total: ir.Value, kind: str, head_dim: int) -> list[ir.Value]:
    """The attention's result of a query, from the sums of all splits."""
    inverse = k.splat(k.b.fdiv(F32(1.0), total))
    sums = [k.b.fmul(v, inverse) for v in sums]
    return hadamard(k, sums, head_dim) if KV_BITS[kind][0] < 16 else sums
