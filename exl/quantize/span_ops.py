"""The decoder's operations from one linear of a layer to another: torch's here, the kernels' in ``compiled_span.py``.

The decoder calls the operations of a whole layer. Those before the span's first linear do nothing, and where the span
ends its last linear's inputs leave by an exception.
"""

from __future__ import annotations

import torch

from exl.cache.kv import KVCache
from exl.layout.kv import KVLayout
from exl.layout.steps import StepLimits
from exl.ops.base import PLAIN_BRANCH, AttentionSpec, Branch, GatedMlp, Linear, Loras, Norm, RouteSpec, Segments
from exl.ops.cpu_target import torch_target
from exl.ops.torch_ops import TorchOps
from exl.threads import Threads


class Stopped(Exception):
    """Skips the rest of a layer; ``x`` are the inputs of the linear where it stopped, valid until the next call."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Span:
    """A mixin over ``Ops``: leaves out operations before the one with the linear ``start``, stops at ``stop``."""

    start: Segments | None = None
    stop: Segments | None = None

    def _skips(self, w: Segments) -> bool:
        if self.start is not None and w is not self.start:
            return True
        self.start = None
        return False

    def _inputs(self, h: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """A linear's inputs, computed."""
        raise NotImplementedError

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        if self._skips(w):
            return
        if w is self.stop:
            raise Stopped(self._inputs(h, norm))
        super().project(h, norm, w, out, loras)

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        if self.start is None:
            super().attend(qkv, spec, layer_idx, kv, out, consumer)

    def gated_mlp(
        self,
        h: torch.Tensor,
        norm: Norm | None,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        consumer: Segments = (),
        loras: Loras = (),
    ) -> None:
        if self._skips(w):
            return
        if w is self.stop:
            raise Stopped(self._inputs(h, norm))
        super().gated_mlp(h, norm, w, spec, out, consumer, loras)

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        if self._skips(w):
            return
        if w is self.stop:
            raise Stopped(self._inputs(x, None))
        super().add_projection(x, w, h, branch, loras)

    def route(
        self,
        h: torch.Tensor,
        norm: Norm,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """A span ends before the router, or, if it begins with it, behind it: experts are not run by the decoder."""
        if self.start is not None:
            super().route(h, norm, router, bias, spec, x, ids, weights)
        self.fence()
        raise Stopped(x)


class TorchSpan(Span, TorchOps):
    def __init__(self, limits: StepLimits, num_kv_heads: int, threads: Threads) -> None:
        super().__init__(torch_target(), KVLayout("f32", 1, num_kv_heads, limits.head_dim), limits, threads)

    def _inputs(self, h: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return self._input(h, norm)
