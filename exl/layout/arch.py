"""What one block may use on each GPU architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from exl.errors import KernelError


@dataclass(frozen=True)
class ArchLimits:
    """What one block may use. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    max_shared_bytes: int  # dynamic and static, after opting in
    max_threads_per_block: int = 1024
    max_block: tuple[int, int, int] = (1024, 1024, 64)
    max_grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535)
    max_registers_per_thread: int = 255


DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel that wants more must say so by a function attribute
ARCH_LIMITS: Mapping[int, ArchLimits] = MappingProxyType(
    {
        **dict.fromkeys((60, 61, 62), ArchLimits(48 * 1024)),
        **dict.fromkeys((70, 72), ArchLimits(96 * 1024)),
        75: ArchLimits(64 * 1024),
        **dict.fromkeys((80, 87), ArchLimits(163 * 1024)),
        **dict.fromkeys((86, 89, 120, 121), ArchLimits(99 * 1024)),
        **dict.fromkeys((90, 100, 103, 110), ArchLimits(227 * 1024)),
    }
)


def arch_limits(arch: int) -> ArchLimits:
    """Limits of a compute capability; one that is not known yet gets the least that its generation offers."""
    if arch in ARCH_LIMITS:
        return ARCH_LIMITS[arch]
    if arch < 60:
        raise KernelError(f"compute capability {arch / 10} is not supported: expected 6.0 or higher")
    older = [known for known in ARCH_LIMITS if known < arch]
    return min(
        (ARCH_LIMITS[known] for known in older if known // 10 == max(older) // 10), key=lambda x: x.max_shared_bytes
    )
