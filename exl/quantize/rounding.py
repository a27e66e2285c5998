"""GPTQ's work on a block of inputs, by torch or by compiled kernels: grids fitted to groups, weights rounded.

Both give the same bits: the same operations in the same order, none of them fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from numpy.typing import NDArray

from exl.quantize.grid import FACTORS, REFITS, Grid
from exl.threads import Threads

if TYPE_CHECKING:
    from exl.cpu_kernels.gptq_solve import GridForm
    from exl.cpu_kernels.kernel import KernelSpec
    from exl.cpu_kernels.pool import Pool

BLOCK = 128  # inputs per block: their updates to later blocks are applied together, as one matrix product


@dataclass(frozen=True)
class Block:
    """Inputs that are rounded one after the other. n of them, at most ``BLOCK``; N outputs, G groups."""

    weight: torch.Tensor  # [n, N]; rounding may overwrite it
    factor: torch.Tensor  # [n, n], the transposed block of U
    groups: torch.Tensor  # i64 [n]: each input's row in scales and zeros
    scales: torch.Tensor  # [G, N]
    zeros: torch.Tensor  # [G, N]
    codes: torch.Tensor  # [n, N], whole numbers, to be written
    # Above 0: the block is whole groups of so many inputs, and a group's grid is fitted, and written to ``scales`` and
    # ``zeros``, when its first input is reached.
    group_size: int


class Rounding(Protocol):
    """Weights are f32 or f64, and so are all other floats; columns are outputs. Arrays are contiguous."""

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """W [G * group_size, N] -> scales and zeros, each [G, N], as ``Grid.fit`` finds them for each group."""

    def round(self, grid: Grid, block: Block) -> torch.Tensor:
        """Rounds the inputs of a block one after the other, and subtracts each one's error, times its share, from the
        block's later inputs. Returns the errors [n, N], divided by U's diagonal."""


class TorchRounding:
    """One input at a time. ``threads``: how many compute what is many small operations."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        grids = []
        for group in weight.view(-1, group_size, weight.shape[1]):
            with self._threads.measured(f"fit {weight.shape[1]}", 1):
                grids.append(grid.fit(group))
        scales, zeros = map(torch.stack, zip(*grids, strict=True))
        return scales, zeros

    def round(self, grid: Grid, block: Block) -> torch.Tensor:
        weight, factor, scales, zeros, codes = block.weight, block.factor, block.scales, block.zeros, block.codes
        errors = torch.empty_like(weight)
        with self._threads.measured(f"solve {weight.shape[1]}", len(weight)):
            for i, g in enumerate(block.groups.tolist()):
                if block.group_size and i % block.group_size == 0:
                    scales[g], zeros[g] = grid.fit(weight[i : i + block.group_size])
                codes[i] = grid.codes(weight[i], scales[g], zeros[g])
                errors[i] = (weight[i] - (codes[i] - zeros[g]) * scales[g]) / factor[i, i]
                weight[i + 1 :] -= torch.outer(factor[i + 1 :, i], errors[i])
        return errors


class CompiledRounding:
    """Chunks of columns, spread over the pool's threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def fit(self, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        from exl.cpu_kernels.gptq_solve import FitGrids

        form, num_chunks = _form(grid, weight)
        num_groups, N = len(weight) // group_size, weight.shape[1]
        scales, zeros = (weight.new_empty(num_groups, N) for _ in range(2))
        arrays = (weight.numpy(), N, group_size, scales.numpy(), zeros.numpy())
        self._run(FitGrids(form), num_groups * num_chunks, (*arrays, *_search(weight), num_chunks))
        return scales, zeros

    def round(self, grid: Grid, block: Block) -> torch.Tensor:
        from exl.cpu_kernels.gptq_solve import RoundBlock

        weight = block.weight
        form, num_chunks = _form(grid, weight)
        errors = torch.empty_like(weight)
        tensors = (block.factor, block.scales, block.zeros, block.groups, block.codes, errors)
        args = (weight.numpy(), weight.shape[1], len(weight), *(tensor.numpy() for tensor in tensors))
        if block.group_size:
            args += (block.group_size, *_search(weight))
        self._run(RoundBlock(form, fits=block.group_size > 0), num_chunks, args)
        return errors

    def _run(self, kernel: KernelSpec, num_chunks: int, args: tuple[NDArray | int, ...]) -> None:
        from exl.cpu_kernels.pool import Program, Stage

        self._pool.run(Program(self._pool.library, [Stage(kernel, num_chunks, args)], repeats=False))


def _form(grid: Grid, weight: torch.Tensor) -> tuple[GridForm, int]:
    """And how many chunks of columns the weights are."""
    from exl.cpu_kernels.gptq_solve import GridForm, chunk_columns

    element = "f64" if weight.dtype == torch.float64 else "f32"
    form = GridForm(grid.bits, grid.sym, grid.min_zero, element)
    return form, -(-weight.shape[1] // chunk_columns(element))


def _search(weight: torch.Tensor) -> tuple[NDArray, int, int]:
    """How grids are searched: factors of the span, of the weights' type, their number, and refits."""
    return weight.new_tensor(FACTORS).numpy(), len(FACTORS), REFITS
