"""After a failure: whether the GPU is still usable, and how to report the error. Imports neither torch nor exl."""

from __future__ import annotations

import sys


def device_error() -> str | None:
    """The error that every further call in this process would raise: a faulting kernel destroys the CUDA context.

    It queries twice, because an error of a single call is reported once and then cleared.
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
    """Type and text of an error and of its causes: a failed capture has its cause in ``__context__``."""
    parts, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(parts) < 4:
        seen.add(id(current))
        lines = [line.strip() for line in str(current).splitlines() if line.strip()]
        parts.append(f"{type(current).__name__}: {lines[0] if lines else ''}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return " <- ".join(parts)[:most]
