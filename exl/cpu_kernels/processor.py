"""Which instructions kernels may use here."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import sys

from llvmlite import binding as llvm

# By the name of an instruction set: the processor's features that it needs, and what LLVM is told.
ISAS = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx2", "fma", "f16c", "bmi2", "bmi"),
    "avxvnni": ("avxvnni", "avx2", "fma", "f16c", "bmi2", "bmi"),
    "avx2": ("avx2", "fma", "f16c", "bmi2", "bmi"),
    "neon": ("neon", "dotprod", "fullfp16"),  # compiled in tests, never run: no such machine was at hand
}
_X86 = ("x86_64", "AMD64", "amd64")


@functools.cache
def usable_isas() -> tuple[str, ...]:
    """Best first; empty: a processor that kernels were not written for."""
    if platform.machine() not in _X86:
        return ()
    found = {name for name, there in llvm.get_host_cpu_features().items() if there}
    return tuple(isa for isa, features in ISAS.items() if isa != "neon" and found.issuperset(features))


def refuses_made_code() -> str | None:
    """Why this system does not run code that the process itself has written, as under SELinux without execmem; None: it
    does. LLVM would end the process where it finds out."""
    if sys.platform == "win32" or not hasattr(mmap, "MAP_PRIVATE"):
        return None
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = ctypes.c_char.from_buffer(page)
    held.value = b"\xc3"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    failed = libc.mprotect(ctypes.addressof(held), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
    return f"the system forbids code that is made at run time ({os.strerror(ctypes.get_errno())})" if failed else None


def target_machine(isa: str) -> llvm.TargetMachine:
    features = ",".join(f"+{feature}" for feature in ISAS[isa])
    if isa == "neon":
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple("arm64-apple-darwin")
        return target.create_target_machine(cpu="apple-m1", features=features, opt=3, reloc="pic")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu = "icelake-server" if isa == "avx512vnni" else "x86-64"
    if isa == "avx512vnni":
        features += ",-prefer-256-bit"
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small")
