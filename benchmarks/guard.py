"""What is left of a GPU, and of a report, after something has failed. Imports neither torch nor exl."""

from __future__ import annotations

import sys


def device_error() -> str | None:
    """The error that every further call in this process would meet: a kernel that faulted takes its context along.

    Asked twice: an error that belongs to one call is told once and then forgotten.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    text = None
    for _ in range(2):
        try:
            torch.cuda.synchronize()
            return None
        except RuntimeError as error:
            text = one_line(error)
    return text


def one_line(error: BaseException, most: int = 300) -> str:
    """Type and text, with the errors behind it: what a failed capture was caused by is found in its context."""
    parts, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(parts) < 4:
        seen.add(id(current))
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        parts.append(f"{type(current).__name__}: {lines[0] if lines else ''}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return " <- ".join(parts)[:most]
