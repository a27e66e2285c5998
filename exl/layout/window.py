"""Pages of a sequence in a model all of whose layers have a sliding window: from numbers alone."""

from __future__ import annotations

from exl.batch import PAGE_SIZE


def pages_behind(window: int, num_tokens: int) -> int:
    """Leading pages that no row behind the first ``num_tokens`` tokens sees: a row sees itself and the ``window`` - 1
    tokens before it."""
    return max(0, num_tokens + 1 - window) // PAGE_SIZE


def window_pages(window: int, num_rows: int) -> int:
    """Pages that a sequence has at most if it computes ``num_rows`` tokens at once: of these and of the window before
    them, which begin and end anywhere in a page, and of the token after them."""
    return -(-(window - 1 + num_rows) // PAGE_SIZE) + 2


def rows_within(window: int, num_pages: int) -> int:
    """How many rows at once ``num_pages`` pages are enough for, see ``window_pages``; may be negative."""
    return (num_pages - 2) * PAGE_SIZE - (window - 1)
