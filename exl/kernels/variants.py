"""Every kernel with every macro set that exl may ask for: what is compiled ahead, and what tests hold to a budget.

A wrapper module exposes ``variants(arch) -> Iterable[Variant]``: the macro sets that it may ask for on that
architecture (empty if it has none). Name the module in ``KERNEL_MODULES``, and CI compiles all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from exl.kernels.spec import Variant

KERNEL_MODULES: tuple[str, ...] = (
    "linear",
    "linear_dense",
    "linear_many",
    "dequantize",
    "embed",
    "rms_norm",
    "norms",
    "gated_product",
    "append_kv",
    "attention_decode",
    "attention_prefill",
    "scale_logits",
    "sample",
)
ARCHS = (61, 70, 75, 80, 86, 89, 90, 100, 120)  # that CI compiles for


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel with every supported macro set for ``arch``, in a stable order."""
    for name in KERNEL_MODULES:
        yield from importlib.import_module(f"exl.kernels.{name}").variants(arch)
