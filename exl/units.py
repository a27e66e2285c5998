"""Sizes as people write them: a number of bytes, "6GB" (10^9) or "6GiB" (2^30)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from exl.errors import ConfigError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?B?)\s*", re.IGNORECASE)
# What begins like a size: "24 gigabytes", "1,5 GB".
_NEARLY = re.compile(r"\s*([0-9]+)(?:[.,]([0-9]+))?\s*([KMGT])", re.IGNORECASE)
_MAX_DIGITS = 30
_MAX_BYTES = 10**18
_SMALLEST_BUDGET = 1000


def parse_bytes(size: int | str, name: str = "size") -> int:
    """``parse_bytes("1.5GB") == 1_500_000_000``; "1.5G" is the same. Exact; part of a byte is cut off.

    Raises ``ConfigError`` that names the option if it is not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) <= _MAX_DIGITS else None
    if match is not None and match[2].upper() in _UNITS:
        num_bytes = int(Fraction(match[1]) * _UNITS[match[2].upper()])
        if 0 < num_bytes < _MAX_BYTES:
            return num_bytes
    nearly = _NEARLY.match(size) if match is None and isinstance(size, str) and len(size) <= _MAX_DIGITS else None
    meant = nearly and f"{nearly[1]}{'.' + nearly[2] if nearly[2] else ''}{nearly[3].upper()}B"
    raise ConfigError(
        f"{name}: found {size!r}, expected a size such as '6GB', '512MiB' or a number of bytes"
        + (f"; did you mean '{meant}'?" if meant else "")
    )


def one_each(given: int | str | Sequence[int | str]) -> tuple[int | str, ...]:
    """What was given for each of several GPUs; a single value is one of one: ``one_each("6GB") == ("6GB",)``."""
    return (given,) if isinstance(given, str) or not isinstance(given, Sequence) else tuple(given)


def parse_budget(size: int | str, name: str) -> int:
    """Like ``parse_bytes``, for memory that a model gets: whoever writes "24" means gigabytes."""
    num_bytes = parse_bytes(size, name)
    if num_bytes >= _SMALLEST_BUDGET:
        return num_bytes
    number = re.match(r"[0-9.]+", str(size).strip())
    raise ConfigError(f"{name}: found {size!r}, which is {num_bytes} bytes; did you mean '{number[0]}GB'?")


def format_bytes(num_bytes: int, digits: int = 2) -> str:
    """``format_bytes(1_234_000_000) == "1.23 GB"``."""
    if abs(num_bytes) < 1000:
        return f"{num_bytes} B"
    # 999,999 bytes are 1.00 MB, not 1000.00 KB.
    smaller = {"TB": "GB", "GB": "MB", "MB": "KB"}
    unit = next((unit for unit in smaller if round(abs(num_bytes) / _UNITS[smaller[unit]], digits) >= 1000), "KB")
    return f"{num_bytes / _UNITS[unit]:.{digits}f} {unit}"


def format_apart(*sizes: int) -> list[str]:
    """Several sizes as ``format_bytes`` gives them, with as many digits as it takes to tell unequal ones apart.

    ``format_apart(1_234_000_000, 1_234_400_000) == ["1.2340 GB", "1.2344 GB"]``. A message that says what is needed and
    what there is must not show the same figure twice.
    """
    for digits in range(2, 13):
        shown = [format_bytes(size, digits) for size in sizes]
        if len(set(shown)) == len(set(sizes)):
            break
    return shown


def short_bytes(num_bytes: int) -> str:
    """As ``format_bytes``, without zeros at the end: ``short_bytes(6_000_000_000) == "6 GB"``."""
    number, unit = format_bytes(num_bytes).split()
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"
