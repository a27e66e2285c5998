"""Code that runs kernels: the list of a pool's stages, and chunks one after another.

Both set the floating-point control register to its default while they run and restore it: a program that asked for
denormals to be flushed (``torch.set_flush_denormal``) would otherwise change results of the thread that did, and of no
other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from exl.cpu_kernels.ir import I8, I32, I64, PTR, VOID, Kernel
from exl.cpu_kernels.kernel import KernelSpec

_DEFAULT_MXCSR = 0x1F80  # round to nearest, denormals kept, no exceptions
_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"  # the system's own; found by its name
CALLER, REPEAT = 1, 2
CLOSED = -(1 << 40)
_TRIES = 256
STAGE_SLOTS = 16  # of 8 bytes; see RunStages


@contextmanager
def default_rounding(k: Kernel) -> Iterator[None]:
    """Around code that calls kernels."""
    if k.isa == "neon":
        yield
        return
    word = k.memory(8)
    k.call("llvm.x86.sse.stmxcsr", VOID, word)
    before = k.load(I32, word)
    k.store(I32(_DEFAULT_MXCSR), word)
    k.call("llvm.x86.sse.ldmxcsr", VOID, word)
    yield
    k.store(before, word)
    k.call("llvm.x86.sse.ldmxcsr", VOID, word)


def call_kernel(k: Kernel, address: ir.Value, args: ir.Value, chunk: ir.Value) -> None:
    kernel = k.b.inttoptr(address, ir.FunctionType(VOID, (PTR, I64)).as_pointer())
    k.b.call(kernel, (args, chunk))


def _relax(k: Kernel) -> None:
    if k.isa == "neon":
        k.call("llvm.aarch64.hint", VOID, I32(1))
    else:
        k.call("llvm.x86.sse2.pause", VOID)


@dataclass(frozen=True)
class Invoke(KernelSpec):
    """``invoke(kernel's address, args, first chunk, end)``: chunks one after another, on the calling thread."""

    types: ClassVar = (I64, PTR, I64, I64)
    name: ClassVar = "invoke"

    def emit(self, k: Kernel) -> None:
        address, args, first, end = k.function.args
        with default_rounding(k), k.loop(end, first) as chunk:
            call_kernel(k, address, args, chunk)


@dataclass(frozen=True)
class RunStages(KernelSpec):
    """``run_stages(stages, number of stages, active, spin, mode)``: one thread's walk through the list of stages.

    A stage is 16 slots of 8 bytes: 0 the kernel's address, 1 its args, 2 number of chunks, 3 flags (a byte for each
    chunk); and in a cache line of their own 8 next chunk, 9 chunks done. A thread takes chunks by adding one to "next",
    and passes on once all chunks are done; so a thread that comes late finds stages done, and catches up by reading one
    counter of each. A thread that waits spins for ``spin`` cycles. Then, if ``mode`` has ``REPEAT``, it runs the chunks
    that are still out itself: a peer that the system has descheduled never holds up the others, and stores later what
    is there already. Otherwise it lets others run.

    ``active`` i64: the threads that are in the list, plus ``CLOSED`` between runs. The thread whose ``mode`` has
    ``CALLER`` opens and closes the list; without ``REPEAT`` it returns only when all threads have left. A thread that
    finds the list closed, because it has been woken late, leaves at once and touches nothing.
    """

    types: ClassVar = (PTR, I64, PTR, I64, I64)
    name: ClassVar = "run_stages"

    def emit(self, k: Kernel) -> None:
        b = k.b
        stages, count, active, spin, mode = k.function.args
        caller, repeat = (b.icmp_signed("!=", b.and_(mode, I64(bit)), I64(0)) for bit in (CALLER, REPEAT))
        change = b.select(caller, I64(1 - CLOSED), I64(1))
        before = b.atomic_rmw("add", active, change, "seq_cst")
        is_open = b.or_(caller, b.icmp_signed(">=", before, I64(0)))
        with b.if_then(is_open), default_rounding(k), k.loop(count) as index:
            self._stage(k, k.at(stages, k.mul(index, 8 * STAGE_SLOTS)), spin, repeat)
        b.atomic_rmw("sub", active, change, "seq_cst")
        waits = b.and_(caller, b.not_(repeat))
        wait, look, sleep, out = (b.append_basic_block(name) for name in ("leave", "look", "sleep", "left"))
        b.cbranch(waits, wait, out)
        b.position_at_end(wait)
        tries = k.var(I64(0))
        b.branch(look)
        b.position_at_end(look)
        tries.set(k.add(tries.get(), 1))
        inside = b.icmp_signed(">", b.load_atomic(active, "acquire", 8, typ=I64), I64(CLOSED))
        b.cbranch(inside, sleep, out)
        b.position_at_end(sleep)
        _relax(k)
        with b.if_then(b.icmp_signed("==", b.and_(tries.get(), I64(_TRIES - 1)), I64(0))):
            k.call(_YIELD, I32)
        b.branch(look)
        b.position_at_end(out)

    def _stage(self, k: Kernel, stage: ir.Value, spin: ir.Value, repeat: ir.Value) -> None:
        b = k.b
        num_chunks = k.load(I64, stage, 16, 8)
        names = ("take", "taken", "wait", "relax", "late", "out")
        take, taken, wait, relax, late, out = (b.append_basic_block(name) for name in names)
        b.cbranch(self._done(k, stage, num_chunks), out, take)
        b.position_at_end(take)
        chunk = b.atomic_rmw("add", k.at(stage, 64), I64(1), "seq_cst")
        since = k.var(k.call("llvm.readcyclecounter", I64))
        b.cbranch(b.icmp_signed("<", chunk, num_chunks), taken, wait)
        b.position_at_end(taken)
        self._execute(k, stage, chunk)
        b.branch(take)
        b.position_at_end(wait)
        b.cbranch(self._done(k, stage, num_chunks), out, relax)
        b.position_at_end(relax)
        _relax(k)
        waited = b.sub(k.call("llvm.readcyclecounter", I64), since.get())
        b.cbranch(b.icmp_signed(">", waited, spin), late, wait)
        b.position_at_end(late)
        with b.if_else(repeat) as (then, otherwise):
            with then, k.loop(num_chunks) as other:
                flag = b.load_atomic(k.at(k.load(PTR, stage, 24, 8), other), "acquire", 1, typ=I8)
                with b.if_then(b.icmp_signed("==", flag, I8(0))):
                    self._execute(k, stage, other)
            with otherwise:
                k.call(_YIELD, I32)
        since.set(k.call("llvm.readcyclecounter", I64))
        b.branch(wait)
        b.position_at_end(out)

    def _execute(self, k: Kernel, stage: ir.Value, chunk: ir.Value) -> None:
        call_kernel(k, k.load(I64, stage, 0, 8), k.load(PTR, stage, 8, 8), chunk)
        before = k.b.atomic_rmw("xchg", k.at(k.load(PTR, stage, 24, 8), chunk), I8(1), "seq_cst")
        with k.b.if_then(k.b.icmp_signed("==", before, I8(0))):
            k.b.atomic_rmw("add", k.at(stage, 72), I64(1), "seq_cst")

    def _done(self, k: Kernel, stage: ir.Value, num_chunks: ir.Value) -> ir.Value:
        return k.b.icmp_signed(">=", k.b.load_atomic(k.at(stage, 72), "acquire", 8, typ=I64), num_chunks)
