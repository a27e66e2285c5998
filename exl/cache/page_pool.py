"""Which sequence holds which page of the cache, and which pages a later prompt may reuse as its prefix. Host only.

A page is *in use* (one or more sequences hold it; reference-counted), *evictable* (nobody holds it, but its tokens are
known and a prompt may reuse it), or *free*. If free pages run out, evictable pages are evicted, least recently used
first.

The prefix cache is a tree: a page is identified by its parent, the page before it, and by its own tokens. Tokens are
compared themselves, so that two texts can never be confused, as they could be by hashes alone.
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
    """The cached prefix of a text. All its pages, and ``copy_from``, are held for the caller."""

    pages: tuple[int, ...]  # full, except that the last may be partly filled: then only the caller holds it
    num_tokens: int
    copy_from: int | None = None  # a page with the tokens after ``pages``, up to num_tokens: copy it, then release it


class PagePool:
    """Reference counts, free pages, and the tree of cached prefixes."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: lowest pages first, so that allocations tend to be contiguous
        self._in_use: dict[int, int] = {}  # page -> holders
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # page -> its node, if its tokens are known
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Allocatable pages: free + evictable."""
        return len(self._free) + len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Pages for one holder, contiguous if possible. Raises ``MemoryBudgetError`` if ``num_free`` is too small."""
        if count > self.num_free:
            raise MemoryBudgetError(
                f"KV cache: {count} pages of {PAGE_SIZE} tokens requested, "
                f"{self.num_free} of {self.num_pages} available"
            )
        while len(self._free) < count:
            self._forget(self._leaf(next(iter(self._evictable))))
        pages = self._take_run(count) or [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._in_use[page] = 1
        return pages

    def _take_run(self, count: int) -> list[int] | None:
        """The first contiguous run of ``count`` free pages, which attention can read as one view; None if none."""
        free = sorted(self._free)
        start = 0
        for i, page in enumerate(free):
            if page - free[start] != i - start:
                start = i
            if i - start + 1 == count:
                self._free = free[:start] + free[i + 1 :]  # a sorted list is a heap
                return free[start : i + 1]
        return None

    def hold(self, pages: Iterable[int]) -> None:
        """Adds one holder to pages that are in use or evictable."""
        for page in pages:
            self._in_use[page] = self._in_use.get(page, 0) + 1
            self._evictable.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """Removes one holder. A page without holders is evictable if its tokens are known, else free.

        Goes from the last page to the first, so that a text's last pages are evicted first.
        """
        for page in reversed(list(pages)):
            if self._in_use[page] > 1:
                self._in_use[page] -= 1
                continue
            del self._in_use[page]
            if page in self._nodes:
                self._evictable[page] = None
            else:
                heapq.heappush(self._free, page)

    def remember(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Enters a sequence's pages into the tree: ``pages`` hold ``token_ids``; the last may be partly filled.

        If another page with the same text is already in the tree, neither this page nor those after it are entered.
        The next sequence finds the other page; and a holder of any page in the tree must hold its parents too, which
        this sequence does not.
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
        """The longest cached prefix of a text. The pages found are held for the caller."""
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
        was_evictable = best.page in self._evictable
        self.hold([best.page])
        if was_evictable and num_common == len(best.tokens) < PAGE_SIZE:
            # Nobody else holds the page and all its tokens match: the caller appends to it in place, without a copy,
            # and calls ``remember`` again.
            self._forget_node(best)
            return PrefixMatch((*pages, best.page), num_tokens)
        return PrefixMatch(tuple(pages), num_tokens, copy_from=best.page)

    def claim(self, page: int) -> bool:
        """Makes a page that ``find`` gave as ``copy_from`` the caller's own: no prompt finds it any more, nor the pages
        after it. False, and nothing is changed, if somebody else holds it too."""
        if self._in_use[page] > 1:
            return False
        node = self._nodes[page]
        while node.children:  # nobody holds them, since a holder of a page also holds its parents
            self._forget(self._leaf(next(iter(node.children.values())).page))
        self._forget_node(node)
        return True

    def _leaf(self, page: int) -> _Node:
        """A leaf below ``page``, or the page itself: children are evicted before their parent, because without it
        they could not be found. The leaf is evictable too, since a holder of a page also holds its parents."""
        node = self._nodes[page]
        while node.children:
            node = next(iter(node.children.values()))
        return node

    def _forget(self, node: _Node) -> None:
        self._forget_node(node)
        del self._evictable[node.page]
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
