"""Compiled kernels in memory: compiled the first time, read from the cache later."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numpy.typing import NDArray

from exl.cpu_kernels.kernel import KernelSpec, build_module
from exl.cpu_kernels.object_cache import cached_object, object_name
from exl.cpu_kernels.pool_kernels import Invoke
from exl.cpu_kernels.processor import refuses_made_code, target_machine, usable_isas
from exl.errors import KernelError

logger = logging.getLogger(__name__)

_INVOKE = Invoke()
_F32, _U32 = struct.Struct("<f"), struct.Struct("<I")
_TOLD_SECONDS = 0.5  # a compilation that takes longer is announced by a line when it ends


def compile_object(module: ir.Module, isa: str) -> bytes:
    """Machine code of a module. Its position does not matter."""
    machine = target_machine(isa)
    module.triple = machine.triple
    # Otherwise LLVM turns loops that clear memory into calls of a library that not every system's loader finds.
    text = re.sub(r"^(define .*\))$", r'\1 "no-builtins"', str(module), flags=re.MULTILINE)
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_object(parsed)


class Library:
    """Kernels of one instruction set. May be used by many threads; each kernel is compiled once."""

    def __init__(self, isa: str | None = None, folder: Path | None = None) -> None:
        """``isa``: one of ``usable_isas`` (default: the best). ``folder``: of the cache; None: the user's. Raises
        ``KernelError`` if this processor has none, or if the system forbids code that is made at run time."""
        usable = usable_isas()
        if not usable:
            raise KernelError("this processor: expected x86-64 with AVX2, FMA and F16C")
        self.isa = usable[0] if isa is None else isa
        if self.isa not in usable:
            raise KernelError(f"isa: found {isa!r}, this processor has {', '.join(usable)}")
        refusal = refuses_made_code()
        if refusal is not None:
            raise KernelError(refusal)
        self._folder, self._lock = folder, threading.RLock()
        self._addresses: dict[KernelSpec, int] = {}
        self._engines: list[llvm.ExecutionEngine] = []
        self.load((_INVOKE,))
        signature = ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 4)  # gives Python's lock away during the call
        self._invoke = signature(self.address(_INVOKE))

    def load(self, specs: Iterable[KernelSpec]) -> None:
        """Makes kernels ready, those that are not yet there in one go."""
        with self._lock:
            missing = sorted({spec for spec in specs if spec not in self._addresses}, key=lambda spec: spec.name)
            if not missing:
                return
            data = cached_object(object_name(missing, self.isa), lambda: self._compile(missing), self._folder)
            engine = self._engine(data)
            self._engines.append(engine)  # whose code goes with it
            for spec in missing:
                address = engine.get_function_address(spec.name)
                if not address:
                    raise KernelError(f"{spec.name}: not in its own object file")
                self._addresses[spec] = address

    def _compile(self, specs: list[KernelSpec]) -> bytes:
        began = time.perf_counter()
        data = compile_object(build_module(specs, self.isa), self.isa)
        seconds = time.perf_counter() - began
        if seconds > _TOLD_SECONDS:
            logger.warning("compiled kernels for this processor in %.1f s", seconds)
        return data

    def _engine(self, data: bytes) -> llvm.ExecutionEngine:
        try:
            engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(self.isa))
            engine.add_object_file(llvm.ObjectFileRef.from_data(data))
            engine.finalize_object()
        except (RuntimeError, OSError) as error:
            raise KernelError(f"compiled kernels cannot be loaded: {error}") from error
        return engine

    def address(self, spec: KernelSpec) -> int:
        """Of the kernel's code, compiled now if need be."""
        address = self._addresses.get(spec)
        if address is None:
            self.load((spec,))
            address = self._addresses[spec]
        return address

    def call(self, spec: KernelSpec, args: NDArray[np.int64], num_chunks: int = 1, first: int = 0) -> None:
        """Chunks ``first`` to ``first + num_chunks - 1``, on the calling thread. ``args``: the slots."""
        self._invoke(self.address(spec), args.ctypes.data, first, first + num_chunks)

    def invoke(self, address: int, args: int, num_chunks: int) -> None:
        """The same, of a kernel whose code is at ``address``, with slots at ``args``: for who measures stages."""
        self._invoke(address, args, 0, num_chunks)

    def name_of(self, address: int) -> str:
        """Of the kernel whose code is at ``address``."""
        return next((spec.name for spec, found in self._addresses.items() if found == address), hex(address))


@functools.cache
def shared_library() -> Library:
    """The one that models share: the best instruction set, the user's cache. Raises as ``Library`` does, each time."""
    return Library()


def slots(*values: NDArray | int | float | None) -> NDArray[np.int64]:
    """A kernel's slots: arrays by address, None as 0, floats as f32 in the low half. The caller keeps arrays alive."""
    return np.array([_slot(value) for value in values], np.int64)


def _slot(value: NDArray | int | float | None) -> int:
    if type(value) is int:
        return value
    if value is None:
        return 0
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    if isinstance(value, float):
        return _U32.unpack(_F32.pack(value))[0]
    return int(value)
