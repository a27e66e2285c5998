"""Who uses which page of the cache, and which pages hold text that a later prompt may begin with. Host only.

A page is *held* by one or more sequences (counted), *kept* (nobody holds it, but its tokens are known and may be asked
for again), or *free*. Kept pages are given away by least recent use when free ones run out.

Pages are found again by the chain of their tokens: a page is known by its parent, the page before it, and by its own
tokens. The chain is kept as a tree, so that two texts can never be taken for each other, as hashes alone could be.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from exl.batch import PAGE_SIZE
from exl.errors import MemoryBudgetError


@dataclass(eq=False)
class _Node:
    """A page whose tokens are known. The root of the tree stands for the empty text and has no page."""

    page: int
    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class PrefixMatch:
    """What the cache has of a text. All pages are held for the caller."""

    pages: tuple[int, ...]  # whole, but for the last one, which may be partly filled and then is the caller's alone
    num_tokens: int
    copy_from: int | None = None  # has the tokens after ``pages``, up to num_tokens; to be copied, then released


class PagePool:
    """Reference counts, free pages, known texts."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: the lowest pages first, so that runs are neighbours
        self._held: dict[int, int] = {}  # page -> holders
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # page -> what it holds
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that can be had: free ones, and kept ones that would be given away."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int]:
        """Pages for one holder, neighbours where possible. ``MemoryBudgetError`` where there are not so many."""
        if count > self.num_free:
            raise MemoryBudgetError(
                f"KV cache: {count} pages of {PAGE_SIZE} tokens asked for, {self.num_free} of {self.num_pages} free"
            )
        while len(self._free) < count:
            self._forget(self._leaf(next(iter(self._kept))))
        pages = self._take_run(count) or [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._held[page] = 1
        return pages

    def _take_run(self, count: int) -> list[int] | None:
        """The first run of ``count`` free neighbours, so that attention reads them as one view."""
        free = sorted(self._free)
        start = 0
        for i, page in enumerate(free):
            if page - free[start] != i - start:
                start = i
            if i - start + 1 == count:
                self._free = free[:start] + free[i + 1 :]  # sorted is a heap
                return free[start : i + 1]
        return None

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for pages that are held or kept."""
        for page in pages:
            self._held[page] = self._held.get(page, 0) + 1
            self._kept.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """One holder less. Pages without one are kept where their tokens are known, the last pages of a text first
        to be given away."""
        for page in reversed(list(pages)):
            if self._held[page] > 1:
                self._held[page] -= 1
                continue
            del self._held[page]
            if page in self._nodes:
                self._kept[page] = None
            else:
                heapq.heappush(self._free, page)

    def remember(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """What a sequence has cached: ``token_ids`` lie on ``pages``, the last of which may be partly filled.

        A page whose text is known already, on another page, stays unknown, as do those after it: the next sequence
        will find the other, and whoever holds a page also holds those before it in the tree.
        """
        node = self._root
        for i, page in enumerate(pages):
            tokens = tuple(token_ids[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            if not tokens:
                return
            known = node.children.get(tokens)
            if known is None:
                known = _Node(page, tokens, node)
                node.children[tokens] = known
                self._nodes[page] = known
            if known.page != page or len(tokens) < PAGE_SIZE:
                return
            node = known

    def find(self, token_ids: Sequence[int]) -> PrefixMatch:
        """The longest known beginning of a text. The pages found are held for the caller."""
        node, pages = self._root, []
        while True:
            rest = tuple(token_ids[len(pages) * PAGE_SIZE : (len(pages) + 1) * PAGE_SIZE])
            following = node.children.get(rest) if len(rest) == PAGE_SIZE else None
            if following is None:
                break
            node = following
            pages.append(node.page)
        best, num_common = None, 0
        for child in node.children.values():
            common = _num_common(child.tokens, rest)
            if common > num_common:
                best, num_common = child, common
        self.hold(pages)
        num_tokens = len(pages) * PAGE_SIZE + num_common
        if best is None:
            return PrefixMatch(tuple(pages), num_tokens)
        unheld = best.page in self._kept
        self.hold([best.page])
        if unheld and num_common == len(best.tokens) < PAGE_SIZE:
            # Nobody else has it and all of it is wanted: it is written on where it is. The caller remembers it anew.
            self._forget_node(best)
            return PrefixMatch((*pages, best.page), num_tokens)
        return PrefixMatch(tuple(pages), num_tokens, copy_from=best.page)

    def _leaf(self, page: int) -> _Node:
        """A page is given away only after those that follow it: without it nobody could find them. They are kept
        too: whoever holds a page holds its parents."""
        node = self._nodes[page]
        while node.children:
            node = next(iter(node.children.values()))
        return node

    def _forget(self, node: _Node) -> None:
        self._forget_node(node)
        del self._kept[node.page]
        heapq.heappush(self._free, node.page)

    def _forget_node(self, node: _Node) -> None:
        del self._nodes[node.page]
        if node.parent is not None:
            del node.parent.children[node.tokens]


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
