"""Pages for sequences: who gets in, who is paused, and what of a text need not be computed again. No device work but
copies of pages."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

from exl.batch import PAGE_SIZE
from exl.cache.holders import CopyPages, PageHolders
from exl.cache.page_pool import PagePool, TakenPrefix
from exl.engine.compose import ChunkRules
from exl.engine.sequence import Sequence, State
from exl.errors import MemoryBudgetError
from exl.layout.window import pages_behind, rows_within, window_pages

_SALT = 1 << 24  # above any token id (``exl.checkpoint.config_reader.MAX_SIZE``), and with all adapters below 2**31


def prefix_key(sequence: Sequence, num_tokens: int) -> list[int]:
    """The first tokens of a sequence, as the cache of prefixes knows them: a text under an adapter has other K and V
    than under another one, so its first token is one that no other adapter's texts begin with. What follows is known
    by what is before it."""
    ids = sequence.ids[:num_tokens]
    if ids:
        ids[0] += (sequence.lora + 1) * _SALT
    return ids


class Pages:
    """Gives a sequence its pages and takes them back; knows what a later sequence may use of them."""

    def __init__(
        self,
        pool: PagePool,
        rules: ChunkRules,
        copy_pages: CopyPages,
        reusable: Callable[[int], bool],
        window: int | None = None,
        step_tokens: int = 0,
        turn_pages: Callable[[list[int], list[int], int], None] | None = None,
    ) -> None:
        """``copy_pages`` copies them in all layers. ``reusable(n)``: whether the K and V of a text of n
        tokens may be used for another text that begins alike. ``window``: of all layers, if each has one: what it does
        not reach any more is given back; ``step_tokens``: rows of a prompt in one step, if there are pages for them.
        ``turn_pages``: ``Device.turn_pages``, for texts that go on beyond the context."""
        self._turn = turn_pages
        self.pool, self._rules, self._copy, self._reusable = pool, rules, copy_pages, reusable
        self._window = window
        self._passing: PageHolders = pool  # of pages that windows pass
        self._reach, self._most = 0, pool.num_usable
        if window is not None:
            self._set_reach(window, pool, step_tokens)

    def _set_reach(self, window: int, pool: PageHolders, step_tokens: int) -> None:
        """Rows of a prompt for which a sequence gets pages at once, and the most pages that it has then."""
        self._window, self._passing = window, pool
        self._reach = max(self._rules.chunk, min(step_tokens, rows_within(window, pool.num_usable)))
        self._most = min(pool.num_usable, window_pages(window, self._reach))

    @property
    def num_free(self) -> int:
        """Pages that a sequence could get."""
        return self.pool.num_free

    def place(self, sequence: Sequence, reserve: int) -> bool:
        """Pages for all tokens that are known and one more, among them those that hold its beginning already; leaves
        ``reserve`` pages to others. False, and nothing is changed, if there are too few now."""
        if self._gives_prompt(sequence):
            sequence.old_pages = []
        try:
            old = self.pool.reclaim(sequence.old_pages)
            num_cached = self._still_cached(sequence, len(old))
            num_kept = -(-num_cached // PAGE_SIZE)
            self.pool.release(old[num_kept:])
            if num_cached:
                self._go_on_with(sequence, old[:num_kept], num_cached, reserve)
            else:
                self._begin(sequence, reserve)
        except MemoryBudgetError:
            return False
        sequence.old_pages = []
        return True

    def _still_cached(self, sequence: Sequence, num_pages: int) -> int:
        """Of a sequence that was paused and has its first pages still: of a chunk that has lost pages nothing is left,
        as it runs whole or not at all."""
        chunk, num_cached = self._rules.chunk, min(num_pages * PAGE_SIZE, sequence.old_cached)
        cut = num_cached < min(sequence.old_cached, sequence.num_chunked) and not self._rules.chunks_alike
        num_cached = num_cached // chunk * chunk if cut else num_cached
        return num_cached if self._sees_all(num_cached, self._count_passed(sequence)) else 0

    def _gives_prompt(self, sequence: Sequence) -> bool:
        """Whether it must come to the end of its prompt first, where others begin: with a window its later tokens have
        fewer pages before them."""
        return self._window is not None and sequence.group is not None and sequence.group.shares_prompt

    def _count_passed(self, sequence: Sequence) -> int:
        """Of the pages that it had before it was paused."""
        return sum(page == self.pool.null_page for page, _ in sequence.old_pages)

    def _sees_all(self, num_cached: int, num_passed: int) -> bool:
        """Whether the rows behind the first ``num_cached`` tokens see nothing of the first ``num_passed`` pages."""
        return num_passed == 0 or num_passed <= pages_behind(self._window, num_cached)

    def _go_on_with(self, sequence: Sequence, old: list[int], num_cached: int, reserve: int) -> None:
        """With those of its pages that nobody else got while it was paused."""
        try:
            self.pool.rewind(old, num_cached, self._copy)
            num_passed = old.count(self.pool.null_page) if self._window is not None else 0
            more = max(0, min(sequence.pages_needed, num_passed + self._most) - len(old))
            if more + reserve > self.pool.num_free:
                raise MemoryBudgetError("KV cache: too few pages")
            self.pool.grow(old, more)
        except BaseException:
            self.pool.release(old)
            raise
        sequence.pages, sequence.num_cached, sequence.num_passed = old, num_cached, num_passed
        sequence.num_exact = min(num_cached, sequence.old_exact)

    def _begin(self, sequence: Sequence, reserve: int) -> None:
        """With pages that hold its beginning, as far as it may use them. The last known token is always computed, for
        its logits."""
        rules = self._rules
        known, exact = self._usable(sequence)
        taken = self._take(
            sequence,
            known,
            reserve,
            exact=exact and not rules.all_alike,
            multiple=1 if rules.chunks_alike or not exact else rules.chunk,
        )
        sequence.pages, sequence.num_cached, sequence.num_exact = taken.pages, taken.num_reused, taken.num_exact
        sequence.num_passed = taken.num_passed
        if sequence.num_drawn == 0:
            sequence.answer.num_reused = taken.num_reused

    def _take(self, sequence: Sequence, known: list[int], reserve: int, *, exact: bool, multiple: int) -> TakenPrefix:
        return self.pool.take_prefix(
            known,
            self._copy,
            num_pages=sequence.pages_needed,
            spare=reserve,
            exact=exact,
            multiple=multiple,
            window=self._window,
            most=self._most,
        )

    def _usable(self, sequence: Sequence) -> tuple[list[int], bool]:
        """The beginning of a sequence that it may take from the cache; whether only with the bits of a cold run."""
        request, rules = sequence.ticket.request, self._rules
        known: list[int] = []
        exact = request.reuse_prefix != True or sequence.num_drawn > 0  # noqa: E712  "exact" is another value
        # What a cold run computes as decode rows has other bits than a longer prompt that begins alike.
        differs = exact and not rules.all_alike and sequence.num_chunked <= rules.max_decode_prompt
        may_reuse = request.reuse_prefix is not False and not differs
        if may_reuse and self._reusable(sequence.num_prompt + sequence.max_new):
            most = sequence.num_chunked if self._gives_prompt(sequence) else len(sequence.ids) - 1
            most = min(most, sequence.num_unwanted, sequence.next_shift)  # what comes later saw other tokens
            known = prefix_key(sequence, most if rules.all_alike else min(most, sequence.num_chunked))
        return known, exact

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for so many tokens in all. Raises ``MemoryBudgetError`` and changes nothing if there are too few."""
        more = -(-(min(num_tokens, sequence.next_shift) - sequence.num_dropped) // PAGE_SIZE) - len(sequence.pages)
        if more > 0:
            self.pool.grow(sequence.pages, more)

    def grow_for_step(self, sequence: Sequence) -> None:
        """For its next row, or the rows of its prompt that may run in one step. Raises as ``grow`` does."""
        num_tokens = sequence.num_tokens
        if self._window is not None and sequence.state is State.PREFILL:  # else it has pages for all since it began
            num_tokens = min(num_tokens, sequence.num_cached + self._reach_of(sequence))
        self.grow(sequence, num_tokens)

    def _reach_of(self, sequence: Sequence) -> int:
        return self._reach

    def shift(self, sequence: Sequence) -> None:
        """Makes room for the next row of a text that has filled the context: see ``exl.engine.shift``. Raises
        ``MemoryBudgetError`` and changes nothing if there are too few pages for copies of its beginning."""
        if sequence.num_cached < sequence.next_shift:
            return
        shift, pages = sequence.shift, sequence.pages
        kept = shift.num_kept
        if sequence.num_dropped == 0:
            self.remember(sequence)
            copies = self.pool.allocate(kept)
            sequence.pristine, pages[:kept] = pages[:kept], copies
        passed = pages[kept : kept + shift.num_dropped]
        del pages[kept : kept + shift.num_dropped]
        self.pool.release(passed)
        sequence.num_dropped += shift.step
        sequence.pages_changed()
        if kept:
            self._turn(sequence.pristine, pages[:kept], sequence.num_dropped)

    def pass_by(self, sequences: Many[Sequence]) -> None:
        """Gives back what no window reaches any more. A later text that begins alike finds it as long as nobody else
        needs the pages."""
        for sequence in sequences if self._window is not None else ():
            num_passed = pages_behind(self._window, self._passes_at(sequence.num_cached))
            if num_passed > sequence.num_passed:
                self.remember(sequence)
                pages = self._passing_pages(sequence)
                if sequence.num_read == 0:
                    self._passing.doubt(pages[sequence.num_passed : num_passed])
                self._passing.pass_by(pages, sequence.num_passed, num_passed)
                sequence.num_passed = num_passed
                sequence.pages_changed()

    def _passing_pages(self, sequence: Sequence) -> list[int]:
        return sequence.pages

    def _passes_at(self, num_cached: int) -> int:
        """What rows behind so many tokens do not see is given back."""
        return num_cached

    def fork(self, leader: Sequence, child: Sequence) -> None:
        """The child, whose prompt the leader has computed, shares its whole pages and gets a copy of the last one.
        Raises ``MemoryBudgetError`` and changes nothing if there are too few."""
        child.pages = self.pool.fork(leader.pages, leader.num_cached, self._copy)
        child.num_cached, child.num_exact = leader.num_cached, leader.num_exact
        child.num_passed = leader.num_passed
        child.old_pages = []

    def place_behind_prompt(self, sequence: Sequence, reserve: int) -> bool:
        """Pages for what follows its prompt, which it gets later (``take_prompt``); leaves ``reserve`` pages to others.
        False, and nothing is changed, if there are too few now."""
        count = sequence.pages_needed - sequence.num_chunked // PAGE_SIZE
        if count + reserve > self.pool.num_free:
            return False
        sequence.pages = self.pool.allocate(count)
        sequence.old_pages, sequence.awaits_prompt = [], True
        return True

    def take_prompt(self, leader: Sequence, sequence: Sequence) -> None:
        """The sequence shares the whole pages of the prompt that the leader has computed, and gets a copy of the rest
        on the first of its own."""
        num_full, rest = divmod(sequence.num_chunked, PAGE_SIZE)
        if rest:
            self._copy([leader.pages[num_full]], sequence.pages[:1])
        self.pool.hold(leader.pages[:num_full])
        sequence.pages[:0] = leader.pages[:num_full]
        sequence.pages_changed()
        sequence.num_cached, sequence.awaits_prompt = sequence.num_chunked, False
        sequence.num_passed = leader.num_passed
        sequence.num_exact = min(sequence.num_cached, leader.num_exact)
        if sequence.num_drawn == 0:
            sequence.answer.num_reused = sequence.num_cached

    def drop(self, sequence: Sequence) -> None:
        """Takes the pages of a text that nobody goes on with; it is not remembered."""
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.lose_pages())

    def rewind(self, sequence: Sequence, num_tokens: int) -> None:
        """Only the sequence's first tokens stay computed. Raises ``MemoryBudgetError`` if what is to be computed again
        lies on pages that others have, and there are too few others, or sees tokens whose pages were given back; the
        sequence is shorter all the same."""
        sequence.num_cached = min(sequence.num_cached, num_tokens)
        sequence.num_exact = min(sequence.num_exact, sequence.num_cached)
        shifted_at = sequence.next_shift - sequence.shift.step if sequence.num_dropped else 0
        if sequence.num_cached < shifted_at or not self._sees_all(sequence.num_cached, sequence.num_passed):
            raise MemoryBudgetError("KV cache: the pages before were given back")
        self.pool.rewind(sequence.pages, sequence.num_cached - sequence.num_dropped, self._copy)
        sequence.pages_changed()

    def proven(self, sequence: Sequence) -> None:
        """Its first draw is known, so its K and V are numbers: others that wait for its prompt find it."""
        self.pool.trust(sequence.pages)
        self.remember(sequence)

    def remember(self, sequence: Sequence) -> None:
        """Others may use what the sequence has computed so far; but not what it has since it was shifted."""
        if self._reusable(sequence.num_cached) and not sequence.num_dropped:
            num_exact = None if self._rules.all_alike else sequence.num_exact
            self.pool.remember(prefix_key(sequence, sequence.num_cached), sequence.pages, num_exact)

    def give_back(self, sequence: Sequence) -> None:
        if sequence.pages:
            if sequence.num_read == 0:
                self.pool.doubt(sequence.pages)
            self.remember(sequence)
            self._release(sequence)

    def poison(self, sequences: Many[Sequence], zero: Callable[[list[int]], None]) -> None:
        """Gives the pages back of a request with a row of no numbers, whose choices share them. They are zeroed before
        somebody else gets them: a weight of 0 times NaN is NaN."""
        for sequence in sequences:
            pages = sequence.lose_pages()
            self.pool.poison(pages)
            self.pool.release(pages)
        self.pool.clean(zero)

    def pause(self, sequence: Sequence) -> None:
        """Takes all pages; the sequence waits, and remembers where its K and V were."""
        pages = [] if sequence.num_dropped else sequence.pages  # then it is computed and shifted again as it was
        sequence.old_pages = [(page, self.pool.epoch(page)) for page in pages]
        sequence.old_cached, sequence.old_exact = sequence.num_cached, sequence.num_exact
        self.give_back(sequence)
        sequence.state, sequence.awaits_prompt = State.WAITING, False

    def recover(self, sequences: Many[Sequence], zero: Callable[[list[int]], None]) -> None:
        """After an interrupt: takes the pages of these sequences, which are all there are. If pages were on their way
        between the pool and a sequence, nothing is known of any page, and all are free."""
        self._take_all(sequences)
        self.pool.clean(zero)

    def _take_all(self, sequences: Many[Sequence]) -> None:
        held = [sequence.held_pages for sequence in sequences]
        try:
            self.pool.check(held)
        except Exception:  # also of the tree itself, which may be half changed
            for sequence in sequences:
                sequence.lose_pages()
            self.pool.clear(())
            return
        for sequence in sequences:
            self.give_back(sequence)
