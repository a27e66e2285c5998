"""Texts that go on beyond the context: what is dropped when, as a function of positions alone.

When a text has filled the context, about half of what lies behind its first pages is dropped, in whole pages, and
generation goes on; so again and again. Positions go on growing, and what stays at the end is not touched: scores depend
on differences of positions alone. Only the first pages, whose tokens attention leans on (StreamingLLM, arXiv
2309.17453), come to lie directly before the rest: their keys are turned by as many positions as were dropped, each time
from the pages as they were written, so that roundings do not add up. Their values, and what the rest's own keys and
values know of dropped tokens, stay: that is not what computing the shorter text anew would give.
"""

from __future__ import annotations

from dataclasses import dataclass

from exl.batch import PAGE_SIZE
from exl.errors import ConfigError

MAX_POSITIONS = 1 << 20  # beyond them an f32 angle is off by more than 1/16


@dataclass(frozen=True)
class Shift:
    """Of one request."""

    num_kept: int  # pages of the text's beginning, which stay; as many hold their turned copies
    num_pages: int  # that a row sees at most
    num_dropped: int  # pages at a time

    @classmethod
    def of(cls, keep: int, context: int) -> Shift:
        """``keep`` tokens, rounded up to whole pages. Raises ``ConfigError`` for more than a context has room for."""
        kept, pages = -(-keep // PAGE_SIZE), context // PAGE_SIZE
        if pages < 2 * kept + 2:  # twice what stays, a page to drop and one that goes on
            most = (pages - 2) // 2 * PAGE_SIZE
            if most < 0:
                raise ConfigError(
                    f"overflow: found 'shift' with a context of {context}, expected {2 * PAGE_SIZE} or more"
                )
            raise ConfigError(f"shift_keep: found {keep}, expected at most {most} for a context of {context}")
        seen = pages - kept
        return cls(kept, seen, max(1, (seen - kept) // 2))

    @property
    def num_tokens(self) -> int:
        """That a row sees at most."""
        return self.num_pages * PAGE_SIZE

    @property
    def step(self) -> int:
        """Tokens that are dropped at a time."""
        return self.num_dropped * PAGE_SIZE
