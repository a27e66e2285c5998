"""The natural logarithm, with the same bits on every machine: mathematical libraries differ in the last one."""

from __future__ import annotations

import functools
from decimal import Context, Decimal

_CONTEXT = Context(prec=25)


@functools.lru_cache(maxsize=256)
def natural_log(x: float) -> float:
    """ln x, correctly rounded (but for one x in 10^8, perhaps); -inf for 0. Raises ``decimal.InvalidOperation`` for
    negative x. Takes some 40 us."""
    return float(_CONTEXT.ln(Decimal(x)))
