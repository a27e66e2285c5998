"""What kernels are written in: a thin layer over LLVM's IR builder.

A kernel is ``void name(ptr args, i64 chunk)``: ``args`` is an array of 8-byte slots (pointers and sizes), ``chunk`` the
number of the piece of work to do. Code is written for vectors of 16 lanes, which LLVM splits for narrower machines;
only the dot product of bytes (``Kernel.dot4``) differs by machine.

Nothing here, and no kernel, may use LLVM's fast-math flags: each operation then rounds by itself, as IEEE 754 says, on
every machine, and only what is written as ``fma`` is one. That is why all machines give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64, PTR, VOID = ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.PointerType(), ir.VoidType()
LANES = 16
_FLOATS = {F16: "f16", F32: "f32", F64: "f64"}


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


F, I = vec(F32), vec(I32)  # the two types that nearly all code is in


def suffix(type_: ir.Type) -> str:
    """How the names of intrinsics end: ``"v16f32"``."""
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{suffix(type_.element)}"
    return f"i{type_.width}" if isinstance(type_, ir.IntType) else _FLOATS[type_]


class Kernel:
    """One function under construction; ``b`` is llvmlite's builder. Made by ``kernel.build_module``."""

    def __init__(self, module: ir.Module, name: str, isa: str, types: Sequence[ir.Type] = (PTR, I64)) -> None:
        self.module, self.isa = module, isa
        self.function = ir.Function(module, ir.FunctionType(VOID, types), name)
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.function.append_basic_block("body"))
        self.args, self.chunk = self.function.args[:2]

    def finish(self) -> None:
        self.b.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.basic_blocks[1])

    # values

    def n(self, value: ir.Value | int, type_: ir.Type = I64) -> ir.Value:
        return value if isinstance(value, ir.Value) else ir.Constant(type_, value)

    def splat(self, value: ir.Value | float, type_: ir.Type = F) -> ir.Value:
        """All lanes equal: a constant, or a scalar of the element's type."""
        if not isinstance(value, ir.Value):
            return ir.Constant(type_, [value] * type_.count)
        one = self.b.insert_element(ir.Constant(type_, ir.Undefined), value, I32(0))
        zeros = ir.Constant(vec(I32, type_.count), [0] * type_.count)
        return self.b.shuffle_vector(one, ir.Constant(type_, ir.Undefined), zeros)

    def constant(self, values: Sequence[float], element: ir.Type = F32) -> ir.Value:
        return ir.Constant(vec(element, len(values)), list(values))

    def var(self, value: ir.Value) -> Var:
        return Var(self, value)

    def add(self, a: ir.Value | int, *more: ir.Value | int) -> ir.Value:
        a = self.n(a)
        for value in more:
            a = self.b.add(a, self.n(value))
        return a

    def mul(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        return self.b.mul(self.n(a), self.n(b))

    def smaller(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        """Of two i64."""
        a, b = self.n(a), self.n(b)
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    # memory

    def pointer(self, slot: int) -> ir.Value:
        return self.load(PTR, self.args, 8 * slot)

    def size(self, slot: int) -> ir.Value:
        return self.load(I64, self.args, 8 * slot)

    def number(self, slot: int) -> ir.Value:
        """An f32 in the low half of a slot."""
        return self.load(F32, self.args, 8 * slot)

    def at(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """``offset`` in bytes."""
        return self.b.gep(pointer, [self.n(offset)], source_etype=I8)

    def load(self, type_: ir.Type, pointer: ir.Value, offset: ir.Value | int = 0, align: int = 1) -> ir.Value:
        return self.b.load(self.at(pointer, offset), align=align, typ=type_)

    def store(self, value: ir.Value, pointer: ir.Value, offset: ir.Value | int = 0, align: int = 1) -> None:
        self.b.store(value, self.at(pointer, offset), align=align)

    def load_first(
        self, type_: ir.Type, count: ir.Value | int, pointer: ir.Value, offset: ir.Value | int = 0
    ) -> ir.Value:
        """The first ``count`` (i64, 0 or more) lanes; the others are zero and their memory is not touched."""
        zero = ir.Constant(type_, None)
        return self.call(
            f"llvm.masked.load.{suffix(type_)}.p0", type_,
            self.at(pointer, offset), I32(1), self._first(type_.count, count), zero,
        )  # fmt: skip

    def store_first(
        self, value: ir.Value, count: ir.Value | int, pointer: ir.Value, offset: ir.Value | int = 0
    ) -> None:
        """Only the first ``count`` (i64) lanes are written."""
        mask = self._first(value.type.count, count)
        self.call(f"llvm.masked.store.{suffix(value.type)}.p0", VOID, value, self.at(pointer, offset), I32(1), mask)

    def _first(self, lanes: int, count: ir.Value | int) -> ir.Value:
        type_ = vec(I64, lanes)
        return self.b.icmp_signed("<", ir.Constant(type_, list(range(lanes))), self.splat(self.n(count), type_))

    def prefetch(self, pointer: ir.Value, offset: ir.Value | int = 0, cache: int = 1) -> None:
        """Asks for a line that is read soon, into the first or second cache. Never faults, wherever it points."""
        self.call("llvm.prefetch.p0", VOID, self.at(pointer, offset), I32(0), I32(4 - cache), I32(1))

    def barrier(self) -> None:
        """No instruction: LLVM moves no read and no write across. For loops that fill the registers: it would read
        ahead, and put what it has read onto the stack."""
        self.b.fence("seq_cst", "singlethread")

    def memory(self, num_bytes: int) -> ir.Value:
        """Private scratch on the stack, aligned to 64; at most some 100 KB, which every platform's threads have."""
        entry = ir.IRBuilder(self.entry)
        slot = entry.alloca(I8, size=I64(num_bytes))
        slot.align = 64
        return entry.inttoptr(entry.ptrtoint(slot, I64), PTR)  # untyped; LLVM folds the pair away

    # arithmetic

    def call(self, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [v.type for v in values]), name)
        return self.b.call(function, values)

    def unary(self, name: str, x: ir.Value) -> ir.Value:
        """An LLVM intrinsic that rounds correctly or not at all: ``fabs``, ``rint``, ``floor``, ``sqrt``."""
        return self.call(f"llvm.{name}.{suffix(x.type)}", x.type, x)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        return self.call(f"llvm.fma.{suffix(c.type)}", c.type, a, b, c)

    def shuffle(self, a: ir.Value, b: ir.Value, picks: Sequence[int]) -> ir.Value:
        return self.b.shuffle_vector(a, b, ir.Constant(vec(I32, len(picks)), list(picks)))

    def total(self, a: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Lanes combined by halves: one fixed tree on every machine."""
        lanes = a.type.count
        while lanes > 1:
            lanes //= 2
            low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
            a = combine(self.shuffle(a, a, low), self.shuffle(a, a, high))
        return self.b.extract_element(a, I32(0))

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a`` where a > b, else ``b``: so NaN in ``b`` stays, NaN in ``a`` is dropped."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def widen(self, kind: str, lanes: int, pointer: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """``lanes`` values of type "f32", "f16" or "bf16" in memory, as f32; exact."""
        if kind == "f32":
            return self.load(vec(F32, lanes), pointer, offset)
        if kind == "f16":
            return self.b.fpext(self.load(vec(F16, lanes), pointer, offset), vec(F32, lanes))
        wide = vec(I32, lanes)
        bits = self.b.zext(self.load(vec(I16, lanes), pointer, offset), wide)
        return self.b.bitcast(self.b.shl(bits, self.splat(16, wide)), vec(F32, lanes))

    def dot4(self, total: ir.Value, codes: ir.Value, values: ir.Value) -> ir.Value:
        """i32 lanes += four unsigned bytes (``codes``) times four signed bytes (``values``). Exact, so every machine
        has the same bits. ``codes`` must not exceed 127: AVX2 sums pairs of products in 16 bits."""
        lanes = total.type.count
        bits, bytes_ = lanes * 32, vec(I8, lanes * 4)
        codes, values = self.b.bitcast(codes, bytes_), self.b.bitcast(values, bytes_)
        if self.isa in ("avx512vnni", "avxvnni"):
            return self.call(f"llvm.x86.avx512.vpdpbusd.{bits}", total.type, total, codes, values)
        if self.isa == "neon":
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, total, codes, values)
        half = vec(I16, lanes * 2)
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", half, codes, values)
        ones = ir.Constant(half, [1] * half.count)
        return self.b.add(total, self.call("llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))

    def look_up(self, indices: ir.Value, table: Sequence[int]) -> ir.Value:
        """Each byte of ``indices`` (a vector of i32), 0 to 15, -> ``table``'s of that number; from 128 on -> 0."""
        type_, num_bytes = indices.type, 4 * indices.type.count
        most = {"avx512vnni": 64, "neon": 16}.get(self.isa, 32)
        if num_bytes > most:
            half = type_.count // 2
            parts = [self.shuffle(indices, indices, range(half * i, half * i + half)) for i in (0, 1)]
            return self.shuffle(*(self.look_up(part, table) for part in parts), range(type_.count))
        bytes_ = vec(I8, num_bytes)
        values, where = self.constant([*table] * (num_bytes // 16), I8), self.b.bitcast(indices, bytes_)
        if self.isa == "neon":
            found = self.call("llvm.aarch64.neon.tbl1.v16i8", bytes_, values, where)
        else:
            name = {64: "avx512.pshuf.b.512", 32: "avx2.pshuf.b", 16: "ssse3.pshuf.b.128"}[num_bytes]
            found = self.call(f"llvm.x86.{name}", bytes_, values, where)
        return self.b.bitcast(found, type_)

    # control

    @contextmanager
    def loop(self, stop: ir.Value | int, start: ir.Value | int = 0, step: int = 1) -> Iterator[ir.Value]:
        """``for i in range(start, stop, step)``."""
        i = self.var(self.n(start))
        head, body, done = (self.b.append_basic_block(name) for name in ("head", "body", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(self.b.icmp_signed("<", i.get(), self.n(stop)), body, done)
        self.b.position_at_end(body)
        yield i.get()
        i.set(self.add(i.get(), step))
        self.b.branch(head)
        self.b.position_at_end(done)


class Var:
    """A local; LLVM turns it into a register."""

    def __init__(self, kernel: Kernel, value: ir.Value) -> None:
        self._kernel = kernel
        self._slot = ir.IRBuilder(kernel.entry).alloca(value.type)
        self.type = value.type
        self.set(value)

    def get(self) -> ir.Value:
        return self._kernel.b.load(self._slot, typ=self.type)

    def set(self, value: ir.Value) -> None:
        self._kernel.b.store(value, self._slot)
