"""Sums of outer products of calibration rows, in f32, by torch or by compiled kernels.

The kernels sum in another order than torch, so results differ in their last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from exl.cpu_kernels.pool import Pool


class Products(Protocol):
    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """x f32 [T, K] -> x.T [K, T], as ``multiply`` takes it."""

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out f32 [M, N], contiguous, = a [M, T] @ b.T; a and b [N, T] are some of the rows of ``columns``."""


class TorchProducts:
    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return x.T  # which torch multiplies as fast as if it were contiguous

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b.T, out=out)


class CompiledProducts:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        return x.T.contiguous()

    def multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        from exl.cpu_kernels.pool import Program
        from exl.ops.compiled_linear import LinearStages
        from exl.ops.compiled_tape import Rows, SharedMemory, Tape

        library, tape = self._pool.library, Tape(SharedMemory({}))
        stages = LinearStages("f32", library.isa, self._pool.num_threads)
        stages.multiply_dense(tape, Rows.of(a), b, "f32", Rows.of(out))
        self._pool.run(Program(library, tape.stages, repeats=False))
        return out
