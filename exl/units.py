"""Sizes in bytes as people write them: a number of bytes, "6GB" (10^9) or "6GiB" (2^30)."""

from __future__ import annotations

import re

from exl.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)


def parse_bytes(size: int | str, name: str = "size") -> int:
    """``parse_bytes("1.5GB") == 1_500_000_000``. Raises ``ConfigError`` that names the option if it is not a size."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise ConfigError(f"{name}: found {size!r}, expected a size such as '6GB', '512MiB' or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(num_bytes: int) -> str:
    """``format_bytes(1_234_000_000) == "1.23 GB"``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(num_bytes) >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.2f} {unit}"
    return f"{num_bytes} B"


def short_bytes(num_bytes: int) -> str:
    """As ``format_bytes``, without zeros at the end: ``short_bytes(6_000_000_000) == "6 GB"``."""
    number, unit = format_bytes(num_bytes).split()
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"
