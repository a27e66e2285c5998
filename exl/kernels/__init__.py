"""CUDA kernels: sources in ``cuda/``, one wrapper module here for each.

A wrapper module checks its arguments, picks a configuration by a pure function and launches; it also exposes
``variants(arch) -> Iterable[Variant]``: every macro set that it may ask for on that architecture (empty where it has
none). Name the module in ``KERNEL_MODULES``, and CI compiles all of them and holds them to the budget.
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
    "silu_mul",
    "append_kv",
    "attention_decode",
    "attention_prefill",
    "sample",
)
ARCHS = (61, 70, 75, 80, 86, 89, 90, 100, 120)  # that CI compiles for


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel with every supported macro set for ``arch``, in a stable order."""
    for name in KERNEL_MODULES:
        yield from importlib.import_module(f"exl.kernels.{name}").variants(arch)
