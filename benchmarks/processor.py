"""The processor's name, and which of the instructions that kernels are written for it has. Linux only."""

from __future__ import annotations

import platform
from pathlib import Path

# By the system's name of a flag, those that decide which kernels run, in exl and in llama.cpp.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
}
CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    return _field("model name") or platform.processor()


def instruction_sets() -> str:
    """``AVX2, AVX512, AVX512-VNNI``"""
    flags = _field("flags").split()
    return ", ".join(name for flag, name in INSTRUCTIONS.items() if flag in flags) or "no AVX2"


def _field(name: str) -> str:
    """Of the first processor."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")
