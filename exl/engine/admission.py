"""Pages for sequences: who gets in, who is paused, and what of a text need not be computed again. No device work but
copies of pages."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

from exl.batch import PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.engine.compose import ChunkRules
from exl.engine.sequence import Sequence, State


class Pages:
    """Gives a sequence its pages and takes them back; knows what a later sequence may use of them."""

    def __init__(
        self,
        pool: PagePool,
        rules: ChunkRules,
        copy_page: Callable[[int, int], None],
        reusable: Callable[[int], bool],
    ) -> None:
        """``copy_page(source, target)`` copies a page of all layers. ``reusable(n)``: whether the K and V of a text of n
        tokens may be used for another text that begins alike."""
        self.pool, self._rules, self._copy_page, self._reusable = pool, rules, copy_page, reusable

    def never_fits(self, num_tokens: int) -> bool:
        """Whether a text of so many tokens has no room even if it is alone."""
        return -(-num_tokens // PAGE_SIZE) > self.pool.num_pages

    def place(self, sequence: Sequence, reserve: int) -> bool:
        """Pages for all tokens that are known and one more, among them those that hold its beginning already; leaves
        ``reserve`` pages to others. False, and nothing is changed, if there are too few now."""
        pages, num_cached, num_exact = self._beginning(sequence)
        more = sequence.pages_needed - len(pages)
        if more + reserve > self.pool.num_free:
            self.pool.release(pages)
            return False
        self.pool.grow(pages, more)
        sequence.pages, sequence.num_cached, sequence.num_exact = pages, num_cached, num_exact
        sequence.old_pages = []
        return True

    def _beginning(self, sequence: Sequence) -> tuple[list[int], int, int]:
        """Pages that hold the beginning of the sequence, for how many tokens, and how many of these are exact. The last
        known token is always computed, for its logits."""
        most = len(sequence.ids) - 1
        old = self.pool.reclaim(sequence.old_pages)
        if old:
            num_tokens = min(len(old) * PAGE_SIZE, sequence.old_cached)
            return old, num_tokens, min(num_tokens, sequence.old_exact)
        reuse = sequence.ticket.request.reuse_prefix
        if reuse is False or not self._reusable(sequence.num_prompt + sequence.max_new):
            return [], 0, 0
        exact = reuse != True or sequence.num_drawn > 0  # noqa: E712  "exact" is another value
        multiple = 1 if self._rules.chunks_alike else self._rules.chunk
        known = sequence.ids[: most if self._rules.all_alike else min(most, sequence.num_prompt)]
        pages, num_tokens, num_exact = self.pool.take_prefix(
            known, exact=exact and not self._rules.all_alike, multiple=multiple, copy=self._copy_page
        )
        if sequence.num_drawn == 0:
            sequence.answer.num_reused = num_tokens
        return pages, num_tokens, num_exact

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for so many tokens in all. Raises ``MemoryBudgetError`` and changes nothing if there are too few."""
        more = -(-num_tokens // PAGE_SIZE) - len(sequence.pages)
        if more > 0:
            self.pool.grow(sequence.pages, more)

    def fork(self, leader: Sequence, child: Sequence) -> None:
        """The child, whose prompt the leader has computed, shares its whole pages and gets a copy of the last one.
        Raises ``MemoryBudgetError`` and changes nothing if there are too few."""
        whole, rest = divmod(leader.num_cached, PAGE_SIZE)
        own: list[int] = []
        self.pool.grow(own, 1)
        if rest:
            self._copy_page(leader.pages[whole], own[0])
        self.pool.hold(leader.pages[:whole])
        child.pages = [*leader.pages[:whole], *own]
        child.num_cached, child.num_exact = leader.num_cached, leader.num_exact

    def remember(self, sequence: Sequence) -> None:
        """Others may use what the sequence has computed so far."""
        if self._reusable(sequence.num_cached):
            num_exact = None if self._rules.all_alike else sequence.num_exact
            self.pool.remember(sequence.ids[: sequence.num_cached], sequence.pages, num_exact)

    def give_back(self, sequence: Sequence) -> None:
        if sequence.pages:
            self.remember(sequence)
            self.pool.release(sequence.lose_pages())

    def drop(self, sequence: Sequence) -> list[int]:
        """Gives the pages back without remembering them. Returns those that nobody else holds: what they hold is
        worth nothing."""
        pages = sequence.lose_pages()
        self.pool.release(pages)
        return pages

    def pause(self, sequence: Sequence) -> None:
        """Takes all pages; the sequence waits, and remembers where its K and V were."""
        sequence.old_pages = [(page, self.pool.epoch(page)) for page in sequence.pages]
        sequence.old_cached, sequence.old_exact = sequence.num_cached, sequence.num_exact
        self.give_back(sequence)
        sequence.state = State.WAITING

    def recover(self, sequences: Many[Sequence]) -> None:
        """After an interrupt: takes the pages of these sequences, which are all there are. If pages were on their way
        between the pool and a sequence, nothing is known of any page, and all are free."""
        held = [page for sequence in sequences for page in sequence.pages]
        if self.pool.adds_up(held):
            for sequence in sequences:
                self.give_back(sequence)
            return
        self.pool.reset()
        for sequence in sequences:
            sequence.lose_pages()
