"""What a run computes with: exl's own kernels where they can run, else torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exl.layout.steps import StepLimits
from exl.ops.cpu_target import cpu_target
from exl.quantize.products import CompiledProducts, Products, TorchProducts
from exl.quantize.rounding import CompiledRounding, Rounding, TorchRounding
from exl.quantize.span_ops import Span, TorchSpan
from exl.threads import Threads

if TYPE_CHECKING:
    from exl.cpu_kernels.pool import Pool


@dataclass(frozen=True)
class Compute:
    rounding: Rounding
    products: Products
    threads: Threads  # torch's
    pool: Pool | None = None  # of the kernels; None: torch computes

    @classmethod
    def with_torch(cls, threads: Threads) -> Compute:
        return cls(TorchRounding(threads), TorchProducts(), threads)

    @classmethod
    def with_kernels(cls, pool: Pool, threads: Threads) -> Compute:
        return cls(CompiledRounding(pool), CompiledProducts(pool), threads, pool)

    @property
    def compiled(self) -> bool:
        return self.pool is not None

    def span_ops(self, limits: StepLimits, num_kv_heads: int) -> Span:
        """What runs calibration text through parts of a layer."""
        if self.pool is None:
            return TorchSpan(limits, num_kv_heads, self.threads)
        from exl.quantize.compiled_span import CompiledSpan

        return CompiledSpan(limits, num_kv_heads, self.pool)

    def mixed(self, kind: str, units: float) -> AbstractContextManager[None]:
        """Around kernels and operations of torch that take turns, of which torch's are the smaller part. Its threads go
        on spinning for a while beside the pool's, so that more of them may be slower; how many it uses is measured."""
        return nullcontext() if self.pool is None else self.threads.measured(kind, units)


@contextmanager
def open_compute(threads: Threads) -> Iterator[Compute]:
    """Kernels on ``threads.limit`` threads; where they cannot run, torch, as for models (``cpu_target``)."""
    if not cpu_target().compiled:
        yield Compute.with_torch(threads)
        return
    from exl.cpu_kernels.library import shared_library
    from exl.cpu_kernels.pool import Pool

    pool = Pool(shared_library(), threads.limit)
    try:
        yield Compute.with_kernels(pool, threads)
    finally:
        pool.close()
