"""Pages are reference-counted, found by their tokens, evicted least recently used first, never written by two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exl.batch import PAGE_SIZE
from exl.cache.page_pool import PagePool
from exl.errors import MemoryBudgetError


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


def store(pool: PagePool, ids: list[int]) -> list[int]:
    """Caches a sequence and releases its pages; returns them."""
    pages = pool.allocate(-(-len(ids) // PAGE_SIZE))
    pool.remember(ids, pages)
    pool.release(pages)
    return pages


def test_runs_of_neighbours_come_first():
    pool = PagePool(10)
    first, second, third = pool.allocate(2), pool.allocate(3), pool.allocate(1)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5])
    pool.release(first)
    pool.release(third)
    assert pool.allocate(3) == [5, 6, 7]  # 0 and 1 are not a run of three
    assert pool.allocate(3) == [0, 1, 8]  # no run is left: any free pages


def test_too_many_pages_is_a_memory_error_and_changes_nothing():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(MemoryBudgetError, match="2 pages of 64 tokens requested, 1 of 4 available"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_whole_prefix_is_shared_not_copied():
    pool = PagePool(8)
    ids = text(200)
    pages = store(pool, ids)
    match = pool.find(ids[:128] + text(50, seed=1))
    assert (match.pages, match.num_tokens, match.copy_from) == (tuple(pages[:2]), 128, None)
    again = pool.find(ids[:128] + text(50, seed=2))
    assert again.pages == match.pages
    pool.release(match.pages)
    assert pool.num_free == 6  # still in use by the second
    pool.release(again.pages)
    assert pool.num_free == 8


def test_a_partly_filled_page_that_nobody_has_is_written_on():
    pool = PagePool(4)
    ids = text(100)
    pages = store(pool, ids)
    match = pool.find(ids + text(5, seed=1))
    assert (match.pages, match.num_tokens, match.copy_from) == (tuple(pages), 100, None)
    assert pool.find(ids + text(5, seed=1)).num_tokens == 64  # the page is no longer in the tree


def test_a_partly_filled_page_that_somebody_has_is_copied():
    pool = PagePool(6)
    ids = text(100)
    pages = pool.allocate(2)
    pool.remember(ids, pages)  # still in use
    match = pool.find(ids + text(5, seed=1))
    assert (match.pages, match.num_tokens, match.copy_from) == (tuple(pages[:1]), 100, pages[1])


def test_a_page_that_goes_on_otherwise_is_copied_as_far_as_it_agrees():
    pool = PagePool(6)
    ids = text(100)
    pages = store(pool, ids)
    match = pool.find(ids[:80] + [1001] * 40)
    assert (match.pages, match.num_tokens, match.copy_from) == (tuple(pages[:1]), 80, pages[1])
    whole = pool.find(ids[:30] + [1001] * 90)  # a partial match in a full page
    assert (whole.pages, whole.num_tokens, whole.copy_from) == ((), 30, pages[0])


def test_the_longest_of_several_continuations_wins():
    pool = PagePool(8)
    ids = text(64)
    first = store(pool, ids + [1] * 10)
    match = pool.find(ids + [1] * 4 + [2] * 4)
    pages = [*match.pages, *pool.allocate(1)]
    pool.release([match.copy_from])
    pool.remember(ids + [1] * 4 + [2] * 4, pages)
    pool.release(pages)
    assert pool.find(ids + [1] * 4 + [2] * 2 + [3]).num_tokens == 70
    assert pool.find(ids + [1] * 6 + [3]).num_tokens == 70
    assert first[0] == pages[0]


def test_least_recently_used_text_goes_first_and_its_end_before_its_beginning():
    pool = PagePool(6)
    old, new = text(128, 1), text(128, 2)
    store(pool, old)
    store(pool, new)
    touched = pool.find(old)
    pool.release(touched.pages)  # the first is now more recently used
    pool.release(pool.allocate(3))  # two free pages and one that must be evicted
    assert pool.find(old).num_tokens == 128
    match = pool.find(new)
    assert match.num_tokens == 64


def test_held_pages_are_never_given_away():
    pool = PagePool(4)
    ids = text(128)
    store(pool, ids)
    match = pool.find(ids)
    assert set(pool.allocate(2)).isdisjoint(match.pages)
    with pytest.raises(MemoryBudgetError):
        pool.allocate(1)


def test_the_same_text_computed_twice_is_known_once():
    pool = PagePool(8)
    ids = text(130)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.remember(ids, first)
    pool.remember(ids, second)
    pool.release(first)
    pool.release(second)
    assert pool.num_free == 8
    assert pool.find(ids).pages == tuple(first)
    pool.allocate(5)  # the second's pages are free, no longer evictable


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 1), max_size=300), st.lists(st.integers(0, 1), max_size=300))
def test_find_is_the_common_prefix(known, asked):
    """Against the definition: the longest common prefix of two texts."""
    pool = PagePool(16)
    store(pool, known)
    common = next(
        (i for i, (a, b) in enumerate(zip(known, asked, strict=False)) if a != b), min(len(known), len(asked))
    )
    assert pool.find(asked).num_tokens == common


class PoolMachine(RuleBasedStateMachine):
    """Sequences start, share pages, copy, grow and end. A model of the slab checks that found pages hold the right
    tokens."""

    NUM_PAGES = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES)
        self.slab: dict[int, list[int]] = {page: [-1] * PAGE_SIZE for page in range(self.NUM_PAGES)}
        self.live: list[tuple[list[int], list[int], int]] = []  # token ids, pages, tokens that were shared

    @rule(seed=st.integers(0, 3), length=st.integers(1, 250), cut=st.integers(0, 250), tail=st.integers(0, 2))
    def begin(self, seed: int, length: int, cut: int, tail: int) -> None:
        ids = (text(250, seed)[:cut] + [2000 + tail] * 250)[:length]
        match = self.pool.find(ids)
        for i in range(match.num_tokens):
            page = match.pages[i // PAGE_SIZE] if i // PAGE_SIZE < len(match.pages) else match.copy_from
            assert self.slab[page][i % PAGE_SIZE] == ids[i]
        try:
            fresh = self.pool.allocate(-(-length // PAGE_SIZE) - len(match.pages))
        except MemoryBudgetError:
            self.pool.release(match.pages)
            self.pool.release([match.copy_from] if match.copy_from is not None else [])
            return
        if match.copy_from is not None:
            self.slab[fresh[0]] = list(self.slab[match.copy_from])
            self.pool.release([match.copy_from])
        pages = [*match.pages, *fresh]
        for other_ids, other_pages, _ in self.live:
            assert not set(fresh) & set(other_pages), other_ids
        for i in range(match.num_tokens, length):
            self.slab[pages[i // PAGE_SIZE]][i % PAGE_SIZE] = ids[i]
        self.live.append((ids, pages, match.num_tokens))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), remembered=st.booleans())
    def end(self, which: int, remembered: bool) -> None:
        ids, pages, _ = self.live.pop(which % len(self.live))
        if remembered:
            self.pool.remember(ids, pages)
        self.pool.release(pages)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def remember(self, which: int) -> None:
        ids, pages, _ = self.live[which % len(self.live)]
        self.pool.remember(ids, pages)

    @invariant()
    def texts_of_live_sequences_are_intact(self) -> None:
        for ids, pages, _ in self.live:
            assert [self.slab[pages[i // PAGE_SIZE]][i % PAGE_SIZE] for i in range(len(ids))] == ids

    @invariant()
    def pages_are_accounted_for(self) -> None:
        in_use = {page for _, pages, _ in self.live for page in pages}
        assert self.pool.num_free == self.NUM_PAGES - len(in_use)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestPoolMachine = PoolMachine.TestCase


def test_a_page_to_copy_from_can_be_claimed_by_its_only_holder():
    pool = PagePool(4)
    ids = list(range(4 * PAGE_SIZE))
    pages = pool.allocate(4)
    pool.remember(ids, pages)
    pool.release(pages)
    asked = [*ids[: PAGE_SIZE + 5], 9999]
    match = pool.find(asked)
    assert (match.pages, match.copy_from, match.num_tokens) == ((pages[0],), pages[1], PAGE_SIZE + 5)
    assert pool.num_free == 2
    other = pool.find(asked)
    assert not pool.claim(other.copy_from)
    pool.release([other.copy_from])
    pool.release(other.pages)
    assert pool.claim(match.copy_from)
    assert pool.num_free == 2
    assert pool.find(ids).pages == (pages[0],)  # the claimed page and those after it are in the tree no more
    pool.release([pages[0]])
    assert sorted(pool.allocate(2)) == sorted(pages[2:])
    pool.release([*match.pages, match.copy_from])
