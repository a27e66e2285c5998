"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) and round-to-nearest: one weight matrix -> codes, scales and zeros.

Weights are [K, N]: y = x W. GPTQ goes through the inputs one by one. It rounds an input's weights of all outputs at
once, and moves the error into the inputs that are still to come, along the inverse Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl.errors import ExlError
from exl.quantize.grid import Grid

_BLOCK = 128  # inputs whose updates of the later ones are saved up and made by one matrix product
_MAX_DAMP = 1.0
_COLUMNS = 1024  # of the Hessian, computed at a time: bounds the temporary memory


@dataclass(frozen=True)
class QuantizedWeight:
    """``W[k, n] ~ scales[g, n] * (codes[k, n] - zeros[g, n])``, g = g_idx[k]. Inputs in the checkpoint's order."""

    codes: torch.Tensor  # u8 [K, N]
    scales: torch.Tensor  # f16 [G, N]
    zeros: torch.Tensor  # u8 [G, N]
    g_idx: torch.Tensor  # i32 [K]

    def dequantize(self) -> torch.Tensor:
        """f32 [K, N], exactly."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[groups]) * self.scales.float()[groups]


class Hessian:
    """``H = 2/n sum x x^T`` over n rows x [K], of the squared error of a linear's outputs. H sums in f64.

    ``drift`` is ``2/n sum x d^T``: how the rows correlate with what the outputs lack, d [N] (see :func:`gptq`).
    """

    def __init__(self, K: int, N: int = 0) -> None:
        """``N``: outputs whose lack is recorded; 0: none."""
        self._sum = torch.zeros(K, K, dtype=torch.float64)
        self._drift = torch.zeros(K, N) if N else None
        self.num_rows = 0

    def add(self, x: torch.Tensor, lack: torch.Tensor | None = None) -> None:
        """Rows x f32 [T, K] and, where it is recorded, what their outputs lack, f32 [T, N]."""
        K = x.shape[1]
        for start in range(0, K, _COLUMNS):  # the lower triangle suffices
            stop = min(K, start + _COLUMNS)
            self._sum[start:, start:stop] += x[:, start:].T @ x[:, start:stop]
        if self._drift is not None:
            self._drift += x.T @ lack
        self.num_rows += x.shape[0]

    def finish(self) -> torch.Tensor:
        """H, f64 [K, K]; no more rows can be added."""
        self._sum.tril_()
        self._sum += self._sum.tril(-1).T
        return self._sum.mul_(2 / max(1, self.num_rows))

    def finish_drift(self) -> torch.Tensor | None:
        """f32 [K, N]; None where none was recorded."""
        return None if self._drift is None else self._drift.mul_(2 / max(1, self.num_rows))


def round_to_nearest(weight: torch.Tensor, grid: Grid, group_size: int) -> QuantizedWeight:
    """W [K, N]; groups of neighbours, each from its smallest to its largest weight."""
    K, N = weight.shape
    grouped = weight.view(K // group_size, group_size, N)
    scales, zeros = map(torch.stack, zip(*(grid.fit_span(group) for group in grouped), strict=True))
    codes = torch.cat([grid.codes(*parts) for parts in zip(grouped, scales, zeros, strict=True)])
    return _result(codes, scales, zeros, torch.arange(K) // group_size)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group_size: int,
    *,
    act_order: bool,
    static_groups: bool = False,
    damp: float = 0.01,
    drift: torch.Tensor | None = None,
) -> QuantizedWeight:
    """W [K, N], H f64 [K, K] -> codes that change ``x W`` least over the x of H. Works in the type of W, f32 or f64.

    ``act_order`` rounds inputs in descending order of H's diagonal: the important ones first, while there are still
    others to take up their error. Then either groups are runs of inputs in *that* order, their grids fitted when
    their turn comes, to the weights as updated until then; or with ``static_groups`` they are neighbours, as without
    act-order, and their grids are fitted beforehand. Inputs that never were anything but 0 are rounded to nearest.

    With ``drift`` (:class:`Hessian`) the target is not W, but W plus what a least-squares fit says its outputs lack:
    W + (H + damp)^-1 drift. The same idea as in GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695).

    Spends H, so that no more than three matrices of its size are alive at once. Raises ``ExlError`` where it is not
    finite.
    """
    K = weight.shape[0]
    order = torch.arange(K)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian.copy_(hessian[order[:, None], order])
    U = _inverse_factor(hessian, damp).to(weight.dtype)
    weight = weight[order]
    if drift is not None:
        weight += U.T @ (U @ drift[order].to(weight.dtype))
    back = torch.argsort(order)
    if act_order and static_groups:
        grouped = weight[back].view(K // group_size, group_size, -1)
        scales, zeros = map(torch.stack, zip(*(grid.fit(group) for group in grouped), strict=True))
        g_idx = order // group_size
        codes = _solve(weight, U, grid, g_idx, scales, zeros, 0)
    else:
        scales = weight.new_empty(K // group_size, weight.shape[1])
        zeros = torch.empty_like(scales)
        g_idx = torch.arange(K) // group_size
        codes = _solve(weight, U, grid, g_idx, scales, zeros, group_size)
    return _result(codes[back], scales, zeros, g_idx[back])


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper triangular U with ``U^T U = (H + damp * mean of its diagonal)^-1``, f64. Spends H.

    From the Cholesky factor of H with rows and columns in reverse, which saves inverting H itself: with J reversing,
    ``J H J = L L^T`` gives ``H = V V^T``, ``V = J L J`` upper triangular, and ``U = V^-1``. Damping grows until the
    factor exists. Inputs that were always 0 do not count in the mean.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ExlError("the calibration activations are not finite")
    diagonal = hessian.diagonal()
    live = diagonal[diagonal > 0]
    mean = float(live.mean()) if len(live) else 1.0
    added = 0.0
    for share in (*(damp * 10**i for i in range(8) if damp * 10**i < _MAX_DAMP), _MAX_DAMP):
        diagonal += share * mean - added
        added = share * mean
        factor, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            factor = factor.flip(0, 1)
            identity = hessian.zero_().fill_diagonal_(1.0)
            return torch.linalg.solve_triangular(factor, identity, upper=True)
    raise ExlError("the Hessian has no Cholesky factor, whatever the damping")


def _solve(
    weight: torch.Tensor,
    U: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """Codes [K, N] in the order of ``weight``, which it spends. ``group_size`` above 0: fits each group's grid when its
    first input's turn comes, into ``scales`` and ``zeros``."""
    codes = torch.empty_like(weight)
    groups = g_idx.tolist()
    for start, stop in _blocks(len(weight), group_size):
        errors = torch.empty_like(weight[start:stop])
        for i in range(start, stop):
            g = groups[i]
            if group_size and i % group_size == 0:
                scales[g], zeros[g] = grid.fit(weight[i : i + group_size])
            codes[i] = grid.codes(weight[i], scales[g], zeros[g])
            error = (weight[i] - (codes[i] - zeros[g]) * scales[g]) / U[i, i]
            weight[i + 1 : stop] -= torch.outer(U[i, i + 1 : stop], error)
            errors[i - start] = error
        weight[stop:] -= U[start:stop, stop:].T @ errors
    return codes


def _blocks(K: int, group_size: int) -> list[tuple[int, int]]:
    """Blocks that a group's first input never finds half updated: whole groups where they fit, else parts of one."""
    if 0 < group_size <= _BLOCK:
        step = _BLOCK // group_size * group_size
        return [(start, min(K, start + step)) for start in range(0, K, step)]
    group_size = group_size or K
    return [
        (start, min(start + _BLOCK, first + group_size))
        for first in range(0, K, group_size)
        for start in range(first, first + group_size, _BLOCK)
    ]


def _result(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> QuantizedWeight:
    return QuantizedWeight(codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), g_idx.to(torch.int32))
