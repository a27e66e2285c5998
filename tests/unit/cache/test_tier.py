"""Pages go to RAM and come back with the same bits, whatever order a device runs its two queues in.

On the simulated device of ``tests/model/test_device_stream.py`` queued work runs late and at random, so a copy that
does not wait for the arithmetic before it, or arithmetic that does not wait for its copy, sees other bytes.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from exl.batch import PAGE_SIZE
from exl.cache.file import load_prefixes, save_prefixes
from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.cache.tier import RamTier, ram_tier
from tests.model.test_device_stream import Device

from .slabs import LAYOUTS, SMALL, filled, page_bytes

NUM_PAGES, NUM_SLOTS = 6, 3


def page_content(ids: tuple[int, ...], page_idx: int, num_bytes: int) -> torch.Tensor:
    """What a cold run would write to a page of a text: it depends on all tokens up to its end."""
    seed = abs(hash(ids[: (page_idx + 1) * PAGE_SIZE])) % 2**32
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8))


class TierMachine(RuleBasedStateMachine):
    """Prompts of whole pages take what is known, compute the rest, and look at all of it. The model is a function of
    the text."""

    @initialize(seed=st.integers(0, 1 << 30))
    def start(self, seed: int) -> None:
        self.device = Device(seed)
        self.kv = KVCache(SMALL, NUM_PAGES, torch.device("cpu"))
        memory = torch.zeros(NUM_SLOTS * self.kv.page_bytes, dtype=torch.uint8)
        self.tier = RamTier(self.kv, memory, self.device)
        self.pool = PagePool(NUM_PAGES, tier=self.tier)
        self.wrong: list[str] = []
        self.live: list[tuple[tuple[int, ...], list[int]]] = []

    def arithmetic(self, ids: tuple[int, ...], pages: list[int], num_reused: int) -> None:
        """Writes new pages and reads all."""
        num_bytes = self.kv.page_bytes

        def run() -> None:
            for i, page in enumerate(pages):
                content = page_content(ids, i, num_bytes)
                if i * PAGE_SIZE >= num_reused:
                    self.kv.write_page(page, content)
                found = torch.zeros(num_bytes, dtype=torch.uint8)
                self.kv.read_page(page, found)
                if not torch.equal(found, content):
                    self.wrong.append(f"page {page}, {i} of {ids[::PAGE_SIZE]}")

        self.device.arithmetic(run)

    @rule(first=st.integers(0, 2), others=st.lists(st.integers(0, 1), max_size=3), stays=st.booleans())
    def prompt(self, first: int, others: list[int], stays: bool) -> None:
        ids = tuple(token for token in (first, *others) for _ in range(PAGE_SIZE))
        if len(ids) // PAGE_SIZE > self.pool.num_free:
            self.live and self.end()
            return
        taken = self.pool.take_prefix(ids, self.copy, num_pages=len(ids) // PAGE_SIZE, multiple=PAGE_SIZE)
        self.arithmetic(ids, taken.pages, taken.num_reused)
        self.pool.remember(ids, taken.pages)
        if stays:
            self.live.append((ids, taken.pages))
        else:
            self.pool.release(taken.pages)

    def copy(self, src, dst) -> None:
        raise AssertionError("whole pages are never copied")

    @rule()
    def end(self) -> None:
        if self.live:
            self.pool.release(self.live.pop(0)[1])

    @rule()
    def look_at_the_host(self) -> None:
        for known in self.pool.known_pages():
            if known.slot >= 0:
                out = torch.zeros(self.kv.page_bytes, dtype=torch.uint8)
                self.tier.read(known.slot, out)
                ids: tuple[int, ...] = ()
                place = known
                while True:
                    ids = place.tokens + ids
                    if place.parent < 0:
                        break
                    place = self.pool.known_pages()[place.parent]
                assert torch.equal(out, page_content(ids, len(ids) // PAGE_SIZE - 1, len(out)))

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([pages for _, pages in self.live])
            assert self.wrong == []

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for ids, pages in self.live:
                self.arithmetic(ids, pages, len(ids))
            self.device.finish()
            assert self.wrong == []


TierMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)
TestTierMachine = TierMachine.TestCase


def no_fence() -> None:
    pass


def text(seed: int, num_pages: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, num_pages * PAGE_SIZE).tolist()


def store(pool: PagePool, ids: list[int]) -> list[int]:
    taken = pool.take_prefix(ids, None, num_pages=len(ids) // PAGE_SIZE)
    pool.remember(ids, taken.pages)
    pool.release(taken.pages)
    return taken.pages


@pytest.mark.parametrize("layout", LAYOUTS[1::3])
def test_a_page_comes_back_from_ram(layout):
    """Also a part of it, for a text that goes on otherwise."""
    kv = filled(layout, 4)
    with ExitStack() as stack:
        fences: list[int] = []
        tier = ram_tier(kv, 3 * kv.page_bytes + 100, lambda: fences.append(1), stack)
        assert tier is not None
        assert tier.num_slots == 3
        pool = PagePool(4, tier=tier)
        ids = text(0, 3)
        pages = store(pool, ids)
        before = [page_bytes(kv, page) for page in pages]
        pool.release(pool.allocate(4))
        assert len(fences) == 1  # the next kernel writes to a page that is being copied
        kv.slab.zero_()
        assert (pool.find(ids).num_tokens, pool.num_kept) == (192, 0)
        pool.allocate(1)
        part = pool.take_prefix([*ids[:100], 9999], None, num_pages=2)
        assert part.num_reused == 100
        for page, expected in zip(part.pages, before, strict=False):
            assert all(map(np.array_equal, page_bytes(kv, page), expected))
        assert pool.stats.pages_restored == 2
        assert len(fences) == 2
        pool.check()
        pool.release(part.pages)
        taken = pool.take_prefix(ids, None)
        assert taken.num_reused == 192
        for page, expected in zip(taken.pages, before, strict=True):
            assert all(map(np.array_equal, page_bytes(kv, page), expected))
        pool.check()


def test_least_recently_used_pages_leave_ram_first():
    kv = filled(SMALL, 2)
    with ExitStack() as stack:
        pool = PagePool(2, tier=ram_tier(kv, 3 * kv.page_bytes, no_fence, stack))
        first, second, third = text(1, 2), text(2, 2), text(3, 2)
        for ids in (first, second):
            store(pool, ids)
        assert [pool.find(ids).num_tokens for ids in (first, second)] == [128, 128]
        store(pool, third)
        assert [pool.find(ids).num_tokens for ids in (first, second, third)] == [64, 128, 128]
        assert store(pool, second) == [0, 1]  # until they have come their slots are nobody else's: one is left
        assert [pool.find(ids).num_tokens for ids in (first, second, third)] == [0, 128, 64]
        assert (pool.stats.evictions, pool.stats.pages_restored) == (6, 2)
        pool.check([])


def test_a_page_whose_beginning_loses_its_slot_needs_none():
    """A sequence with a window has given its first page back; that one is in the only slot when the next is evicted."""
    kv = filled(SMALL, 4)
    with ExitStack() as stack:
        pool = PagePool(4, null=True, tier=ram_tier(kv, kv.page_bytes, no_fence, stack))
        ids = text(1, 2)
        pages = pool.allocate(2)
        pool.remember(ids, pages)
        pool.release(pages[:1])
        others = pool.allocate(2)
        assert pool.find(ids).num_tokens == 128
        pool.release([0, pages[1]])
        pool.check([others])
        others += pool.allocate(1)
        pool.check([others])
        assert pool.find(ids).num_tokens == 0


def test_memory_for_less_than_a_page_is_no_tier():
    kv = filled(SMALL, 2)
    with ExitStack() as stack:
        assert ram_tier(kv, kv.page_bytes - 1, no_fence, stack) is None


def test_pages_in_ram_are_saved_too(tmp_path):
    kv = filled(SMALL, 4)
    with ExitStack() as stack:
        pool = PagePool(4, tier=ram_tier(kv, 4 * kv.page_bytes, no_fence, stack))
        first, second = text(1, 3), text(2, 3)
        pages = store(pool, first)
        before = [page_bytes(kv, page) for page in pages]
        store(pool, second)
        assert save_prefixes(tmp_path / "saved", pool, kv, {}) == 384
        other, other_kv = PagePool(6), filled(SMALL, 6, seed=3)
        assert load_prefixes(tmp_path / "saved", other, other_kv, {}) == 384
        for page, expected in zip(other.find(first).pages, before, strict=True):
            assert all(map(np.array_equal, page_bytes(other_kv, page), expected))
        # And into a pool that has them in RAM: the file's take their place.
        assert load_prefixes(tmp_path / "saved", pool, kv, {}) >= 192
        pool.check([])


def test_a_tier_that_fails_is_believed_to_hold_nothing():
    class Broken(RamTier):
        def save(self, pages, slots) -> None:
            raise RuntimeError("CUDA error")

    kv = filled(SMALL, 3)
    pool = PagePool(3, tier=Broken(kv, torch.zeros(3 * kv.page_bytes, dtype=torch.uint8), Device(0)))
    ids = text(1, 3)
    store(pool, ids)
    with pytest.raises(RuntimeError, match="CUDA error"):
        pool.allocate(2)
    pool.check([])
    assert pool.find(ids).num_tokens == 64
