"""``Span`` over exl's own kernels, in f32. Cannot be imported without llvmlite."""

from __future__ import annotations

import torch

from exl.cpu_kernels.pool import Pool
from exl.layout.cpu_steps import CompiledSizes, scratch_sizes
from exl.layout.fields import FIELD_ALIGN, align_up
from exl.layout.kv import DeviceKVLayout
from exl.layout.steps import StepLimits
from exl.ops.base import Norm
from exl.ops.compiled_ops import CompiledOps
from exl.ops.cpu_target import COMPILED
from exl.quantize.span_ops import Span


class CompiledSpan(Span, CompiledOps):
    def __init__(self, limits: StepLimits, num_kv_heads: int, pool: Pool) -> None:
        layout = DeviceKVLayout("f32", 1, num_kv_heads, limits.head_dim)
        scratch = scratch_sizes((), limits, "f32")
        if limits.experts is not None:  # of mixtures only the routers run
            scratch["router"] = align_up(limits.max_rows * limits.experts.count * 4, FIELD_ALIGN)
        sizes = CompiledSizes(scratch)  # no step is recorded
        super().__init__(pool, COMPILED, layout, limits, sizes, "f32")

    def _inputs(self, h: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        with self._stages() as tape:
            rows = self._normed(tape, tape.memory.read(h), norm, ())
        self.fence()
        return h if norm is None else torch.from_numpy(rows.array())
