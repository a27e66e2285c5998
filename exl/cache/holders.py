"""Which sequence holds which page of one slab of the cache. Host only.

A page is *held* by one or more sequences (counted), *kept* (nobody holds it, but what is on it is known and may be used
again), *dirty* (its bytes must be zeroed before somebody else has it) or *free*. If free pages run out, kept pages are
evicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from exl.batch import PAGE_SIZE
from exl.cache.free_pages import FreePages
from exl.cache.prefix_tree import PrefixNode
from exl.errors import MemoryBudgetError

CopyPages = Callable[[Sequence[int], Sequence[int]], None]  # (src, dst), as ``KVCache.copy_pages``


class Known(Protocol):
    """Of which pages of the slab it is known what is on them."""

    kept: OrderedDict[int, None]  # pages without holders, least recently used first

    @property
    def on_page(self) -> Mapping[int, PrefixNode]: ...

    def forget(self, node: PrefixNode, /) -> None:
        """What is known of the node's page in this slab; a page that nobody holds is free then."""


class PageHolders(ABC):
    """Holders of pages, and free pages."""

    def __init__(self, num_pages: int, *, null: bool, zero: Callable[[list[int]], None] | None) -> None:
        """``null``: page 0 is never given away and stays zeroed; it stands in tables of pages for pages that a sequence
        has given back because no window reaches them. It may be held and released, which does nothing. ``zero`` is
        called with pages that may hold what is no number (``doubt``), before somebody gets them to write to; None: they
        are given as they are."""
        self.num_pages = num_pages
        self.null_page = 0 if null else None
        self._num_usable = num_pages - null
        self._free = FreePages(int(null), num_pages)
        self._holders = [0] * num_pages
        self._epochs = [0] * num_pages
        self._dirty: set[int] = set()
        self._doubted: set[int] = set()
        self._zero = zero

    @property
    @abstractmethod
    def _known(self) -> Known: ...

    @abstractmethod
    def _make_room(self, count: int) -> None:
        """Evicts until ``count`` pages are free. There are enough that are free or kept."""

    @property
    def num_free(self) -> int:
        """Allocatable pages: free + kept."""
        return len(self._free) + len(self._known.kept)

    @property
    def num_usable(self) -> int:
        """All pages but the null page."""
        return self._num_usable

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that a prompt may reuse."""
        return len(self._known.kept)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Pages for one holder, contiguous if possible; first those right behind page ``after``.

        Raises ``MemoryBudgetError``, and nothing is changed, if ``num_free`` is too small."""
        self._check_room(count, self.num_free)
        self._make_room(count)
        pages = self._free.take(count, after)
        doubted = sorted(self._doubted.intersection(pages))
        try:
            if doubted:
                self._zero(doubted)
        except BaseException:
            self._free.add(pages)
            raise
        self._doubted.difference_update(doubted)
        for page in pages:
            self._holders[page] = 1
            self._epochs[page] += 1
        return pages

    def grow(self, pages: list[int], count: int) -> None:
        """Extends a sequence's list by ``count`` pages. Raises ``MemoryBudgetError``, and nothing is changed."""
        pages += self.allocate(count, pages[-1] if pages else None)

    def hold(self, pages: Iterable[int]) -> None:
        """Adds one holder to pages that are held or kept."""
        for page in pages:
            if page != self.null_page:
                if not self._holders[page] and page not in self._known.kept:
                    raise ValueError(f"page {page} is free: expected one that is held or kept")
                self._known.kept.pop(page, None)
                self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes one holder. A page without holders is kept if its tokens are known, else free.

        Goes from the last page to the first, so that a text's last pages are evicted first.
        """
        for page in reversed(pages):
            if page == self.null_page:
                continue
            if not self._holders[page]:
                raise ValueError(f"page {page} is released once too often")
            self._holders[page] -= 1
            if self._holders[page] or page in self._dirty:
                continue
            if page in self._known.on_page:
                self._known.kept[page] = None
            else:
                self._free.add([page])

    def pass_by(self, pages: list[int], first: int, last: int) -> None:
        """Removes a holder of ``pages[first:last]``, which no window of a sequence reaches any more; in its list the
        null page stands for them."""
        passed, pages[first:last] = pages[first:last], [self._null] * (last - first)
        self.release(passed)

    @property
    def _null(self) -> int:
        if self.null_page is None:
            raise ValueError("this pool has no null page: expected null=True")
        return self.null_page

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def epoch(self, page: int) -> int:
        """Changes when the page gets an owner who may write to it: until then it holds what its last owner wrote."""
        return self._epochs[page]

    def reclaim(self, old: Sequence[tuple[int, int]]) -> list[int]:
        """Takes back the pages of a sequence that has released them: (page, epoch at that time). Holds the longest
        beginning that is unchanged, and returns it."""
        pages: list[int] = []
        for page, epoch in old:
            if self._epochs[page] != epoch or page in self._dirty:
                break
            if page != self.null_page:
                self._hold_unchanged(page)
            pages.append(page)
        return pages

    def fork(self, pages: Sequence[int], num_tokens: int, copy: CopyPages) -> list[int]:
        """Pages of a second sequence with the same first ``num_tokens`` tokens: the full pages are shared, a partly
        filled one is copied. Raises ``MemoryBudgetError``, and nothing is changed."""
        num_full, rest = divmod(num_tokens, PAGE_SIZE)
        forked = list(pages[:num_full])
        fresh = self.allocate(1, forked[-1] if forked else None) if rest else []
        try:
            if fresh:
                copy([pages[num_full]], fresh)
        except BaseException:
            self.release(fresh)
            raise
        self.hold(forked)
        return forked + fresh

    def rewind(self, pages: list[int], num_tokens: int, copy: CopyPages) -> None:
        """Behind the first ``num_tokens`` tokens of a sequence its pages are going to be written anew: those that
        others hold are replaced in the list, and what is known of the rest is forgotten. Raises ``MemoryBudgetError``,
        and nothing is changed."""
        first, rest = divmod(num_tokens, PAGE_SIZE)
        behind = [i for i in range(first, len(pages)) if pages[i] != self.null_page]
        shared = [i for i in behind if self._holders[pages[i]] > 1]
        fresh = self.allocate(len(shared))
        try:
            if rest and shared[:1] == [first]:
                copy([pages[first]], fresh[:1])
        except BaseException:
            self.release(fresh)
            raise
        for i, page in zip(shared, fresh, strict=True):
            self.release([pages[i]])
            pages[i] = page
        for i in behind:
            node = self._known.on_page.get(pages[i])
            if node is not None and (i > first or len(node.tokens) > rest):
                self._known.forget(node)
            self._epochs[pages[i]] += 1  # a sequence that is paused may have had this page, too

    def poison(self, pages: Iterable[int]) -> None:
        """The bytes of these pages are not numbers. Those with a single holder, and all that was known to follow them,
        are forgotten; once released they wait for ``clean``. Other holders' pages were good when they came to them."""
        for page in pages:
            if page != self.null_page and self._holders[page] == 1:
                if page in self._known.on_page:
                    self._known.forget(self._known.on_page[page])
                self._dirty.add(page)

    def doubt(self, pages: Iterable[int]) -> None:
        """Nobody has seen yet that what was written to these pages is numbers: no logits depend on all of it. A text
        that begins alike may use them. Whoever gets one for another text gets it zeroed, since attention reads a page
        to its end, and a weight of 0 times NaN is NaN."""
        if self._zero is not None:
            self._doubted.update(page for page in pages if page != self.null_page)

    def trust(self, pages: Iterable[int]) -> None:
        """Logits that depend on all that was written to these pages are numbers."""
        self._doubted.difference_update(pages)

    def clean(self, zero: Callable[[list[int]], None]) -> None:
        """``zero`` is called with the poisoned pages that nobody holds any more; then they are free."""
        pages = sorted(page for page in self._dirty if not self._holders[page])
        if pages:
            zero(pages)
            for page in pages:
                self._epochs[page] += 1
            self._dirty.difference_update(pages)
            self._free.add(pages)

    def _count_holders(self, holders: Iterable[Sequence[int]]) -> list[int]:
        counts = Counter(page for pages in holders for page in pages if page != self.null_page)
        return [counts[page] for page in range(self.num_pages)]

    def _check_room(self, count: int, room: int) -> None:
        if count > room:
            raise MemoryBudgetError(
                f"KV cache: {count} pages of {PAGE_SIZE} tokens requested, {room} of {self._num_usable} available"
            )

    def _hold_unchanged(self, page: int) -> None:
        if not self._holders[page] and page not in self._known.kept:
            self._free.discard(page)
            self._holders[page] = 1
        else:
            self.hold([page])

    def _count_anew(self, holders: Iterable[Sequence[int]] | None) -> None:
        """After all that was known is forgotten. ``holders``: the lists of pages that are in use, if counts may be
        wrong."""
        if holders is not None:
            self._holders = self._count_holders(holders)
            self._epochs = [epoch + 1 for epoch in self._epochs]
        unusable = {*self._dirty, self.null_page}
        self._free.clear()
        self._free.add(page for page in range(self.num_pages) if not self._holders[page] and page not in unusable)

    def _check_places(self, holders: Iterable[Sequence[int]] | None) -> None:
        """Raises ``RuntimeError`` unless every page is in one place, and ``holders`` give the counts."""
        free = set(self._free)
        if len(self._free) != len(free):
            raise RuntimeError(f"{len(self._free)} free pages are counted, there are {len(free)}")
        for page in range(self.num_pages):
            places = [
                *(["null"] if page == self.null_page else []),
                *(["free"] if page in free else []),
                *(["held"] if self._holders[page] else []),
                *(["kept"] if page in self._known.kept else []),
                *(["dirty"] if page in self._dirty and not self._holders[page] else []),
            ]
            if len(places) != 1:
                raise RuntimeError(f"page {page} is {' and '.join(places) or 'lost'}")
        if holders is not None:
            for page, count in enumerate(self._count_holders(holders)):
                if self._holders[page] != count:
                    raise RuntimeError(f"page {page} counts {self._holders[page]} holders, {count} have it")
        if self._dirty & self._known.on_page.keys():
            raise RuntimeError("a page is known that is to be zeroed")
