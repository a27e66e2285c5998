"""Pages where some layers have a sliding window and others have none: each sequence has two lists of them.

``Sequence.pages`` are of the layers that keep all tokens, as in other models. ``Sequence.window_pages`` are of the
layers with a window, in a slab of their own: what no window reaches is given back while the sequence runs, and the null
page stands for it. The beginning of a text can be used again up to where the first layers have all pages, and the
others those that their window reaches from there; it is always whole pages.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

from exl.batch import MAX_STEP_TOKENS, PAGE_SIZE
from exl.cache.holders import CopyPages
from exl.cache.page_pool import PagePool, TakenPrefix
from exl.cache.window_pool import WindowPool
from exl.engine.admission import Pages, prefix_key
from exl.engine.compose import ChunkRules
from exl.engine.sequence import Sequence
from exl.errors import MemoryBudgetError
from exl.layout.window import window_pages


class GroupedPages(Pages):
    """See ``Pages``. Nothing is shifted here: ``Generator`` refuses such requests."""

    def __init__(
        self,
        pool: PagePool,
        windows: WindowPool,
        rules: ChunkRules,
        copy_pages: CopyPages,
        copy_windows: CopyPages,
        reusable: Callable[[int], bool],
        step_tokens: int,
    ) -> None:
        """``pool.windows`` is ``windows``. ``copy_pages``, ``copy_windows``: in all layers of either kind."""
        super().__init__(pool, rules, copy_pages, reusable)
        self._windows, self._copy_windows = windows, copy_windows
        self._set_reach(windows.window, windows, step_tokens)
        self._least_reach = max(rules.chunk, MAX_STEP_TOKENS)

    @property
    def num_free(self) -> int:
        return min(self.pool.num_free, self._windows.num_free)

    def fits_together(self, num_members: int, num_tokens: int, num_new: int | None) -> bool:
        """Whether an empty cache has room for the window pages of so many sequences that run together or not at all.
        ``num_tokens``: of each in the end. ``num_new``: if they share a prompt, those of them that are not in it."""
        each = window_pages(self._windows.window, self._least_reach)
        needed = num_members * min(each, -(-num_tokens // PAGE_SIZE))
        if num_new is not None:  # the prompt's pages, and those from a copy of its last one on
            apart = num_members * min(each, num_new // PAGE_SIZE + 2)
            needed = min(num_members * -(-num_tokens // PAGE_SIZE), each + apart)
        return needed <= self._windows.num_usable

    # ---- getting pages

    def place(self, sequence: Sequence, reserve: int) -> bool:
        if self._gives_prompt(sequence):
            sequence.old_pages, sequence.old_window_pages = [], []
        try:
            old, old_windows = self._reclaim(sequence)
            num_cached = self._still_cached(sequence, min(len(old), len(old_windows)))
            num_kept = -(-num_cached // PAGE_SIZE)
            self.pool.release(old[num_kept:])
            self._windows.release(old_windows[num_kept:])
            if num_cached:
                self._go_on_with_both(sequence, old[:num_kept], old_windows[:num_kept], num_cached, reserve)
            else:
                self._begin(sequence, reserve)
        except MemoryBudgetError:
            return False
        sequence.old_pages, sequence.old_window_pages = [], []
        return True

    def _reclaim(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        return self.pool.reclaim(sequence.old_pages), self._windows.reclaim(sequence.old_window_pages)

    def _count_passed(self, sequence: Sequence) -> int:
        return sum(page == self._windows.null_page for page, _ in sequence.old_window_pages)

    def _go_on_with_both(
        self, sequence: Sequence, old: list[int], old_windows: list[int], num_cached: int, reserve: int
    ) -> None:
        try:
            self.pool.rewind(old, num_cached, self._copy)
            self._windows.rewind(old_windows, num_cached, self._copy_windows)
            num_passed, needed = old_windows.count(self._windows.null_page), sequence.pages_needed
            more = max(0, needed - len(old))
            more_windows = max(0, min(needed, num_passed + self._most_of(sequence)) - len(old_windows))
            if more + reserve > self.pool.num_free or more_windows + reserve > self._windows.num_free:
                raise MemoryBudgetError("KV cache: too few pages")
            self.pool.grow(old, more)
            self._windows.grow(old_windows, more_windows)
        except BaseException:
            self.pool.release(old)
            self._windows.release(old_windows)
            raise
        sequence.pages, sequence.window_pages = old, old_windows
        sequence.num_cached, sequence.num_passed = num_cached, num_passed
        sequence.num_exact = min(num_cached, sequence.old_exact)

    def _take(self, sequence: Sequence, known: list[int], reserve: int, *, exact: bool, multiple: int) -> TakenPrefix:
        taken, sequence.window_pages = self.pool.take_both(
            known,
            num_pages=sequence.pages_needed,
            spare=reserve,
            exact=exact,
            multiple=multiple,
            most=self._most_of(sequence),
        )
        return taken

    def _reach_of(self, sequence: Sequence) -> int:
        """Of a group's members each has no more than all of them have room for."""
        return self._reach if sequence.group is None else self._least_reach

    def _most_of(self, sequence: Sequence) -> int:
        most = window_pages(self._windows.window, self._reach_of(sequence))
        return min(self._windows.num_usable, most)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """As ``Pages.grow``. If only one kind of layers has too few pages, those of the other stay."""
        super().grow(sequence, num_tokens)
        more = -(-num_tokens // PAGE_SIZE) - len(sequence.window_pages)
        if more > 0:
            self._windows.grow(sequence.window_pages, more)

    def fork(self, leader: Sequence, child: Sequence) -> None:
        shared = self._windows.fork(leader.window_pages, leader.num_cached, self._copy_windows)
        try:
            super().fork(leader, child)
        except BaseException:
            self._windows.release(shared)
            raise
        child.window_pages, child.old_window_pages = shared, []

    def place_behind_prompt(self, sequence: Sequence, reserve: int) -> bool:
        count = sequence.pages_needed - sequence.num_chunked // PAGE_SIZE
        count = min(count, self._most_of(sequence))
        if count + reserve > self._windows.num_free or not super().place_behind_prompt(sequence, reserve):
            return False
        sequence.window_pages, sequence.old_window_pages = self._windows.allocate(count), []
        return True

    def take_prompt(self, leader: Sequence, sequence: Sequence) -> None:
        num_full, rest = divmod(sequence.num_chunked, PAGE_SIZE)
        if rest:
            self._copy_windows([leader.window_pages[num_full]], sequence.window_pages[:1])
        self._windows.hold(leader.window_pages[:num_full])
        sequence.window_pages[:0] = leader.window_pages[:num_full]
        super().take_prompt(leader, sequence)

    # ---- what is written, and what is known

    def _passing_pages(self, sequence: Sequence) -> list[int]:
        return sequence.window_pages

    def _passes_at(self, num_cached: int) -> int:
        """Up to the last whole page: behind that a later text may go on, and ``window_pages`` counts it."""
        return num_cached // PAGE_SIZE * PAGE_SIZE

    def rewind(self, sequence: Sequence, num_tokens: int) -> None:
        super().rewind(sequence, num_tokens)
        self._windows.rewind(sequence.window_pages, sequence.num_cached, self._copy_windows)
        sequence.pages_changed()

    def proven(self, sequence: Sequence) -> None:
        self._windows.trust(sequence.window_pages)
        super().proven(sequence)

    def remember(self, sequence: Sequence) -> None:
        if self._reusable(sequence.num_cached):
            whole = sequence.num_cached // PAGE_SIZE * PAGE_SIZE
            num_exact = None if self._rules.all_alike else min(sequence.num_exact, whole)
            self.pool.remember(prefix_key(sequence, whole), sequence.pages, num_exact, sequence.window_pages)

    # ---- giving them back

    def _release(self, sequence: Sequence) -> None:
        self._windows.release(sequence.lose_window_pages())
        super()._release(sequence)

    def give_back(self, sequence: Sequence) -> None:
        if sequence.num_read == 0:
            self._windows.doubt(sequence.window_pages)
        super().give_back(sequence)

    def poison(self, sequences: Many[Sequence], zero: Callable[[list[int]], None]) -> None:
        for sequence in sequences:
            pages = sequence.lose_window_pages()
            self._windows.poison(pages)
            self._windows.release(pages)
        self._windows.clean_up()
        super().poison(sequences, zero)

    def pause(self, sequence: Sequence) -> None:
        sequence.old_window_pages = [(page, self._windows.epoch(page)) for page in sequence.window_pages]
        super().pause(sequence)

    def recover(self, sequences: Many[Sequence], zero: Callable[[list[int]], None]) -> None:
        super().recover(sequences, zero)
        self._windows.clean_up()

    def _take_all(self, sequences: Many[Sequence]) -> None:
        try:
            self.pool.check(
                [sequence.held_pages for sequence in sequences], [sequence.window_pages for sequence in sequences]
            )
        except Exception:  # also of the tree itself, which may be half changed
            for sequence in sequences:
                sequence.lose_pages()
                sequence.lose_window_pages()
            self.pool.clear((), ())
            return
        for sequence in sequences:
            self.give_back(sequence)
