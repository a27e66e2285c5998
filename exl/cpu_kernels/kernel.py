"""What a kernel is: a value that names it and says how it is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from llvmlite import ir

from exl.cpu_kernels.ir import I64, PTR, Kernel


class KernelSpec:
    """Base of frozen dataclasses. All that the code depends on is in its fields; sizes that differ from call to call
    are slots.

    The class says what the slots are and what a chunk is. Kernels are pure: no kernel reads what it writes (where one
    must, its docstring says so), and each element of a result is computed in one fixed order, whichever chunk, tile or
    thread computes it. So a chunk may be run twice, and a row has the same bits in any company.
    """

    types: ClassVar[tuple[ir.Type, ...]] = (PTR, I64)  # of the function's parameters

    @property
    def name(self) -> str:
        """Different for different fields; letters, digits and underscores."""
        raise NotImplementedError

    def emit(self, k: Kernel) -> None:
        """Writes the body; ``k.finish()`` is the caller's."""
        raise NotImplementedError


def build_module(specs: Iterable[KernelSpec], isa: str) -> ir.Module:
    module = ir.Module(isa)
    for spec in specs:
        kernel = Kernel(module, spec.name, isa, spec.types)
        spec.emit(kernel)
        kernel.finish()
    return module
