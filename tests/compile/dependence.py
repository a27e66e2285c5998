"""Which memory a kernel of a dependent chain accesses before its wait, read from its PTX and from its machine code.

Under a dependent launch a kernel starts while its predecessors still run. Before ``griddepcontrol.wait`` it may read
only the model's constants, which no launch writes, and must not write. Memory that a launch writes may never be read
through the read-only path (``ld.global.nc``, ``LDG.CONSTANT``): the compiler may move such reads above the wait.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from exl.kernels.spec import KernelSpec, flattened, nvrtc_options

from .nvrtc import Nvrtc
from .ptx_flow import read_ptx
from .sass import disassemble
from .sass_flow import read_sass

# Parameters that point to parts of the model; `channel_map` is a permutation of channels. Everything else is written by
# launches, or by copies between them.
WEIGHTS = ("codes", "qparams", "w", "bias", "table")
CONSTANTS = frozenset((*WEIGHTS, "norm", "weight", "second_weight", "q_norm", "k_norm", "sinks", "channel_map"))
SIGNATURE = re.compile(r"EXL_KERNEL\((\w+),[^)]*\)\s*\(([^)]*)\)")
PARAM_CBANK = b"\x04\x0a\x08\x00"  # in .nv.info: then a symbol, and the parameters' offset in bank 0 and size


@dataclass(frozen=True)
class Access:
    """One access to global memory, or a possible end of the kernel (``kind`` "exit")."""

    text: str
    kind: str  # "read", "read-only read", "write", "exit"
    origins: frozenset[str]  # parameters that the address may come from; empty: unknown
    early: bool  # some path reaches it without a wait


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int  # in bytes from the first parameter
    is_pointer: bool


def waits(spec: KernelSpec, sources=None) -> bool:
    """Whether the body of ``spec``'s kernel calls ``griddepcontrol_wait``."""
    body = flattened(spec, sources).split(f"EXL_KERNEL({spec.entry},")[1].split("\nEXL_KERNEL(")[0]
    return "griddepcontrol_wait()" in body


def parameters(text: str, entry: str) -> tuple[Parameter, ...]:
    """Parameters, from a kernel's flat source: pointers and 64-bit integers have 8 bytes, all others 4."""
    found = {match[1]: match[2] for match in SIGNATURE.finditer(text)}
    result, offset = [], 0
    for part in found[entry].split(","):
        size = 8 if "*" in part or "i64" in part or "u64" in part else 4
        offset = -(-offset // size) * size
        result.append(Parameter(re.findall(r"\w+", part)[-1], offset, "*" in part))
        offset += size
    return tuple(result)


def parameter_bank_offset(cubin: bytes, num_bytes: int) -> int:
    """Offset of the parameters in constant bank 0, from the cubin itself."""
    for at in (match.start() for match in re.finditer(re.escape(PARAM_CBANK), cubin)):
        _, offset, size = struct.unpack_from("<IHH", cubin, at + 4)
        if size == num_bytes:
            return offset
    raise ValueError(f"no constant bank of {num_bytes} bytes of parameters in the cubin")


def faults(accesses: Iterable[Access]) -> list[str]:
    """One message per access that a dependent launch must not make."""
    found = []
    for access in accesses:
        mutable = ", ".join(sorted(access.origins - CONSTANTS)) or ("" if access.origins else "an unknown address")
        if access.kind == "exit":
            if access.early:
                found.append(f"ends without a wait: {access.text}")
        elif access.kind == "write":
            if access.early:
                found.append(f"writes {mutable} before the wait: {access.text}")
        elif mutable and access.early:
            found.append(f"reads {mutable} before the wait: {access.text}")
        elif mutable and access.kind == "read-only read":
            found.append(f"reads {mutable} as constant: {access.text}")
    return found


def find_faults(spec: KernelSpec, compiler: Nvrtc, sources=None) -> list[str]:
    """``faults`` of one variant, in its PTX and in its machine code."""
    text = flattened(spec, sources)
    cubin, ptx = compiler.compile_both(text, spec.source, nvrtc_options(spec))
    declared = parameters(text, spec.entry)
    last = declared[-1]
    num_bytes = last.offset + (8 if last.is_pointer else 4)
    by_number = {number: p.name for number, p in enumerate(declared) if p.is_pointer}
    base = parameter_bank_offset(cubin, num_bytes)
    by_offset = {base + p.offset: p.name for p in declared if p.is_pointer}
    from_ptx = [Access(*access) for access in read_ptx(ptx, spec.entry, by_number)]
    from_sass = [Access(*access) for access in read_sass(disassemble(cubin), spec.entry, by_offset)]
    for level, accesses in (("PTX", from_ptx), ("machine code", from_sass)):
        if not any(access.kind.startswith("read") for access in accesses):
            raise ValueError(f"{spec}: no read of global memory found in its {level}")
    return [f"PTX: {fault}" for fault in faults(from_ptx)] + [f"SASS: {fault}" for fault in faults(from_sass)]
