"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) and round-to-nearest: one weight matrix -> codes, scales and zeros.

Weights are [K, N]: y = x W. GPTQ processes the K inputs one by one. It rounds an input's weights for all outputs at
once, and compensates the error in the weights of the inputs not yet rounded, using the inverse Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exl.errors import ExlError
from exl.quantize.grid import Grid
from exl.quantize.products import Products, TorchProducts
from exl.quantize.rounding import BLOCK, Block, Rounding, TorchRounding
from exl.threads import Threads

_MAX_DAMP = 1.0
_ROWS = 256  # rows of the Hessian that are computed at a time: larger blocks waste more of their upper triangle


@dataclass(frozen=True)
class QuantizedWeight:
    """``W[k, n] ~ scales[g, n] * (codes[k, n] - zeros[g, n])``, g = g_idx[k]. Inputs k in the checkpoint's order."""

    codes: torch.Tensor  # u8 [K, N]
    scales: torch.Tensor  # f16 [G, N]
    zeros: torch.Tensor  # u8 [G, N]
    g_idx: torch.Tensor  # i32 [K]

    def dequantize(self) -> torch.Tensor:
        """f32 [K, N], exactly."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[groups]) * self.scales.float()[groups]


class Hessian:
    """``H = 2/n sum x x^T`` over n rows x [K]: the Hessian of the squared error of a linear's outputs. Sums in f64.

    The product is ``2/n sum x d^T`` over rows d [N] that belong to the rows x. With d = the dense model's output -
    output it is the ``drift`` of :func:`gptq`: how rows correlate with the error that the outputs already have.
    """

    def __init__(self, K: int, N: int = 0, products: Products | None = None) -> None:
        """``K``: inputs. ``N``: the width of d, to sum the product as well; 0: not. ``products``: None is torch's."""
        self._products = TorchProducts() if products is None else products
        self._sum = torch.zeros(K, K, dtype=torch.float64)
        self._product = torch.empty(max(min(K, _ROWS) * K, K * N))
        self._with_d = torch.zeros(K, N, dtype=torch.float64) if N else None
        self.num_rows = 0

    def add(self, x: torch.Tensor, d: torch.Tensor | None = None) -> None:
        """Adds rows x f32 [T, K] and d f32 [T, N], which is needed for the product."""
        K = x.shape[1]
        columns = self._products.columns(x)
        for start in range(0, K, _ROWS):  # the lower triangle suffices
            stop = min(K, start + _ROWS)
            self._sum[start:stop, :stop] += self._multiply(columns[start:stop], columns[:stop])
        if self._with_d is not None:
            self._with_d += self._multiply(columns, self._products.columns(d))
        self.num_rows += x.shape[0]

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b.T, until the next call."""
        out = self._product[: len(a) * len(b)].view(len(a), len(b))
        return self._products.multiply(a, b, out)

    def finish(self) -> torch.Tensor:
        """H, f64 [K, K]; no more rows can be added."""
        self._sum.tril_()
        self._sum += self._sum.tril(-1).T
        return self._sum.mul_(2 / max(1, self.num_rows))

    def finish_product(self) -> torch.Tensor | None:
        """f64 [K, N]; None if N was 0. No more rows can be added."""
        return None if self._with_d is None else self._with_d.mul_(2 / max(1, self.num_rows))


def round_to_nearest(weight: torch.Tensor, grid: Grid, group_size: int) -> QuantizedWeight:
    """W [K, N]; groups of consecutive inputs, the last one shorter if need be; each group's grid spans its smallest to
    its largest weight."""
    K = len(weight)
    grouped = weight.split(group_size)
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
    rounding: Rounding | None = None,
) -> QuantizedWeight:
    """W [K, N], H f64 [K, K] -> codes that keep the change of ``x W`` small over the rows x of H. W is f32 or f64, and
    the rounding works in that type.

    ``act_order`` rounds inputs in descending order of H's diagonal: important inputs first, while many others are left
    to compensate their error. By default, groups are then runs of inputs in *that* order, and a group's grid is
    fitted when the group is reached, to the weights as updated so far. With ``static_groups``, groups are consecutive
    inputs, as without act-order, and their grids are fitted beforehand. Inputs that were always 0 are rounded to
    nearest.

    With ``drift`` (:class:`Hessian`) the target is W + (H + damp)^-1 drift instead of W: a least-squares correction of
    the error that the outputs already have. The same idea as GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695).

    ``rounding``: what rounds the weights of a block; None: torch. All of them give the same codes.

    Overwrites H, so that at most three matrices of its size are alive at once. Raises ``ExlError`` if H is not finite.
    """
    factor = factorize(hessian, act_order=act_order, damp=damp, dtype=weight.dtype)
    return solve(weight, factor, grid, group_size, static_groups=static_groups, drift=drift, rounding=rounding)


@dataclass(frozen=True)
class Factor:
    """What is done to a Hessian, for all widths and all outputs of its linear."""

    U: torch.Tensor  # [K, K], of the weights' type
    order: torch.Tensor  # [K], in which inputs are rounded
    act_order: bool


def factorize(hessian: torch.Tensor, *, act_order: bool, damp: float, dtype: torch.dtype) -> Factor:
    """Overwrites H f64 [K, K]."""
    order = torch.arange(len(hessian))
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian.copy_(hessian[order[:, None], order])
    return Factor(_inverse_factor(hessian, damp).to(dtype), order, act_order)


def solve(
    weight: torch.Tensor,
    factor: Factor,
    grid: Grid,
    group_size: int,
    *,
    static_groups: bool = False,
    drift: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> QuantizedWeight:
    """:func:`gptq` behind the factor."""
    K, U, order = weight.shape[0], factor.U, factor.order
    rounding = TorchRounding(Threads(torch.get_num_threads())) if rounding is None else rounding
    weight = weight[order]
    if drift is not None:
        weight += U.T @ (U @ drift[order].to(weight.dtype))
    back = torch.argsort(order)
    if factor.act_order and static_groups:
        scales, zeros = _fit(rounding, grid, weight[back], group_size)
        g_idx, fit_size = order // group_size, 0
    else:
        scales = weight.new_empty(-(-K // group_size), weight.shape[1])
        zeros = torch.empty_like(scales)
        g_idx, fit_size = torch.arange(K) // group_size, group_size
    codes = _solve(weight, U, grid, g_idx, scales, zeros, fit_size, rounding)
    return _result(codes[back], scales, zeros, g_idx[back])


def _fit(rounding: Rounding, grid: Grid, weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [G, N] of all groups of W [K, N]."""
    whole = len(weight) // group_size * group_size
    found = [rounding.fit(grid, weight[:whole], group_size)] if whole else []
    if whole < len(weight):
        found.append(rounding.fit(grid, weight[whole:], len(weight) - whole))
    scales, zeros = map(torch.cat, zip(*found, strict=True))
    return scales, zeros


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper triangular U with ``U^T U = (H + damp * mean(diag H) * I)^-1``, f64. Overwrites H.

    U comes from the Cholesky factor of H with rows and columns reversed, which avoids inverting H itself. With J the
    reversal, ``J H J = L L^T`` gives ``H = V V^T`` with ``V = J L J`` upper triangular, and ``U = V^-1``. Damping grows
    tenfold until the factor exists. The mean leaves out inputs that were always 0.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):  # then all of it is: |x y| <= (x^2 + y^2) / 2
        raise ExlError("the calibration activations are not finite")
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
    rounding: Rounding,
) -> torch.Tensor:
    """Codes [K, N] in the order of ``weight``, which it overwrites. If ``group_size`` is above 0, each group's grid is
    fitted when its first input is reached, and written to ``scales`` and ``zeros``."""
    codes = torch.empty_like(weight)
    for start, stop in _blocks(len(weight), group_size):
        fit_size = min(group_size, stop - start)  # a block that is one shorter group
        if group_size > BLOCK:  # the grid of a group that begins here; blocks are parts of it
            fit_size, g = 0, start // group_size
            if start % group_size == 0:
                group = weight[start : start + group_size]
                scales[g : g + 1], zeros[g : g + 1] = rounding.fit(grid, group, len(group))
        rows = slice(start, stop)
        factor = U[rows, rows].T.contiguous()
        block = Block(weight[rows], factor, g_idx[rows], scales, zeros, codes[rows], fit_size)
        weight[stop:].addmm_(U[rows, stop:].T, rounding.round(grid, block), alpha=-1)
    return codes


def _blocks(K: int, group_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each block: several whole groups if they fit into a block, else a part of one group.

    So when a group begins, all of its weights have received all updates so far, and its grid can be fitted. A last
    group that is shorter is a block of its own.
    """
    if 0 < group_size <= BLOCK:
        step, whole = BLOCK // group_size * group_size, K // group_size * group_size
        blocks = [(start, min(whole, start + step)) for start in range(0, whole, step)]
        return blocks if whole == K else [*blocks, (whole, K)]
    group_size = group_size or K
    return [
        (start, min(start + BLOCK, first + group_size, K))
        for first in range(0, K, group_size)
        for start in range(first, min(K, first + group_size), BLOCK)
    ]


def _result(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> QuantizedWeight:
    return QuantizedWeight(codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), g_idx.to(torch.int32))
