"""Linears on a GPU: how their input becomes what the kernels read, and which kernel runs how many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from exl.kernels.blob import view_linear
from exl.kernels.launch import Backend
from exl.kernels.linear import LinearScratch, multiply
from exl.kernels.linear_dense import DenseWeight, multiply_dense
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.linear_many import PanelScratch, multiply_f32, multiply_many
from exl.kernels.norms import RowNorm, row_norm
from exl.kernels.rms_norm import rms_norm
from exl.kernels.weights import TiledWeight
from exl.layout.arena import crossover
from exl.layout.linear_config import MIN_ARCH
from exl.ops.base import ALL_ROWS, Linear, Norm, Segments


@dataclass(frozen=True)
class Residual:
    """Rows of the residual stream as a linear reads them: through a norm, or as they are."""

    h: torch.Tensor  # f32 [T, C]
    sumsq: torch.Tensor  # f32 [T, ceil(C / 16)]: sums of squares of 16 channels each
    norm: Norm | None


@dataclass(frozen=True)
class LinearBuffers:
    """What linears share, one launch at a time: views of the arena."""

    few: LinearScratch
    many: PanelScratch | None  # None: no chunk is long enough for panels
    normed: torch.Tensor  # f16 [rows of a chunk * largest K]


class Linears:
    """Launches linears. ``may_overlap`` says whether the next launch may start before its predecessor has ended."""

    def __init__(self, arch: int, buffers: LinearBuffers, may_overlap: Callable[[], bool]) -> None:
        self._arch, self._buffers, self._may_overlap = arch, buffers, may_overlap
        self._crossover = crossover(arch)
        self._weights: dict[int, tuple[Linear, TiledWeight | DenseWeight]] = {}

    @property
    def invariant_rows(self) -> int:
        """From here on quantized linears leave their products to cuBLAS, whose bits depend on the number of rows."""
        return ALL_ROWS if self._buffers.many is None else self._crossover

    def weight(self, linear: Linear) -> TiledWeight | DenseWeight:
        found = self._weights.get(id(linear))
        if found is None or found[0] is not linear:
            found = self._weights[id(linear)] = (linear, view_linear(linear.layout, linear.fields))
        return found[1]

    def store(
        self, backend: Backend, x: torch.Tensor | Residual, w: Segments, out: torch.Tensor, num_decode_rows: int
    ) -> None:
        """out [T, N] = x W, segment beside segment."""
        start = 0
        for linear in w:
            self.run(backend, x, linear, Output.store(out[:, start : start + linear.N]), num_decode_rows)
            start += linear.N

    def run(
        self, backend: Backend, x: torch.Tensor | Residual, linear: Linear, out: Output, num_decode_rows: int
    ) -> None:
        """x W into ``out``. The first ``num_decode_rows`` rows are computed row by row, however many there are.

        A residual under act-order is normalised into the weight's order first; other inputs come in it already."""
        normed = None
        if isinstance(x, Residual):
            x, normed = self._prepared(backend, x, linear.fields.get("channel_map"))
        weight = self.weight(linear)
        if isinstance(weight, DenseWeight):
            self._dense(backend, x, normed, weight, out)
            return
        num_rows, n = x.shape[0], max(0, num_decode_rows)
        if self._buffers.many is None or num_rows - n < self._crossover:
            n = num_rows
        if n:
            part = None if normed is None else normed.rows(0, n)
            multiply(
                *(backend, weight, x[:n], out.rows(0, n)),
                norm=part,
                scratch=self._buffers.few,
                dependent=self._may_overlap(),
            )
        if n < num_rows:
            part = None if normed is None else normed.rows(n, num_rows)
            multiply_many(backend, weight, x[n:], out.rows(n, num_rows), self._buffers.many, part)

    def _prepared(
        self, backend: Backend, rows: Residual, channel_map: torch.Tensor | None
    ) -> tuple[torch.Tensor, NormedInput | None]:
        """What the kernels read: RMSNorm is done on the way. Other norms, none, and another order of the channels take
        a launch of their own, which rounds to f16 as the way would."""
        h, norm = rows.h, rows.norm
        is_rms = norm is not None and norm.kind == "rms"
        normed = NormedInput(rows.sumsq, norm.weight, norm.eps) if is_rms else None
        if is_rms and channel_map is None:
            return h, normed
        x = self._buffers.normed[: h.numel()].view(h.shape)
        if is_rms:
            rms_norm(backend, h, normed, x, channel_map=channel_map, dependent=self._may_overlap())
        else:
            other = None if norm is None else RowNorm(norm.weight, norm.eps, norm.kind)
            row_norm(backend, h, other, x, channel_map=channel_map, dependent=self._may_overlap())
        return x, None

    def _dense(
        self, backend: Backend, x: torch.Tensor, norm: NormedInput | None, weight: DenseWeight, out: Output
    ) -> None:
        width = weight.weight.shape[1]
        if x.shape[1] != width:  # the buffer's rows are padded with zeros
            x = torch.as_strided(x, (x.shape[0], width), x.stride())
        if self._arch < MIN_ARCH:
            self._dense_by_cublas(backend, x, norm, weight, out)
            return
        multiply_dense(backend, weight, x, out, norm=norm, dependent=self._may_overlap())

    def _dense_by_cublas(
        self, backend: Backend, x: torch.Tensor, norm: NormedInput | None, weight: DenseWeight, out: Output
    ) -> None:
        """The head, on GPUs without tensor cores. One row at a time: no row's bits depend on the others."""
        if norm is not None:
            normed = self._buffers.normed[: x.numel()].view(x.shape)
            rms_norm(backend, x, norm, normed)
            x = normed
        for i in range(x.shape[0]):
            multiply_f32(x[i : i + 1], weight.weight, out.y[i : i + 1])
        if weight.bias is not None:
            out.y.add_(weight.bias[: out.y.shape[1]])
