"""GPTQ's work on a block of inputs, by torch or by compiled kernels: grids fitted to groups, weights rounded.

Both give the same bits: the same operations in the same order, none of them fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from numpy.typing import NDArray

from exl.ops.cpu_target import cpu_target
from exl.quantize.grid import FACTORS, REFITS, Grid
from exl.threads import Threads

if TYPE_CHECKING:
    from exl.cpu_kernels.gptq_solve import GridForm
    from exl.cpu_kernels.kernel import KernelSpec
    from exl.cpu_kernels.library import Library

BLOCK = 128  # inputs per block: their updates to later blocks are applied together, as one matrix product


class Rounding(Protocol):
    """Weights are f32 or f64, and so are all other floats; columns are outputs. Arrays are contiguous."""

    compiled: bool

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """W [G * group_size, N] -> scales and zeros, each [G, N], as ``Grid.fit`` finds them for each group."""

    def round(
        self,
        grid: Grid,
        weight: torch.Tensor,
        factor: torch.Tensor,
        groups: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        group_size: int,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Rounds the inputs of a block one after the other, and subtracts each one's error, times its share, from the
        block's later inputs. Writes ``codes`` [n, N], whole numbers, and returns the errors [n, N], divided by U's
        diagonal.

        ``weight`` [n, N], n <= ``BLOCK``, which it may overwrite; ``factor`` [n, n]: the transposed block of U;
        ``groups`` i64 [n]: each input's row in ``scales`` and ``zeros`` [G, N]. If ``group_size`` is above 0, the block
        is whole groups of so many inputs, and a group's grid is fitted when its first input is reached.
        """

    def close(self) -> None:
        """Gives threads back."""


class TorchRounding:
    """One input at a time. ``threads``: how many compute what is many small operations."""

    compiled = False

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        grids = []
        for group in weight.view(-1, group_size, weight.shape[1]):
            with self._threads.measured(f"fit {weight.shape[1]}", 1):
                grids.append(grid.fit(group))
        scales, zeros = map(torch.stack, zip(*grids, strict=True))
        return scales, zeros

    def round(
        self,
        grid: Grid,
        weight: torch.Tensor,
        factor: torch.Tensor,
        groups: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        group_size: int,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        errors = torch.empty_like(weight)
        with self._threads.measured(f"solve {weight.shape[1]}", len(weight)):
            for i, g in enumerate(groups.tolist()):
                if group_size and i % group_size == 0:
                    scales[g], zeros[g] = grid.fit(weight[i : i + group_size])
                codes[i] = grid.codes(weight[i], scales[g], zeros[g])
                errors[i] = (weight[i] - (codes[i] - zeros[g]) * scales[g]) / factor[i, i]
                weight[i + 1 :] -= torch.outer(factor[i + 1 :, i], errors[i])
        return errors

    def close(self) -> None:
        pass


class CompiledRounding:
    """Chunks of columns, spread over ``num_threads`` threads."""

    compiled = True

    def __init__(self, library: Library, num_threads: int) -> None:
        from exl.cpu_kernels.pool import Pool

        self._pool = Pool(library, num_threads)

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        from exl.cpu_kernels.gptq_solve import FitGrids

        form, num_chunks = _form(grid, weight)
        num_groups, N = len(weight) // group_size, weight.shape[1]
        scales, zeros = (weight.new_empty(num_groups, N) for _ in range(2))
        arrays = (weight.numpy(), N, group_size, scales.numpy(), zeros.numpy())
        self._run(FitGrids(form), num_groups * num_chunks, (*arrays, *_search(weight), num_chunks))
        return scales, zeros

    def round(
        self,
        grid: Grid,
        weight: torch.Tensor,
        factor: torch.Tensor,
        groups: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        group_size: int,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        from exl.cpu_kernels.gptq_solve import RoundBlock

        form, num_chunks = _form(grid, weight)
        errors = torch.empty_like(weight)
        arrays = (tensor.numpy() for tensor in (factor, scales, zeros, groups, codes, errors))
        args = (weight.numpy(), weight.shape[1], len(weight), *arrays)
        if group_size:
            args += (group_size, *_search(weight))
        self._run(RoundBlock(form, fits=group_size > 0), num_chunks, args)
        return errors

    def _run(self, kernel: KernelSpec, num_chunks: int, args: tuple[NDArray | int, ...]) -> None:
        from exl.cpu_kernels.pool import Program, Stage

        self._pool.run(Program(self._pool.library, [Stage(kernel, num_chunks, args)], repeats=False))

    def close(self) -> None:
        self._pool.close()


def _form(grid: Grid, weight: torch.Tensor) -> tuple[GridForm, int]:
    """And how many chunks of columns the weights are."""
    from exl.cpu_kernels.gptq_solve import GridForm, chunk_columns

    element = "f64" if weight.dtype == torch.float64 else "f32"
    form = GridForm(grid.bits, grid.sym, grid.min_zero, element)
    return form, -(-weight.shape[1] // chunk_columns(element))


def _search(weight: torch.Tensor) -> tuple[NDArray, int, int]:
    """How grids are searched: factors of the span, of the weights' type, their number, and refits."""
    return weight.new_tensor(FACTORS).numpy(), len(FACTORS), REFITS


def make_rounding(threads: Threads) -> Rounding:
    """Compiled kernels; where they cannot run, torch, as for models (``cpu_target``)."""
    if not cpu_target().compiled:
        return TorchRounding(threads)
    from exl.cpu_kernels.library import shared_library

    return CompiledRounding(shared_library(), threads.limit)
