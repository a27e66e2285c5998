"""Pages of layers that have a window beside those of layers that have none: which beginnings of texts can be gone on
with, what is evicted, and any order of events against a plain model of both slabs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exl.batch import PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.cache.window_pool import WindowPool
from exl.errors import MemoryBudgetError

WINDOW = 100  # of a row at the beginning of page i: its pages i - 1 and i - 2


def text(num_pages: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + i for i in range(num_pages * PAGE_SIZE)]


def both(num_pages: int = 10, num_windows: int = 10) -> tuple[PagePool, WindowPool]:
    windows = WindowPool(num_windows + 1, WINDOW)
    return PagePool(num_pages, windows=windows), windows


def known(pool: PagePool, ids: Sequence[int], num_exact: int | None = None) -> tuple[list[int], list[int]]:
    """Pages of a sequence that has computed ``ids`` by itself, and is remembered; it still holds all."""
    pages, beside = pool.allocate(len(ids) // PAGE_SIZE), pool.windows.allocate(len(ids) // PAGE_SIZE)
    pool.remember(ids, pages, num_exact, beside)
    return pages, beside


def test_a_text_is_gone_on_with_where_both_have_what_is_seen():
    pool, windows = both()
    ids = text(5)
    pages, beside = known(pool, ids)
    windows.pass_by(beside, 0, 3)  # still there: nobody needs them
    taken, own = pool.take_both(ids, num_pages=6, most=5)
    assert (taken.num_reused, taken.num_passed, taken.pages[:5]) == (5 * PAGE_SIZE, 3, pages)
    assert own[:5] == [0, 0, 0, *beside[3:]]
    assert len(own) == 6  # one fresh page, as of the others
    pool.check([pages, taken.pages], [beside, own])


def test_without_what_the_window_reaches_less_is_found():
    pool, windows = both(num_windows=5)
    ids = text(5)
    pages, beside = known(pool, ids)
    windows.pass_by(beside, 0, 5)
    assert pool.find(ids).num_tokens == 5 * PAGE_SIZE
    others = windows.allocate(1)  # the least recently used page is the last of those that were passed together
    assert pool.find(ids).num_tokens == 4 * PAGE_SIZE
    others += windows.allocate(1)
    assert pool.find(ids).num_tokens == 3 * PAGE_SIZE
    others += windows.allocate(3)
    assert pool.find(ids).num_tokens == 0
    assert pool.find(ids).pages == ()
    pool.check([pages], [beside, others])
    assert pool.stats.evictions == 0


def test_a_text_is_cut_to_multiples_and_whole_pages():
    pool, _ = both()
    ids = text(5)
    known(pool, ids)
    assert pool.find(ids[:200]).num_tokens == 3 * PAGE_SIZE
    assert pool.find(ids, multiple=2 * PAGE_SIZE).num_tokens == 4 * PAGE_SIZE
    assert pool.find(ids, multiple=96).num_tokens == 3 * PAGE_SIZE  # 192 is whole pages, and twice 96


def test_pages_go_with_the_node_that_knows_them():
    """Of a text whose pages in the other layers are evicted nothing is known here."""
    pool, windows = both(num_pages=4)
    ids = text(3)
    pages, beside = known(pool, ids)
    pool.release(pages)
    windows.release(beside[1:])
    assert windows.num_kept == 2
    taken = pool.allocate(4)
    assert windows.num_kept == 0
    assert windows.num_free == 9  # the first one is still held
    pool.check([taken], [beside[:1]])


def test_a_text_computed_again_gets_its_window_pages_back():
    pool, windows = both(num_windows=8)
    ids = text(4)
    pages, beside = known(pool, ids)
    windows.release(beside)
    pool.release(pages)
    filler = windows.allocate(8)
    assert pool.find(ids).num_tokens == 0
    windows.release(filler)
    again, fresh = known(pool, ids)
    assert pool.find(ids).num_tokens == 4 * PAGE_SIZE
    windows.pass_by(fresh, 0, 2)
    taken, own = pool.take_both(ids, num_pages=5, most=4)
    assert own[:4] == [0, 0, *fresh[2:]]
    pool.check([again, taken.pages], [fresh, own])


def test_pages_of_another_sequence_serve_where_the_first_ones_are_gone():
    """Both run, and have the text on pages of their own: the tree has the first one's, and the window pages that are
    there."""
    pool, windows = both(num_windows=8)
    ids = text(3)
    first, first_beside = known(pool, ids)
    second, second_beside = pool.allocate(3), windows.allocate(3)
    pool.remember(ids, second, None, second_beside)
    windows.pass_by(first_beside, 0, 3)
    others = windows.allocate(5)  # of the first one's
    assert pool.find(ids).num_tokens == 0
    pool.remember(ids, second, None, second_beside)
    assert pool.find(ids).num_tokens == 3 * PAGE_SIZE
    pool.check([first, second], [first_beside, second_beside, others])


def test_what_is_not_exact_is_not_found_as_exact():
    pool, windows = both()
    ids = text(4)
    first, first_beside = known(pool, ids, num_exact=2 * PAGE_SIZE)
    assert pool.find(ids, exact=True).num_tokens == 2 * PAGE_SIZE
    windows.release(first_beside)
    pool.release(first)
    second, second_beside = known(pool, ids)  # exact ones take their place, in both
    taken, own = pool.take_both(ids, num_pages=4, most=4, exact=True)
    assert (taken.pages, own[2:]) == (second, second_beside[2:])
    assert taken.num_exact == 4 * PAGE_SIZE


def test_a_page_that_is_not_exact_does_not_stand_beside_one_that_is():
    """The window page of an exact text is evicted; another sequence has computed the text with other bits."""
    pool, windows = both(num_windows=6)
    ids = text(3)
    exact, beside = known(pool, ids)
    windows.pass_by(beside, 0, 3)
    windows.release(windows.allocate(6))
    other, other_beside = pool.allocate(3), windows.allocate(3)
    pool.remember(ids, other, 0, other_beside)
    assert pool.find(ids).num_tokens == 0
    pool.check([exact, other], [beside, other_beside])


def test_marking_as_exact_drops_what_another_sequence_left_there():
    pool, windows = both()
    ids = text(2)
    pages, beside = known(pool, ids, num_exact=0)
    windows.pass_by(beside, 0, 2)
    pool.remember(ids, pages, None, beside)  # exact after all: of the pages that were passed nothing is known
    assert pool.find(ids).num_tokens == 0
    assert windows.num_free == windows.num_usable


def test_too_few_pages_of_either_kind_change_nothing():
    ids = text(4)
    for num_pages, num_windows in ((6, 9), (9, 5)):
        pool, windows = both(num_pages, num_windows)
        pages, beside = known(pool, ids)
        pool.release(pages)
        windows.release(beside)
        assert pool.take_both(ids, num_pages=5, most=5, spare=1)
        before = pool.num_free, windows.num_free, pool.stats
        with pytest.raises(MemoryBudgetError, match="3 pages of 64 tokens requested"):
            pool.take_both(text(2, seed=1), num_pages=2, most=5, spare=1)
        assert (pool.num_free, windows.num_free, pool.stats) == before


def test_poisoned_window_pages_are_zeroed_and_not_known():
    zeroed: list[int] = []
    windows = WindowPool(6, WINDOW, zeroed.extend)
    pool = PagePool(5, windows=windows)
    ids = text(2)
    pages, beside = known(pool, ids)
    windows.poison(beside)
    windows.release(beside)
    assert pool.find(ids).num_tokens == 0
    assert windows.num_free == 3
    windows.clean_up()
    assert (sorted(zeroed), windows.num_free) == (sorted(beside), 5)
    pool.check([pages], [])


def test_a_pool_with_windows_has_neither_null_page_nor_tier():
    with pytest.raises(ValueError, match="neither a null page nor a tier"):
        PagePool(4, null=True, windows=WindowPool(4, WINDOW))
    with pytest.raises(ValueError, match="expected windows="):
        PagePool(4).take_both([], num_pages=1, most=1)


def test_what_the_tree_and_the_pool_disagree_about_is_noticed():
    pool, windows = both()
    known(pool, text(2))
    pool.check()
    windows._known.on_page.popitem()
    with pytest.raises(RuntimeError, match="the tree and the pages with a window differ"):
        pool.check()


# ---- all of it ------------------------------------------------------------------------------------------------------


@dataclass
class Live:
    ids: list[int]
    pages: list[int]
    beside: list[int]
    num_exact: int

    @property
    def first(self) -> int:
        """The first token that has its page in the layers with a window."""
        return self.beside.count(0) * PAGE_SIZE


ASKED = st.tuples(
    *(st.integers(0, 1), st.sampled_from([64, 128, 192, 256]), st.sampled_from([64, 90, 128, 192, 250, 320])),
    *(st.booleans(), st.sampled_from([1, 64, 96]), st.sampled_from([0, 0, 1])),
)


class BothMachine(RuleBasedStateMachine):
    """Sequences begin, share pages, grow, pass pages by, fork, rewind, pause, come back and end. What lies at each
    place of both slabs is a token, and whether it was computed as in a cold run."""

    NUM_PAGES, NUM_WINDOWS, WINDOW = 10, 7, 100

    def __init__(self) -> None:
        super().__init__()
        self.windows = WindowPool(self.NUM_WINDOWS + 1, self.WINDOW)
        self.pool = PagePool(self.NUM_PAGES, windows=self.windows)
        self.slab = [[(-1, False)] * PAGE_SIZE for _ in range(self.NUM_PAGES)]
        self.window_slab = [[(-1, False)] * PAGE_SIZE for _ in range(self.NUM_WINDOWS + 1)]
        self.live: list[Live] = []
        self.paused: list[tuple[Live, list[tuple[int, int]], list[tuple[int, int]]]] = []

    def copy(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for one, other in zip(src, dst, strict=True):
            assert self.pool.num_holders(other) == 1
            self.slab[other] = list(self.slab[one])

    def copy_windows(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for one, other in zip(src, dst, strict=True):
            assert self.windows.num_holders(other) == 1
            self.window_slab[other] = list(self.window_slab[one])

    def write(self, sequence: Live, start: int) -> None:
        for i in range(start, len(sequence.ids)):
            for pages, slab, pool in (
                (sequence.pages, self.slab, self.pool),
                (sequence.beside, self.window_slab, self.windows),
            ):
                page = pages[i // PAGE_SIZE]
                assert pool.num_holders(page) == 1
                slab[page][i % PAGE_SIZE] = (sequence.ids[i], sequence.num_exact > i)

    def held(self) -> tuple[list[list[int]], list[list[int]]]:
        return [one.pages for one in self.live], [one.beside for one in self.live]

    def pick(self, which: int) -> Live:
        return self.live[which % len(self.live)]

    def found(self, ids: Sequence[int], exact: bool, multiple: int) -> int:
        """By trying all lengths, along the tree."""
        best, node, path = 0, self.pool._tree.root, []
        for i in range(len(ids) // PAGE_SIZE):
            node = node.children.get(tuple(ids[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]))
            if node is None or (exact and node.num_exact < PAGE_SIZE):
                break
            path.append(node)
            length = (i + 1) * PAGE_SIZE
            seen = [p for j, p in enumerate(path) if (j + 1) * PAGE_SIZE > length - self.WINDOW + 1]
            if length % multiple == 0 and all(one.window_page > 0 for one in seen):
                best = length
        return best

    @rule(asked=ASKED)
    def begin(self, asked: tuple[int, int, int, bool, int, int]) -> None:
        seed, cut, length, exact, multiple, spare = asked
        ids = (text(4, seed)[:cut] + [5000] * 320)[:length]
        expected, before = self.found(ids, exact, multiple), (self.pool.num_free, self.windows.num_free)
        assert self.pool.find(ids, exact=exact, multiple=multiple).num_tokens == expected
        num_pages = -(-length // PAGE_SIZE)
        try:
            taken, beside = self.pool.take_both(
                ids, num_pages=num_pages, spare=spare, exact=exact, multiple=multiple, most=self.NUM_WINDOWS
            )
        except MemoryBudgetError:
            assert min(before) < num_pages + spare
            assert (self.pool.num_free, self.windows.num_free) == before
            return
        assert min(self.pool.num_free, self.windows.num_free) >= spare
        assert taken.num_reused == expected
        assert not exact or taken.num_exact == taken.num_reused
        passed = taken.num_passed
        assert passed == max(0, taken.num_reused + 1 - self.WINDOW) // PAGE_SIZE
        assert beside[:passed] == [0] * passed
        assert 0 not in beside[passed:]
        for i in range(taken.num_reused):
            token, is_exact = self.slab[taken.pages[i // PAGE_SIZE]][i % PAGE_SIZE]
            assert token == ids[i]
            assert is_exact or i >= taken.num_exact
            if i >= passed * PAGE_SIZE:
                token, is_exact = self.window_slab[beside[i // PAGE_SIZE]][i % PAGE_SIZE]
                assert token == ids[i]
                assert is_exact or i >= taken.num_exact
        num_exact = length if exact or not taken.num_reused else taken.num_exact
        self.live.append(Live(ids, taken.pages, beside, num_exact))
        self.write(self.live[-1], taken.num_reused)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), count=st.integers(1, 130), token=st.integers(0, 1))
    def grow(self, which: int, count: int, token: int) -> None:
        sequence, length = self.pick(which), len(self.pick(which).ids)
        more = -(-(length + count) // PAGE_SIZE) - len(sequence.pages)
        try:
            self.pool.grow(sequence.pages, max(0, more))
        except MemoryBudgetError:
            return
        try:
            self.windows.grow(sequence.beside, max(0, more))
        except MemoryBudgetError:
            self.pool.release(sequence.pages[len(sequence.beside) :])
            del sequence.pages[len(sequence.beside) :]
            return
        if sequence.num_exact == length:
            sequence.num_exact += count
        sequence.ids = sequence.ids + [3000 + token] * count
        self.write(sequence, length)

    def remember_all(self, sequence: Live) -> None:
        whole = len(sequence.ids) // PAGE_SIZE * PAGE_SIZE
        num_exact = min(sequence.num_exact, whole)
        self.pool.remember(sequence.ids[:whole], sequence.pages, num_exact, sequence.beside)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), remembered=st.booleans())
    def pass_by(self, which: int, remembered: bool) -> None:
        """What no window reaches."""
        sequence = self.pick(which)
        if remembered:
            self.remember_all(sequence)
        first, last = sequence.first // PAGE_SIZE, max(0, len(sequence.ids) + 1 - self.WINDOW) // PAGE_SIZE
        self.windows.pass_by(sequence.beside, first, max(first, last))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), num_exact=st.sampled_from([None, None, 0, 70, 130]))
    def remember(self, which: int, num_exact: int | None) -> None:
        """Perhaps with fewer exact tokens than it turns out to have."""
        sequence = self.pick(which)
        whole = sequence.num_exact
        if num_exact is not None:
            sequence.num_exact = min(num_exact, whole)
        self.remember_all(sequence)
        sequence.num_exact = whole

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), remembered=st.booleans(), paused=st.booleans())
    def end(self, which: int, remembered: bool, paused: bool) -> None:
        sequence = self.live.pop(which % len(self.live))
        if remembered:
            self.remember_all(sequence)
        if paused:
            old = [(page, self.pool.epoch(page)) for page in sequence.pages]
            self.paused.append((sequence, old, [(page, self.windows.epoch(page)) for page in sequence.beside]))
        self.windows.release(sequence.beside)
        self.pool.release(sequence.pages)

    @precondition(lambda self: self.paused)
    @rule(which=st.integers(0, 100))
    def resume(self, which: int) -> None:
        sequence, old, old_beside = self.paused.pop(which % len(self.paused))
        pages, beside = self.pool.reclaim(old), self.windows.reclaim(old_beside)
        count = min(len(pages), len(beside))
        self.pool.release(pages[count:])
        self.windows.release(beside[count:])
        length = min(count * PAGE_SIZE, len(sequence.ids))
        self.live.append(Live(sequence.ids[:length], pages[:count], beside[:count], min(sequence.num_exact, length)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), cut=st.integers(0, 320))
    def fork(self, which: int, cut: int) -> None:
        sequence = self.pick(which)
        length = max(min(cut, len(sequence.ids)), min(sequence.first, len(sequence.ids)))
        try:
            beside = self.windows.fork(sequence.beside, length, self.copy_windows)
        except MemoryBudgetError:
            return
        try:
            pages = self.pool.fork(sequence.pages, length, self.copy)
        except MemoryBudgetError:
            self.windows.release(beside)
            return
        self.live.append(Live(sequence.ids[:length], pages, beside, min(sequence.num_exact, length)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), cut=st.integers(1, 100))
    def rewind(self, which: int, cut: int) -> None:
        """The end of a text is computed anew, otherwise."""
        sequence = self.pick(which)
        length = max(min(sequence.first, len(sequence.ids)), len(sequence.ids) - cut)
        ids = sequence.ids[:length] + [4000 + cut] * (len(sequence.ids) - length)
        try:
            self.pool.rewind(sequence.pages, length, self.copy)
            self.windows.rewind(sequence.beside, length, self.copy_windows)
        except MemoryBudgetError:
            ids = ids[:length]
            count = length // PAGE_SIZE  # so that nothing is left of a page that is to be written
            for pool, pages in ((self.pool, sequence.pages), (self.windows, sequence.beside)):
                pool.release(pages[count:])
                del pages[count:]
            ids = ids[: count * PAGE_SIZE]
        sequence.ids, sequence.num_exact = ids, min(sequence.num_exact, len(ids), length)
        self.write(sequence, min(length, len(ids)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def fail(self, which: int) -> None:
        sequence = self.live.pop(which % len(self.live))
        for pool, pages, slab in (
            (self.windows, sequence.beside, self.window_slab),
            (self.pool, sequence.pages, self.slab),
        ):
            pool.poison(pages)
            for page in set(pages):
                if pool.num_holders(page) == 1:
                    slab[page] = [(-9, False)] * PAGE_SIZE
            pool.release(pages)

            def zero(pages: list[int], slab: list[list[tuple[int, bool]]] = slab) -> None:
                for page in pages:
                    slab[page] = [(0, False)] * PAGE_SIZE

            pool.clean(zero)

    @precondition(lambda self: self.paused)
    @rule()
    def forget(self) -> None:
        self.pool.clear(*self.held())
        self.paused.clear()

    @invariant()
    def texts_of_live_sequences_are_intact(self) -> None:
        for sequence in self.live:
            for i, token_id in enumerate(sequence.ids):
                found, is_exact = self.slab[sequence.pages[i // PAGE_SIZE]][i % PAGE_SIZE]
                assert found == token_id
                assert is_exact or i >= sequence.num_exact
                if i >= sequence.first:
                    found, is_exact = self.window_slab[sequence.beside[i // PAGE_SIZE]][i % PAGE_SIZE]
                    assert found == token_id
                    assert is_exact or i >= sequence.num_exact

    @invariant()
    def no_owner_gets_what_is_not_a_number(self) -> None:
        for lists, slab in zip(self.held(), (self.slab, self.window_slab), strict=True):
            assert not any((-9, False) in slab[page] for pages in lists for page in pages)

    @invariant()
    def pages_are_accounted_for(self) -> None:
        self.pool.check(*self.held())
        pages, beside = ({page for one in lists for page in one} for lists in self.held())
        assert self.pool.num_free == self.NUM_PAGES - len(pages)
        assert self.windows.num_free == self.NUM_WINDOWS - len(beside - {0})


class NarrowMachine(BothMachine):
    """A window within a page, and fewer pages for it."""

    NUM_WINDOWS, WINDOW = 5, 20


BothMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
NarrowMachine.TestCase.settings = BothMachine.TestCase.settings
TestBothMachine = BothMachine.TestCase
TestNarrowMachine = NarrowMachine.TestCase
