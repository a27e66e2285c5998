"""A router's logits -> the experts of each row, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F32, I32, I64, LANES, F, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.math import exp, times_sigmoid
from exl.cpu_kernels.vectors import Part, each_part, load_part, store_part
from exl.errors import UnsupportedModelError

MOST_EXPERTS = 4096
SCORES = ("softmax", "sigmoid", "chosen")
_NONE = float("-inf")


@dataclass(frozen=True)
class ChooseExperts(KernelSpec):
    """See ``exl.families.specs.RouteShape``. Sums go over experts as they are numbered, in f32, so that a row's result
    depends on that row alone.

    Slots: 0 logits f32 [T][E], 1 bias of the choice f32 [E] or 0, 2 ids i32 [T][k], rising, 3 weights f32 [T][k], 4 E,
    5 k, 6 eps f32, 7 scaling f32, 8 groups, 9 groups that are looked at, 10 i32 [T]: rows with -1 get no expert, ids of
    -1 and weights of 0. Chunk: a row.
    """

    score: str  # one of SCORES
    normalize: bool
    grouped: bool = False  # not: slots 8 and 9 are not read

    @property
    def name(self) -> str:
        return (
            f"choose_experts_{self.score}{'_normalized' if self.normalize else ''}{'_grouped' if self.grouped else ''}"
        )

    def emit(self, k: Kernel) -> None:
        row = _Row(k, self)
        b = k.b
        padding = b.icmp_signed("<", k.load(I32, k.pointer(10), k.mul(4, k.chunk)), I32(0))
        with b.if_else(padding) as (nobody, somebody):
            with nobody, k.loop(row.count) as j:
                k.store(I32(-1), row.ids, k.mul(4, j))
                k.store(F32(0.0), row.weights, k.mul(4, j))
            with somebody:
                row.compute()


def check_score(score: str, count: int) -> None:
    """Raises ``UnsupportedModelError`` for what there is no kernel for."""
    if score not in SCORES or count > MOST_EXPERTS:
        raise UnsupportedModelError(
            f"router: found {score!r} of {count} experts, expected {', '.join(SCORES)} of {MOST_EXPERTS} at most"
        )


class _Row:
    def __init__(self, k: Kernel, spec: ChooseExperts) -> None:
        self.k, self.spec = k, spec
        self.num_experts, self.count = k.size(4), k.size(5)
        self.logits = k.at(k.pointer(0), k.mul(4, k.mul(k.chunk, self.num_experts)))
        offset = k.mul(4, k.mul(k.chunk, self.count))
        self.ids, self.weights = k.at(k.pointer(2), offset), k.at(k.pointer(3), offset)
        # f32 or i32 [E]; room for whole vectors
        self.scores, self.choice, self.taken, self.found = (k.memory(4 * (MOST_EXPERTS + LANES)) for _ in range(4))

    def compute(self) -> None:
        self._score()
        self._prepare_choice()
        if self.spec.grouped:
            self._keep_best_groups()
        with self.k.loop(self.count):
            self._take_best()
        self._write_taken()
        self._weigh()

    # scores

    def _score(self) -> None:
        k, spec = self.k, self.spec
        if spec.score == "sigmoid":
            one = k.splat(1.0)
            self._each(self.logits, self.scores, self.num_experts, lambda x: times_sigmoid(k, one, x))
        elif spec.score == "softmax":
            self._softmax(self.logits, self.scores, self.num_experts)
        else:
            self._each(self.logits, self.scores, self.num_experts, lambda x: x)

    def _softmax(self, source: ir.Value, out: ir.Value, count: ir.Value) -> None:
        k, b = self.k, self.k.b
        top = k.var(k.load(F32, source))
        with k.loop(count, 1) as i:
            top.set(k.maximum(k.load(F32, source, k.mul(4, i)), top.get()))
        largest = k.splat(top.get())
        self._each(source, out, count, lambda x: exp(k, b.fsub(x, largest)))
        total = k.splat(self._sum(out, count))
        self._each(out, out, count, lambda x: b.fdiv(x, total))

    def _sum(self, values: ir.Value, count: ir.Value) -> ir.Value:
        k = self.k
        total = k.var(F32(0.0))
        with k.loop(count) as i:
            total.set(k.b.fadd(total.get(), k.load(F32, values, k.mul(4, i))))
        return total.get()

    def _each(self, source: ir.Value, out: ir.Value, count: ir.Value, value: Callable[[ir.Value], ir.Value]) -> None:
        k = self.k

        def body(part: Part) -> None:
            store_part(k, value(load_part(k, source, part)), out, part)

        each_part(k, count, body)

    # choice

    def _prepare_choice(self) -> None:
        k, b = self.k, self.k.b

        def body(part: Part) -> None:
            store_part(k, load_part(k, self.scores, part), self.choice, part)

        each_part(k, self.num_experts, body)
        with b.if_then(b.icmp_signed("!=", k.size(1), I64(0))):
            bias = k.pointer(1)

            def add(part: Part) -> None:
                total = b.fadd(load_part(k, self.choice, part), load_part(k, bias, part))
                store_part(k, total, self.choice, part)

            each_part(k, self.num_experts, add)
        with k.loop(self.num_experts) as i:
            k.store(I32(0), self.taken, k.mul(4, i))

    def _keep_best_groups(self) -> None:
        """Experts of other groups can be chosen no more. A group of one expert has no second best: 0 in its place."""
        k, b = self.k, self.k.b
        groups = k.size(8)
        size = b.sdiv(self.num_experts, groups)
        sums, kept = k.memory(4 * MOST_EXPERTS), k.memory(4 * MOST_EXPERTS)
        with k.loop(groups) as g:
            first, second = k.var(F32(_NONE)), k.var(F32(_NONE))
            with k.loop(k.mul(k.add(g, 1), size), k.mul(g, size)) as i:
                x = k.load(F32, self.choice, k.mul(4, i))
                best = first.get()
                ahead = b.fcmp_ordered(">", x, best)
                second.set(b.select(ahead, best, k.maximum(x, second.get())))
                first.set(b.select(ahead, x, best))
            k.store(b.fadd(first.get(), second.get()), sums, k.mul(4, g))
            k.store(I32(0), kept, k.mul(4, g))
        with k.loop(k.size(9)):
            k.store(I32(1), kept, k.mul(4, self._best(sums, kept, groups)))
        with k.loop(self.num_experts) as i:
            group = k.load(I32, kept, k.mul(4, b.sdiv(i, size)))
            with b.if_then(b.icmp_signed("==", group, I32(0))):
                k.store(F32(_NONE), self.choice, k.mul(4, i))

    def _best(self, values: ir.Value, taken: ir.Value, count: ir.Value) -> ir.Value:
        """The number of the largest that is not taken, i64; of equal ones the first; also among NaN."""
        k, b = self.k, self.k.b
        place, value = k.var(I64(-1)), k.var(F32(0.0))
        with k.loop(count) as i:
            x = k.load(F32, values, k.mul(4, i))
            free = b.icmp_signed("==", k.load(I32, taken, k.mul(4, i)), I32(0))
            none = b.icmp_signed("<", place.get(), I64(0))
            better = b.and_(free, b.or_(none, b.fcmp_ordered(">", x, value.get())))
            place.set(b.select(better, i, place.get()))
            value.set(b.select(better, x, value.get()))
        return place.get()

    def _take_best(self) -> None:
        self.k.store(I32(1), self.taken, self.k.mul(4, self._best(self.choice, self.taken, self.num_experts)))

    def _write_taken(self) -> None:
        k, b = self.k, self.k.b
        at = k.var(I64(0))
        with k.loop(self.num_experts) as i:
            taken = b.icmp_signed("!=", k.load(I32, self.taken, k.mul(4, i)), I32(0))
            with b.if_then(taken):
                place = k.mul(4, at.get())
                k.store(b.trunc(i, I32), self.ids, place)
                k.store(k.load(F32, self.scores, k.mul(4, i)), self.found, place)
                at.set(k.add(at.get(), 1))

    # weights

    def _weigh(self) -> None:
        """``weights`` are written once, as a chunk may be run again while others read them."""
        k, b, spec = self.k, self.k.b, self.spec
        if spec.score == "chosen":
            self._softmax(self.found, self.found, self.count)
        elif spec.normalize:
            total = k.splat(b.fadd(self._sum(self.found, self.count), k.number(6)))
            self._each(self.found, self.found, self.count, lambda x: b.fdiv(x, total))
        scaling = k.splat(k.number(7), F)
        self._each(self.found, self.weights, self.count, lambda x: b.fmul(x, scaling))
