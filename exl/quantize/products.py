"""Sums of outer products of calibration rows, in f32, by torch or by compiled kernels.

The kernels sum in another order than torch, so results differ in their last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from exl.cpu_kernels.pool import Pool

_CHUNKS_A_THREAD = 4  # at least, where there are columns for it
_COLUMNS = (16, 96)  # of a chunk: a multiple of the first, at most the second


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
        from exl.cpu_kernels.dense import dense_kernel
        from exl.cpu_kernels.pool import Program, Stage

        (M, K), N = a.shape, len(b)
        step, most = _COLUMNS
        columns = max(step, min(most, N // (_CHUNKS_A_THREAD * self._pool.num_threads)) // step * step)
        library, arrays = self._pool.library, (b.numpy(), a.numpy(), out.numpy())
        no_end = (None, None, 0, 1.0, None)  # neither bias nor residual
        args = (*arrays, N, K, M, N, columns, *no_end, K)
        stage = Stage(dense_kernel("f32", M, library.isa), -(-N // columns), args)
        self._pool.run(Program(library, [stage], repeats=False))
        return out
