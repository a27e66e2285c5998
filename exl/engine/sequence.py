"""A sequence: tokens, the pages of the cache that hold their K and V, and what its draws depend on."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE

if TYPE_CHECKING:
    from exl.engine.constraints import Matcher
    from exl.engine.draws import DrawState
    from exl.engine.group import Group
    from exl.engine.request import Sink
    from exl.engine.shift import Shift
    from exl.engine.ticket import Answer, Ticket

_NEVER = 1 << 62


class State(enum.Enum):
    WAITING = "waiting"  # has no pages: it has not begun, or was paused
    PREFILL = "prefill"  # tokens that are known are being computed: a prompt, or those of a sequence that was paused
    RUNNING = "running"  # each step draws a token
    DONE = "done"


@dataclass(eq=False)
class Sequence:
    """Plain data; the scheduler changes it. At any time ``ids`` are all tokens that are known: the prompt's and those
    that have been drawn and read."""

    ticket: Ticket
    answer: Answer  # what its caller gets
    ids: list[int]
    num_prompt: int
    max_new: int  # tokens that it may draw
    draws: DrawState
    sink: Sink | None
    matcher: Matcher | None
    arrival: tuple[int, ...]  # of its request, then its place in it: older ones go first
    stop_ids: frozenset[int] = frozenset()  # tokens that end it and are no part of its answer
    prompt_only: bool = False  # nothing is drawn: only what its prompt's rows give is wanted
    state: State = State.WAITING
    pages: list[int] = field(default_factory=list)
    old_pages: list[tuple[int, int]] = field(default_factory=list)  # (page, epoch) of before a pause
    window_pages: list[int] = field(default_factory=list)  # of layers with a window, where they have their own pages
    old_window_pages: list[tuple[int, int]] = field(default_factory=list)
    old_cached: int = 0  # num_cached and num_exact of before a pause
    old_exact: int = 0
    shift: Shift | None = None  # how it goes on beyond the context; None: it ends there
    num_dropped: int = 0  # tokens behind its beginning that have no pages any more; later ones' pages moved up
    pristine: list[int] = field(default_factory=list)  # then the pages of its beginning; ``pages`` has turned copies
    num_passed: int = 0  # leading pages that no window reaches any more: the null page stands for them
    num_cached: int = 0  # tokens whose K and V lie on the pages
    num_exact: int = 0  # of those, the first ones, whose bits a run that reuses nothing would give them
    sample_idx: int | None = None  # its place in the last draw, while that is not read; None: all its tokens are known
    rewinds: dict[int, int] = field(default_factory=dict)  # how often its text was taken back, by position
    group: Group | None = None  # those that run in the same steps or not at all
    awaits_prompt: bool = False  # another one computes its prompt; until then its pages are those behind the prompt
    _table: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _window_table: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def wants_rows(self) -> bool:
        """Whether something is still wanted of the rows of its prompt, besides the logits after the last one."""
        rows = self.ticket.rows
        return rows is not None and rows.is_wanted

    @property
    def lora(self) -> int:
        """The number of its adapter, -1: none."""
        return self.ticket.lora

    @property
    def num_unwanted(self) -> int:
        """The known tokens, less those from the first one on whose row is wanted: the others may come from the cache,
        which has their K and V, but no logits."""
        return self.ticket.rows.num_done if self.wants_rows else len(self.ids)

    @property
    def num_tokens(self) -> int:
        """With the one that is drawn but not read."""
        return len(self.ids) + (self.sample_idx is not None)

    @property
    def num_drawn(self) -> int:
        """With the one that is not read."""
        return self.num_tokens - self.num_prompt

    @property
    def num_read(self) -> int:
        """Drawn tokens that are known."""
        return len(self.ids) - self.num_prompt

    @property
    def num_chunked(self) -> int:
        """Tokens of the prompt that run in chunks: all, but in a group not the last one, which is a decode row."""
        return self.num_prompt - (self.group is not None)

    @property
    def prefill_stop(self) -> int:
        """The known tokens that are computed before it runs: in a group not the last one. One for whose prompt others
        wait stops at its end, where its pages are those that they need."""
        if self.group is None:
            return len(self.ids)
        return self.num_chunked if self.group.waits_for(self) else len(self.ids) - 1

    @property
    def pages_needed(self) -> int:
        """For the K and V of all tokens, and of the next one if there is one, or up to the next shift."""
        return -(-(min(self.num_tokens + (not self.prompt_only), self.next_shift) - self.num_dropped) // PAGE_SIZE)

    @property
    def may_grow(self) -> bool:
        """Whether it may need a page more than it has, before it ends."""
        longest = self.num_prompt + (0 if self.prompt_only else self.max_new)
        return self.shift is not None or self._num_pages * PAGE_SIZE < longest

    @property
    def _num_pages(self) -> int:
        """That it has, from the first one on, in all layers."""
        return min(len(self.pages), len(self.window_pages)) if self.window_pages else len(self.pages)

    @property
    def next_shift(self) -> int:
        """The token before whose row something is dropped."""
        return _NEVER if self.shift is None else self.num_dropped + self.shift.num_tokens

    @property
    def held_pages(self) -> list[int]:
        return self.pages + self.pristine

    @property
    def room(self) -> int:
        """Tokens that its pages have room for, from its first one on."""
        return min(self.num_dropped + self._num_pages * PAGE_SIZE, self.next_shift)

    @property
    def page_table(self) -> NDArray[np.int32]:
        """``pages`` as an array, made anew only when their number has changed, or ``pages_changed`` was called."""
        if len(self._table) != len(self.pages):
            self._table = np.asarray(self.pages, dtype=np.int32)
        return self._table

    @property
    def window_table(self) -> NDArray[np.int32]:
        """``window_pages``, as ``page_table``."""
        if len(self._window_table) != len(self.window_pages):
            self._window_table = np.asarray(self.window_pages, dtype=np.int32)
        return self._window_table

    def pages_changed(self) -> None:
        """Some of the pages are others now."""
        self._table = self._window_table = np.empty(0, np.int32)

    def lose_window_pages(self) -> list[int]:
        """``window_pages``, which the caller releases, before or after ``lose_pages``."""
        pages, self.window_pages = self.window_pages, []
        self.pages_changed()
        return pages

    def lose_pages(self) -> list[int]:
        """The pages, which the caller releases. All tokens are to be computed again before the next is drawn."""
        pages, self.pages, self.pristine = self.held_pages, [], []
        self.pages_changed()
        self.num_cached = self.num_exact = self.num_passed = self.num_dropped = 0
        return pages
