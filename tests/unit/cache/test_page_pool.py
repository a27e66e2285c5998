"""Pages are counted, found by their tokens, evicted least recently used first, never written by two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exl.batch import PAGE_SIZE
from exl.cache.free_pages import FreePages
from exl.cache.page_pool import PagePool, TakenPrefix
from exl.errors import MemoryBudgetError


@functools.cache
def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 1000, count).tolist())


def text(count: int, seed: int = 0) -> list[int]:
    return list(tokens(count, seed))


def pages_of(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def store(pool: PagePool, ids: list[int], num_exact: int | None = None) -> list[int]:
    """Caches a sequence and releases its pages; returns them."""
    pages = pool.allocate(pages_of(len(ids)))
    pool.remember(ids, pages, num_exact)
    pool.release(pages)
    return pages


class Copies(list):
    """Takes the place of ``KVCache.copy_pages`` and notes what is copied."""

    def __call__(self, src: Sequence[int], dst: Sequence[int]) -> None:
        self.extend(zip(src, dst, strict=True))


def take(pool: PagePool, ids: list[int], **options) -> tuple[TakenPrefix, Copies]:
    copies = Copies()
    taken = pool.take_prefix(ids, copies, **options)
    pool.check()
    return taken, copies


# ---- free pages -----------------------------------------------------------------------------------------------------


def test_runs_of_neighbours_come_first():
    pool = PagePool(10)
    first, second, third = pool.allocate(2), pool.allocate(3), pool.allocate(1)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5])
    pool.release(first)
    pool.release(third)
    assert pool.allocate(3) == [5, 6, 7]  # 0 and 1 are not a run of three
    assert pool.allocate(3) == [0, 1, 8]  # no run is left: any free pages


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 40), min_size=1), st.data())
def test_free_pages_against_the_definition(pages, data):
    """Behind ``after`` as long as they are there, then the first run that is long enough, then the lowest."""
    free = FreePages()
    free.add(pages)
    count = data.draw(st.integers(0, len(pages)))
    after = data.draw(st.none() | st.integers(0, 40))
    left, expected = set(pages), []
    while after is not None and len(expected) < count and after + 1 + len(expected) in left:
        expected.append(after + 1 + len(expected))
    left -= set(expected)
    rest = count - len(expected)
    runs = [list(range(i, i + rest)) for i in sorted(left) if left.issuperset(range(i, i + rest))]
    expected += runs[0] if rest and runs else sorted(left)[:rest]
    assert free.take(count, after) == expected
    assert set(free) == pages - set(expected)
    assert len(free) == len(pages) - count


def test_a_growing_sequence_takes_the_page_behind_its_last():
    pool = PagePool(10)
    pages = pool.allocate(2)
    other = pool.allocate(2)
    pool.grow(pages, 1)
    assert pages == [0, 1, 4]
    pool.release(other)
    pool.grow(pages, 2)
    assert pages == [0, 1, 4, 5, 6]
    pool.grow(pages, 4)
    assert pages == [0, 1, 4, 5, 6, 7, 8, 9, 2]
    with pytest.raises(MemoryBudgetError, match="2 pages of 64 tokens requested, 1 of 10 available"):
        pool.grow(pages, 2)
    assert (len(pages), pool.num_free) == (9, 1)
    pool.check([pages])


def test_too_many_pages_is_a_memory_error_and_changes_nothing():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(MemoryBudgetError, match="2 pages of 64 tokens requested, 1 of 4 available"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_pages_are_not_released_twice_nor_held_when_free():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="released once too often"):
        pool.release(pages)
    with pytest.raises(ValueError, match="is free"):
        pool.hold(pages)


def test_the_null_page_is_nobodys():
    pool = PagePool(4, null=True)
    assert (pool.null_page, pool.num_free, PagePool(4).null_page) == (0, 3, None)
    pages = pool.allocate(3)
    assert 0 not in pages
    with pytest.raises(MemoryBudgetError, match="0 of 3 available"):
        pool.allocate(1)
    pool.hold([0])
    pool.release([0, pages[0], 0])
    pool.check([pages[1:]])
    pool.release(pages[1:])
    assert pool.num_free == 3


def test_pages_before_the_window_are_given_back_and_still_found():
    """A sequence of a model with a window has the null page for them; evicting them forgets what follows."""
    pool = PagePool(5, null=True)
    ids = text(200)
    pages = pool.allocate(3)
    pool.remember(ids[:192], pages)
    pool.release(pages[:1])
    pages[0] = pool.null_page
    pool.grow(pages, 1)
    pool.remember(ids, pages)
    pool.check([pages])
    assert pool.find(ids).num_tokens == 200
    assert pool.num_free == 1
    (other,) = pool.allocate(1)
    assert pool.find(ids).num_tokens == 0
    pool.remember(ids, pages)
    pool.check([pages, [other]])
    assert pool.find(ids).num_tokens == 0
    pool.release(pages)
    pool.check([[other]])


def test_the_end_of_a_text_goes_first_even_if_its_beginning_was_given_back_before():
    pool = PagePool(4, null=True)
    ids = text(192)
    pages = pool.allocate(3)
    pool.remember(ids, pages)
    pool.release(pages[:1])
    pool.release([0, *pages[1:]])
    pool.allocate(1)
    assert pool.find(ids).num_tokens == 128


# ---- prefixes -------------------------------------------------------------------------------------------------------


def test_a_whole_prefix_is_shared_not_copied():
    pool = PagePool(8)
    ids = text(200)
    pages = store(pool, ids)
    first, copies = take(pool, ids[:128] + text(50, seed=1))
    assert (first.pages, first.num_reused, copies) == (pages[:2], 128, [])
    again, _ = take(pool, ids[:128] + text(50, seed=2))
    assert again.pages == first.pages
    pool.release(first.pages)
    assert pool.num_free == 6  # still held by the second
    pool.release(again.pages)
    assert pool.num_free == 8


def test_looking_holds_nothing():
    pool = PagePool(4)
    ids = text(100)
    pages = store(pool, ids)
    match = pool.find([*ids, 1001])
    assert (match.pages, match.num_tokens, match.num_exact) == (tuple(pages[:1]), 100, 100)
    assert pool.num_free == 4
    pool.check([])


def test_a_partly_filled_page_that_nobody_has_is_written_on():
    pool = PagePool(4)
    ids = text(100)
    pages = store(pool, ids)
    before = pool.epoch(pages[0]), pool.epoch(pages[1])
    taken, copies = take(pool, ids + text(5, seed=1))
    assert (taken.pages, taken.num_reused, copies) == (pages, 100, [])
    assert pool.find(ids + text(5, seed=1)).num_tokens == 64  # the page is no longer in the tree
    assert pool.epoch(pages[0]) == before[0]
    assert pool.epoch(pages[1]) != before[1]  # whoever had it before must not write to it again


def test_a_partly_filled_page_that_somebody_has_is_copied():
    pool = PagePool(6)
    ids = text(100)
    pages = pool.allocate(2)
    pool.remember(ids, pages)  # still held
    taken, copies = take(pool, ids + text(5, seed=1))
    assert (taken.pages, taken.num_reused, copies) == ([pages[0], 2], 100, [(pages[1], 2)])
    assert pool.num_holders(pages[1]) == 1


def test_a_page_that_goes_on_otherwise_is_copied_as_far_as_it_agrees():
    pool = PagePool(6)
    ids = text(100)
    pages = store(pool, ids)
    taken, copies = take(pool, ids[:80] + [1001] * 40, num_pages=2)
    assert (taken.pages, taken.num_reused, copies) == ([pages[0], 2], 80, [(pages[1], 2)])
    whole, copies = take(pool, ids[:30] + [1001] * 90, num_pages=2)  # a partial match in a full page
    assert (whole.pages, whole.num_reused, copies) == ([3, 4], 30, [(pages[0], 3)])


def test_the_longest_of_several_continuations_wins():
    pool = PagePool(8)
    ids = text(64)
    first = store(pool, ids + [1] * 10)
    other = ids + [1] * 4 + [2] * 4
    taken, _ = take(pool, other)
    pool.remember(other, taken.pages)
    pool.release(taken.pages)
    assert pool.find(ids + [1] * 4 + [2] * 2 + [3]).num_tokens == 70
    assert pool.find(ids + [1] * 6 + [3]).num_tokens == 70
    assert first[0] == taken.pages[0]


def test_of_several_that_agree_as_far_the_one_that_needs_no_copy_is_taken():
    pool = PagePool(8)
    ids = text(64)
    first = pool.allocate(2)
    pool.remember([*ids, 1, 1], first)
    store(pool, [*ids, 1, 1, 0])
    pool.release(first)
    taken, copies = take(pool, [*ids, 1, 1, 2])
    assert (taken.num_reused, taken.pages[1], copies) == (66, first[1], [])


def test_the_page_to_copy_from_is_taken_if_it_is_the_one_that_lacks():
    pool = PagePool(4)
    ids = text(256)
    pages = store(pool, ids)
    asked = [*ids[: PAGE_SIZE + 5], 9999]
    other, _ = take(pool, asked)  # holds the first page, and a copy of the second in place of the last
    assert other.pages == [pages[0], pages[3]]
    taken, copies = take(pool, asked, num_pages=3)
    assert (taken.pages, copies) == ([pages[0], pages[1], pages[2]], [])
    assert taken.num_reused == PAGE_SIZE + 5
    assert pool.find(ids).num_tokens == PAGE_SIZE  # the page is in the tree no more, nor those after it
    pool.check([other.pages, taken.pages])


def test_the_page_is_taken_too_if_a_copy_would_be_one_that_is_to_be_spared():
    pool = PagePool(3)
    pages = store(pool, text(192))
    taken, copies = take(pool, [*text(192)[:70], 9999], num_pages=2, spare=1)
    assert (taken.pages, taken.num_reused, copies) == (pages[:2], 70, [])
    assert pool.num_free == 1


def test_a_page_that_others_hold_is_left_to_them_if_there_is_none_to_copy_it_to():
    pool = PagePool(3)
    ids = text(192)
    pages = pool.allocate(3)
    pool.remember(ids, pages)
    taken, copies = take(pool, [*ids[:70], 9999])
    assert (taken.pages, taken.num_reused, copies) == (pages[:1], 64, [])


def test_what_does_not_fit_changes_nothing():
    pool = PagePool(6)
    ids = text(100)
    pages = store(pool, ids)
    other = pool.allocate(2)
    for options in ({"num_pages": 5}, {"num_pages": 4, "spare": 1}):
        copies = Copies()
        with pytest.raises(MemoryBudgetError):
            pool.take_prefix([*ids[:80], 9999], copies, **options)
        pool.check([other])
        assert (pool.num_free, copies, pool.find(ids).num_tokens, pool.stats.lookups) == (4, [], 100, 0)
    taken, _ = take(pool, ids, num_pages=4)
    assert taken.pages[:2] == pages
    assert len(taken.pages) == 4
    assert pool.num_free == 0


def test_an_interrupted_copy_gives_everything_back():
    pool = PagePool(6)
    ids = text(100)
    store(pool, ids)

    def interrupted(src: Sequence[int], dst: Sequence[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.take_prefix(ids[:80], interrupted)
    held = pool.allocate(2)
    with pytest.raises(KeyboardInterrupt):
        pool.fork(held, 100, interrupted)
    pool.check([held])
    assert pool.find(ids).num_tokens == 100


def test_least_recently_used_text_goes_first_and_its_end_before_its_beginning():
    pool = PagePool(6)
    old, new = text(128, 1), text(128, 2)
    store(pool, old)
    store(pool, new)
    touched, _ = take(pool, old)
    pool.release(touched.pages)  # the first is now more recently used
    pool.release(pool.allocate(3))  # two free pages and one that must be evicted
    assert pool.find(old).num_tokens == 128
    assert pool.find(new).num_tokens == 64
    assert pool.stats.evictions == 1


def test_held_pages_are_never_given_away():
    pool = PagePool(4)
    ids = text(128)
    store(pool, ids)
    taken, _ = take(pool, ids)
    assert set(pool.allocate(2)).isdisjoint(taken.pages)
    with pytest.raises(MemoryBudgetError):
        pool.allocate(1)


def test_the_same_text_computed_twice_is_known_once_and_so_is_what_follows():
    pool = PagePool(8)
    ids = text(130)
    first, second = pool.allocate(3), pool.allocate(4)
    pool.remember(ids, first)
    pool.remember(ids + text(100, 5), second)
    assert pool.find(ids).pages == tuple(first[:2])
    assert pool.find(ids + text(100, 5)).num_tokens == 230
    pool.check([first, second])
    pool.release(first)
    pool.release(second)
    pool.check([])
    assert pool.num_free == 8
    pool.allocate(4)  # one was free, the second's two of the common beginning are: one is evicted
    assert pool.stats.evictions == 1


def test_a_sequence_is_remembered_again_after_it_has_grown():
    pool = PagePool(8)
    ids = text(300)
    pages = pool.allocate(2)
    for length in (100, 128, 129, 200, 300):
        pool.grow(pages, pages_of(length) - len(pages))
        pool.remember(ids[:length], pages)
        pool.check([pages])
        assert pool.find(ids).num_tokens == length
    pool.release(pages)
    pool.release(pool.allocate(8))
    pool.check([])
    assert pool.find(ids).num_tokens == 0


def test_remembering_again_reads_only_what_is_new():
    class Ids(list):
        num_read = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            self.num_read += len(found) if isinstance(key, slice) else 1
            return found

    pool = PagePool(1000)
    ids = Ids(text(640 * PAGE_SIZE))
    pages = pool.allocate(640)
    pool.remember(ids, pages)
    ids.extend(text(10, 3))
    pool.grow(pages, 1)
    ids.num_read = 0
    pool.remember(ids, pages)
    assert ids.num_read <= 3 * PAGE_SIZE
    assert pool.find(ids).num_tokens == len(ids)


def test_a_page_that_was_written_anew_is_not_found_by_its_old_text():
    pool = PagePool(4)
    ids, other = text(128), text(64) + text(64, 7)
    pages = pool.allocate(2)
    pool.remember(ids, pages)
    pool.remember(other, pages)
    assert pool.find(ids).num_tokens == 64 + common(ids[64:], other[64:])
    assert pool.find(other).num_tokens == 128
    pool.check([pages])


# ---- exact prefixes -------------------------------------------------------------------------------------------------


def test_exact_prefixes_end_where_a_cold_run_would_have_other_bits():
    pool = PagePool(8)
    ids = text(300)
    store(pool, ids, num_exact=200)
    assert pool.find(ids).num_tokens == 300
    assert pool.find(ids).num_exact == 200
    for multiple, expected in ((1, 200), (64, 192), (128, 128), (100, 200), (90, 180), (512, 0)):
        assert pool.find(ids, exact=True, multiple=multiple).num_tokens == expected
    assert pool.find(ids, multiple=128).num_tokens == 256
    taken, copies = take(pool, ids, exact=True, multiple=90)
    assert (taken.num_reused, taken.num_exact, len(taken.pages), len(copies)) == (180, 180, 3, 1)


def test_an_exact_page_takes_the_place_of_one_that_is_not():
    pool = PagePool(8)
    ids = text(128)
    first = store(pool, ids, num_exact=64)
    again = pool.allocate(2)
    pool.remember(ids, again)
    pool.check([again])
    assert pool.find(ids, exact=True).num_tokens == 128
    pool.release(again)
    third = store(pool, ids, num_exact=0)
    assert pool.find(ids, exact=True).pages == tuple(again)
    assert set(third) & set(first)  # theirs was free again
    pool.check([])


def test_what_follows_a_page_that_is_not_exact_is_not_exact():
    pool = PagePool(8)
    ids = text(192)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.remember(ids[:64], first, num_exact=10)  # held: it stays in its place
    pool.remember(ids, second)
    pool.check([first, second])
    assert pool.find(ids, exact=True).num_tokens == 10
    pool.remember(ids[:64], first, num_exact=64)
    assert pool.find(ids, exact=True).num_tokens == 64
    pool.check([first, second])


def test_pages_can_turn_out_to_be_exact_later():
    pool = PagePool(8)
    ids = text(300)
    pages = pool.allocate(5)
    pool.remember(ids, pages, num_exact=0)
    pool.remember(ids, pages, num_exact=150)
    assert pool.find(ids, exact=True).num_tokens == 150
    pool.check([pages])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(1, 300), st.booleans()), max_size=8))
def test_find_is_the_longest_common_prefix(steps):
    """Against the definition, over sequences that run one after another in a pool that is large enough."""
    pool = PagePool(64)
    known: list[tuple[list[int], int]] = []
    for tail, cut, length, exact in steps:
        ids = (text(300)[:cut] + [2000 + tail] * 300)[:length]
        longest = max((common(ids, other) for other, _ in known), default=0)
        exactly = max((min(common(ids, other), n) // PAGE_SIZE * PAGE_SIZE for other, n in known), default=0)
        assert pool.find(ids).num_tokens == longest
        assert pool.find(ids, exact=True, multiple=PAGE_SIZE).num_tokens == exactly
        taken, _ = take(pool, ids, num_pages=pages_of(length), exact=exact, multiple=PAGE_SIZE if exact else 1)
        assert taken.num_reused == (exactly if exact else longest)
        num_exact = length if exact or not taken.num_reused else taken.num_exact
        pool.remember(ids, taken.pages, num_exact)
        pool.release(taken.pages)
        pool.check([])
        known.append((ids, num_exact))
    assert pool.stats.evictions == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans()), max_size=25))
def test_eviction_against_a_list_of_pages(steps):
    """Texts without common beginnings, of which whole pages are used: the pages in order of their last use, where a
    text's end counts as used before its beginning; what is evicted is the first of the list."""
    pool, texts = PagePool(8), {i: [i] * 6 * PAGE_SIZE for i in range(5)}
    kept: list[tuple[int, int]] = []  # (text, page), least recently used first
    for which, count, remembered in steps:
        ids = texts[which][: count * PAGE_SIZE]
        used = [(which, i) for i in range(count)]
        known = [page for page in used if page in kept]
        others = [page for page in kept if page not in known]
        evicted = max(len(others) + count - 8, 0)
        taken, _ = take(pool, ids, num_pages=count)
        assert taken.num_reused == len(known) * PAGE_SIZE
        if remembered:
            pool.remember(ids, taken.pages)
        pool.release(taken.pages)
        kept = others[evicted:] + (used if remembered else known)[::-1]
        pool.check([])
        for i, ids in texts.items():
            assert pool.find(ids).num_tokens == sum(text == i for text, _ in kept) * PAGE_SIZE


# ---- pausing, forking, poison ---------------------------------------------------------------------------------------


def test_a_paused_sequence_takes_back_what_nobody_has_written_to():
    pool = PagePool(6)
    pages = pool.allocate(4)
    pool.remember(text(128), pages[:2])
    old = [(page, pool.epoch(page)) for page in pages]
    pool.release(pages)
    other = pool.allocate(3)
    assert set(other) & set(pages) == set(pages[2:])
    assert pool.reclaim(old) == pages[:2]
    pool.check([pages[:2], other])


def test_a_page_that_another_went_on_with_is_not_taken_back():
    pool = PagePool(4)
    ids = text(100)
    pages = pool.allocate(2)
    pool.remember(ids, pages)
    old = [(page, pool.epoch(page)) for page in pages]
    pool.release(pages)
    taken, _ = take(pool, [*ids, 5])
    assert taken.pages == pages
    assert pool.reclaim(old) == pages[:1]
    pool.check([taken.pages, pages[:1]])


def test_a_fork_shares_full_pages_and_copies_the_last():
    pool = PagePool(6)
    pages = pool.allocate(3)
    copies = Copies()
    forked = pool.fork(pages, 150, copies)
    assert (forked, copies) == ([*pages[:2], 3], [(pages[2], 3)])
    assert pool.fork(pages, 128, copies) == pages[:2]
    assert [pool.num_holders(page) for page in pages] == [3, 3, 1]
    pool.allocate(2)
    with pytest.raises(MemoryBudgetError):
        pool.fork(pages, 150, copies)
    assert [pool.num_holders(page) for page in pages] == [3, 3, 1]


def test_poisoned_pages_are_zeroed_before_they_are_free():
    pool = PagePool(4)
    ids = text(192)
    pages = pool.allocate(3)
    pool.remember(ids, pages)
    other, _ = take(pool, ids[:64])
    pool.poison(pages)
    pool.remember(ids, pages)
    assert pool.find(ids).num_tokens == 64  # the first page has another holder: it was good
    old = [(page, pool.epoch(page)) for page in pages]
    pool.release(pages)
    assert pool.num_free == 1
    assert pool.reclaim(old) == pages[:1]
    pool.release(pages[:1])
    pool.check([other.pages])
    zeroed: list[list[int]] = []
    pool.clean(zeroed.append)
    pool.clean(zeroed.append)
    assert zeroed == [pages[1:]]
    assert pool.num_free == 3
    assert pool.reclaim(old) == pages[:1]
    pool.check([other.pages, pages[:1]])


def test_counts_and_clearing():
    pool = PagePool(8)
    ids = text(100)
    store(pool, ids)
    pages = take(pool, [*ids, 1])[0].pages
    take(pool, text(10, 4), num_pages=1)
    take(pool, [], num_pages=1)
    assert (pool.stats.lookups, pool.stats.hits, pool.stats.tokens_reused) == (2, 1, 100)
    pool.release([pages[0]])  # as if a release had been interrupted
    with pytest.raises(RuntimeError, match="counts 0 holders, 1 have it"):
        pool.check([pages])
    pool.clear([pages])
    pool.check([pages])
    assert (pool.num_free, pool.num_kept, pool.find(ids).num_tokens) == (6, 0, 0)
    pool.release(pages)
    pool.check([])


def test_lost_and_doubled_pages_are_noticed():
    pool = PagePool(3)
    pool._free.take(1)
    with pytest.raises(RuntimeError, match="page 0 is lost"):
        pool.check()
    pool = PagePool(3)
    pool._holders[1] = 1
    with pytest.raises(RuntimeError, match="page 1 is free and held"):
        pool.check()


# ---- all of it ------------------------------------------------------------------------------------------------------


@dataclass
class Live:
    ids: list[int]
    pages: list[int]
    num_exact: int

    @property
    def first(self) -> int:
        """The first token whose page no window has passed: the null page is 0."""
        return self.pages.count(0) * PAGE_SIZE


# Texts that often have a beginning in common: seed, where it goes on otherwise, tokens; exact, multiple, spare.
ASKED = st.tuples(
    *(st.integers(0, 1), st.sampled_from([40, 64, 100, 128, 192, 250]), st.sampled_from([64, 90, 128, 150, 192, 250])),
    *(st.booleans(), st.sampled_from([1, 64, 96]), st.sampled_from([0, 0, 1, 2])),
)


class PoolMachine(RuleBasedStateMachine):
    """Sequences begin, share pages, grow, fork, pause, come back and end. A model of the slab says whether pages hold
    the right tokens, and whether each was computed as in a cold run."""

    NUM_PAGES = 8
    TIER_SLOTS = 0

    def __init__(self) -> None:
        super().__init__()
        self.slab = {page: [(-1, False)] * PAGE_SIZE for page in range(self.NUM_PAGES)}
        self.slots: dict[int, list[tuple[int, bool]]] = {}
        self.live: list[Live] = []
        self.paused: list[tuple[list[int], int, list[tuple[int, int]]]] = []
        self.pool = PagePool(self.NUM_PAGES, null=True, tier=self if self.TIER_SLOTS else None)

    @property
    def num_slots(self) -> int:
        return self.TIER_SLOTS

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        for page, slot in zip(pages, slots, strict=True):
            self.slots[slot] = list(self.slab[page])

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        for slot, page in zip(slots, pages, strict=True):
            self.slab[page] = list(self.slots[slot])

    def copy(self, src: Sequence[int], dst: Sequence[int]) -> None:
        for one, other in zip(src, dst, strict=True):
            assert self.pool.num_holders(other) == 1
            self.slab[other] = list(self.slab[one])

    def write(self, sequence: Live, start: int) -> None:
        for i in range(start, len(sequence.ids)):
            page = sequence.pages[i // PAGE_SIZE]
            assert self.pool.num_holders(page) == 1
            self.slab[page][i % PAGE_SIZE] = (sequence.ids[i], sequence.num_exact > i)

    def held(self) -> list[list[int]]:
        return [sequence.pages for sequence in self.live]

    def pick(self, which: int) -> Live:
        return self.live[which % len(self.live)]

    @rule(asked=ASKED, window=st.sampled_from([None, None, 1, 64, 70, 130]))
    def begin(self, asked: tuple[int, int, int, bool, int, int], window: int | None = None) -> None:
        seed, cut, length, exact, multiple, spare = asked
        ids = (text(250, seed)[:cut] + [2000] * 250)[:length]
        match = self.pool.find(ids, exact=exact, multiple=multiple)
        before = self.pool.num_free
        try:
            taken = self.pool.take_prefix(
                ids, self.copy, num_pages=pages_of(length), spare=spare, exact=exact, multiple=multiple,
                window=window, most=self.NUM_PAGES,
            )  # fmt: skip
        except MemoryBudgetError:
            assert window is None or pages_of(length) + spare > self.pool.num_free  # not for what it does not see
            assert self.pool.num_free == before
            assert self.pool.find(ids, exact=exact, multiple=multiple) == match
            return
        assert self.pool.num_free >= spare
        assert taken.num_reused <= match.num_tokens < taken.num_reused + PAGE_SIZE
        assert not exact or taken.num_exact == taken.num_reused
        passed = taken.num_passed * PAGE_SIZE
        assert taken.pages.count(0) == taken.num_passed
        assert set(taken.pages[: taken.num_passed]) <= {0}
        if window is not None:
            assert taken.num_reused + 1 - window - 2 * PAGE_SIZE < passed <= max(0, taken.num_reused + 1 - window)
        for i in range(passed, taken.num_reused):
            token, is_exact = self.slab[taken.pages[i // PAGE_SIZE]][i % PAGE_SIZE]
            assert token == ids[i]
            assert is_exact or i >= taken.num_exact
        num_exact = length if exact or not taken.num_reused else taken.num_exact
        self.live.append(Live(ids, taken.pages, num_exact))
        self.write(self.live[-1], taken.num_reused)

    @rule(prompts=st.lists(ASKED, min_size=2, max_size=6), inexact=st.booleans())
    def answer(self, prompts: list[tuple[int, int, int, bool, int, int]], inexact: bool) -> None:
        """One after another, each remembered."""
        for asked in prompts:
            num_live = len(self.live)
            self.begin(asked)
            if len(self.live) > num_live:
                if inexact:
                    self.live[-1].num_exact = min(self.live[-1].num_exact, 70)
                self.end(num_live, remembered=True, paused=False)
            self.pages_are_accounted_for()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), count=st.integers(1, 70), token=st.integers(0, 1))
    def grow(self, which: int, count: int, token: int) -> None:
        sequence, length = self.pick(which), len(self.pick(which).ids)
        try:
            self.pool.grow(sequence.pages, pages_of(length + count) - len(sequence.pages))
        except MemoryBudgetError:
            return
        if sequence.num_exact == length:
            sequence.num_exact += count
        sequence.ids = sequence.ids + [3000 + token] * count
        if all(self.pool.num_holders(page) == 1 for page in sequence.pages[length // PAGE_SIZE :]):
            self.write(sequence, length)
        else:
            raise AssertionError("a page that is to be written has two holders")

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), count=st.integers(1, 3))
    def pass_by(self, which: int, count: int) -> None:
        """Of whole pages alone, the first ones."""
        sequence = self.pick(which)
        self.pool.remember(sequence.ids, sequence.pages, sequence.num_exact)
        first = sequence.first // PAGE_SIZE
        self.pool.pass_by(sequence.pages, first, max(first, min(first + count, len(sequence.ids) // PAGE_SIZE)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def remember(self, which: int) -> None:
        sequence = self.pick(which)
        self.pool.remember(sequence.ids, sequence.pages, sequence.num_exact)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), remembered=st.booleans(), paused=st.booleans())
    def end(self, which: int, remembered: bool, paused: bool) -> None:
        sequence = self.live.pop(which % len(self.live))
        if remembered:
            self.pool.remember(sequence.ids, sequence.pages, sequence.num_exact)
        if paused:
            old = [(page, self.pool.epoch(page)) for page in sequence.pages]
            self.paused.append((sequence.ids, sequence.num_exact, old))
        self.pool.release(sequence.pages)

    @precondition(lambda self: self.paused)
    @rule(which=st.integers(0, 100))
    def resume(self, which: int) -> None:
        ids, num_exact, old = self.paused.pop(which % len(self.paused))
        pages = self.pool.reclaim(old)
        for i in range(pages.count(0) * PAGE_SIZE, min(len(pages) * PAGE_SIZE, len(ids))):
            assert self.slab[pages[i // PAGE_SIZE]][i % PAGE_SIZE][0] == ids[i]
        length = min(len(pages) * PAGE_SIZE, len(ids))
        self.live.append(Live(ids[:length], pages, min(num_exact, length)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), cut=st.integers(0, 250))
    def fork(self, which: int, cut: int) -> None:
        sequence = self.pick(which)
        length = max(min(cut, len(sequence.ids)), sequence.first)
        try:
            pages = self.pool.fork(sequence.pages, length, self.copy)
        except MemoryBudgetError:
            return
        self.live.append(Live(sequence.ids[:length], pages, min(sequence.num_exact, length)))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def fail(self, which: int) -> None:
        sequence = self.live.pop(which % len(self.live))
        self.pool.poison(sequence.pages)
        for page in sequence.pages:
            if page and self.pool.num_holders(page) == 1:
                self.slab[page] = [(-9, False)] * PAGE_SIZE
        self.pool.release(sequence.pages)
        self.pool.check(self.held())

        def zero(pages: list[int]) -> None:
            for page in pages:
                self.slab[page] = [(0, False)] * PAGE_SIZE

        self.pool.clean(zero)

    @precondition(lambda self: self.paused)
    @rule()
    def forget(self) -> None:
        self.pool.clear(self.held())
        self.paused.clear()

    @invariant()
    def texts_of_live_sequences_are_intact(self) -> None:
        for sequence in self.live:
            for i in range(sequence.first, len(sequence.ids)):
                found, is_exact = self.slab[sequence.pages[i // PAGE_SIZE]][i % PAGE_SIZE]
                assert found == sequence.ids[i]
                assert is_exact or i >= sequence.num_exact

    @invariant()
    def no_owner_gets_what_is_not_a_number(self) -> None:
        assert not any((-9, False) in self.slab[page] for pages in self.held() for page in pages)

    @invariant()
    def pages_are_accounted_for(self) -> None:
        self.pool.check(self.held())
        in_use = {page for pages in self.held() for page in pages if page}
        assert self.pool.num_free == self.NUM_PAGES - 1 - len(in_use)


class TierMachine(PoolMachine):
    """The same with a tier for pages that are evicted."""

    TIER_SLOTS = 3


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
TierMachine.TestCase.settings = PoolMachine.TestCase.settings
TestPoolMachine = PoolMachine.TestCase
TestTierMachine = TierMachine.TestCase


def test_pages_that_nobody_has_seen_numbers_of_are_zeroed_for_who_writes_to_them():
    """Not for a text that begins alike, which gets whole pages of it; until somebody has seen that they are numbers."""
    zeroed = []
    pool = PagePool(3, zero=zeroed.extend)
    ids, pages = list(range(100)), pool.allocate(2)
    pool.doubt(pages)
    pool.remember(ids, pages)
    pool.release(pages)
    taken = pool.take_prefix(ids, no_copy, num_pages=2)
    assert (taken.pages[0], taken.num_reused, zeroed) == (pages[0], PAGE_SIZE, [])  # of the second page nothing
    pool.release(taken.pages)
    pool.trust(taken.pages[:1])
    others = pool.allocate(3)
    assert zeroed == [pages[1]]
    pool.release(others)
    pool.allocate(3)
    assert zeroed == [pages[1]]


def no_copy(src, dst):
    raise AssertionError("nothing is to be copied")
