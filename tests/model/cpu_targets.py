"""The two ways to compute on a CPU, exl's own kernels and torch's, for tests of what holds for both."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from exl.ops.cpu_target import COMPILED, torch_target, why_not_compiled
from exl.quantize.compute import Compute, open_compute

needs_kernels = pytest.mark.skipif(why_not_compiled() is not None, reason="exl's own kernels cannot run here")
TARGETS = [pytest.param(COMPILED, id="kernels", marks=needs_kernels), pytest.param(torch_target(), id="torch")]
# What opens the quantizer's ``Compute``, for each.
COMPUTES = [
    pytest.param(open_compute, id="kernels", marks=needs_kernels),
    pytest.param(lambda threads: nullcontext(Compute.with_torch(threads)), id="torch"),
]
with_both = pytest.mark.parametrize("cpu", TARGETS)

# Options of ``exl.load`` for the arithmetic that is nearest to f32's on a CPU.
EXACT = {"device": "cpu", **({"arithmetic": "f32"} if why_not_compiled() is None else {})}
