"""Pages of a sequence in layers that have a sliding window, and which layers of a model those are: from numbers
alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exl.batch import MAX_STEP_TOKENS, PAGE_SIZE


@dataclass(frozen=True)
class WindowGroup:
    """The layers of a model that have a window, where others have none, and their pages."""

    window: int  # the widest of them
    layers: frozenset[int]
    num_pages: int  # the null page is one of them


def mixed_layers(windows: Sequence[int | None], max_context: int) -> frozenset[int]:
    """The layers whose windows are shorter than a text may get; empty if those are all layers or none."""
    found = frozenset(i for i, window in enumerate(windows) if window is not None and window < max_context)
    return frozenset() if len(found) == len(windows) else found


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


def num_group_pages(window: int, num_sequences: int, chunk_rows: int, rows_at_once: int) -> int:
    """Pages for so many sequences whose prompts are computed ``chunk_rows`` rows at a time, and for one alone that
    computes ``rows_at_once``; and the null page."""
    each = window_pages(window, max(chunk_rows, MAX_STEP_TOKENS))
    return max(num_sequences * each, window_pages(window, rows_at_once)) + 1
