"""The texts whose pages are known, as a tree: a page is identified by its parent, the page before it, and its tokens.

Tokens are compared themselves, so that two texts can never be confused, as they could be by hashes alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from exl.batch import PAGE_SIZE
from exl.cache.free_pages import FreePages

Tokens = tuple[int, ...]
NOWHERE = -1


@dataclass(eq=False)
class PrefixNode:
    """A page whose tokens are known: on a page of the cache, or away in a slot of the RAM tier. The root of the tree
    stands for the empty text and is nowhere."""

    tokens: Tokens  # 1 to PAGE_SIZE; only full pages have children
    parent: PrefixNode | None
    page: int = NOWHERE
    slot: int = NOWHERE
    num_exact: int = 0  # its first tokens that have the bits of a cold run; above 0 only if its parents are all exact
    window_page: int = NOWHERE  # where the layers with a window have it, if they have pages of their own
    children: dict[Tokens, PrefixNode] = field(default_factory=dict)
    _order: list[Tokens] = field(default_factory=list)  # the keys of ``children``, sorted

    @property
    def is_full(self) -> bool:
        return len(self.tokens) == PAGE_SIZE

    @property
    def is_away(self) -> bool:
        return self.slot != NOWHERE

    def attach(self, child: PrefixNode) -> None:
        self.children[child.tokens] = child
        self._order.insert(bisect_left(self._order, child.tokens), child.tokens)

    def detach(self) -> None:
        """Out of its parent's children."""
        if self.parent is not None:
            del self.parent.children[self.tokens]
            del self.parent._order[bisect_left(self.parent._order, self.tokens)]

    def closest(self, tokens: Tokens) -> tuple[PrefixNode | None, int]:
        """The child that has the most first tokens in common with ``tokens``, and how many: in sorted order it is a
        neighbour of where ``tokens`` would stand. Of several the one that has these alone."""
        at = bisect_left(self._order, tokens)
        found, num_common = None, 0
        for key in self._order[max(at - 1, 0) : at + 1]:
            common = count_common(key, tokens)
            if common > num_common:
                found, num_common = self.children[key], common
        return self.children.get(tokens[:num_common], found), num_common

    def subtree(self) -> Iterator[PrefixNode]:
        """This node and all below, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


@dataclass(frozen=True)
class KnownPage:
    """A node as others see it."""

    parent: int  # place in the list of the page before it; -1: it begins a text
    tokens: Tokens
    num_exact: int
    page: int = NOWHERE
    slot: int = NOWHERE


@dataclass(frozen=True)
class PrefixPath:
    """Where a text's known beginning lies."""

    nodes: tuple[PrefixNode, ...]  # full pages
    last: PrefixNode | None  # a page whose first ``num_last`` tokens come next
    num_last: int
    num_passed: int = 0  # full pages before ``nodes`` that are not wanted
    passed_exact: int = 0  # of their tokens, the first that have the bits of a cold run

    @property
    def num_tokens(self) -> int:
        return (self.num_passed + len(self.nodes)) * PAGE_SIZE + self.num_last

    @property
    def num_exact(self) -> int:
        """How many of its first tokens have the bits of a cold run."""
        if self.passed_exact < self.num_passed * PAGE_SIZE:
            return self.passed_exact
        for i, node in enumerate(self.nodes):
            if node.num_exact < PAGE_SIZE:
                return (self.num_passed + i) * PAGE_SIZE + node.num_exact
        whole = (self.num_passed + len(self.nodes)) * PAGE_SIZE
        return whole + (min(self.num_last, self.last.num_exact) if self.last else 0)

    def without(self, num_pages: int) -> PrefixPath:
        """The same text, of whose first pages ``num_pages`` are not wanted."""
        exact = min(self.num_exact, num_pages * PAGE_SIZE)
        return replace(self, nodes=self.nodes[num_pages:], num_passed=num_pages, passed_exact=exact)

    @property
    def away(self) -> list[PrefixNode]:
        """Full pages that are in the RAM tier."""
        return [node for node in self.nodes if node.is_away]


class WindowPages(Protocol):
    """``exl.cache.window_pool.WindowPool``."""

    null_page: int | None

    def attach(self, node: PrefixNode, page: int, num_exact: int) -> None: ...

    def detach(self, node: PrefixNode) -> None: ...


class PrefixTree:
    """The nodes, by page and by slot; which pages are kept for them alone; least recent use of both. Pages that nobody
    has any more go to ``free``."""

    def __init__(
        self, free: FreePages, num_slots: int, null_page: int | None, windows: WindowPages | None = None
    ) -> None:
        self.root = PrefixNode((), None)
        self.on_page: dict[int, PrefixNode] = {}
        self.kept: OrderedDict[int, None] = OrderedDict()  # pages without holders, least recently used first
        self.in_slot: OrderedDict[int, PrefixNode] = OrderedDict()  # least recently used first
        self._free, self._null_page, self._num_slots = free, null_page, num_slots
        self._free_slots = list(range(num_slots))[::-1]
        self._windows = windows

    def find(self, ids: Sequence[int], *, exact: bool, multiple: int) -> PrefixPath:
        """The longest known beginning of ``ids``: with ``exact`` of tokens that are marked so, cut to a multiple of
        ``multiple`` tokens."""
        node, nodes = self.root, list[PrefixNode]()
        while True:
            rest = tuple(ids[len(nodes) * PAGE_SIZE : (len(nodes) + 1) * PAGE_SIZE])
            following = node.children.get(rest) if len(rest) == PAGE_SIZE else None
            if following is None or (exact and following.num_exact < PAGE_SIZE):
                break
            node = following
            nodes.append(node)
        last, num_common = node.closest(rest)
        if exact and last is not None:
            num_common = min(num_common, last.num_exact)
        num_tokens = len(nodes) * PAGE_SIZE + num_common
        num_pages, num_last = divmod(num_tokens - num_tokens % multiple, PAGE_SIZE)
        last = nodes[num_pages] if num_pages < len(nodes) else last
        return PrefixPath(tuple(nodes[:num_pages]), last if num_last else None, num_last)

    # ---- what is known ----------------------------------------------------------------------------------------------

    def remember(
        self, ids: Sequence[int], pages: Sequence[int], num_exact: int, window_pages: Sequence[int] = ()
    ) -> None:
        """``PagePool.remember``."""
        node, start = self._last_known(ids, pages)
        self._mark(pages[:start], num_exact, window_pages)
        if self._windows is not None:
            self._attach_before(node, start, num_exact, window_pages)
        for i in range(start, min(len(pages), -(-len(ids) // PAGE_SIZE))):
            if node is not self.root and node.num_exact < PAGE_SIZE:
                num_exact = 0  # for what follows
            tokens = tuple(ids[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            exact = min(_exact_in(i, num_exact), len(tokens))
            known = self.enter(node, tokens, pages[i], exact, window_pages[i] if i < len(window_pages) else NOWHERE)
            if known is None or not known.is_full:
                return
            node = known

    def _last_known(self, ids: Sequence[int], pages: Sequence[int]) -> tuple[PrefixNode, int]:
        """The last of a sequence's full pages that is in the tree as such, and how many pages come up to it: what is
        before it is there, too."""
        for i in range(min(len(ids) // PAGE_SIZE, len(pages)), 0, -1):
            node = self.on_page.get(pages[i - 1])
            if node is not None and node.tokens == tuple(ids[(i - 1) * PAGE_SIZE : i * PAGE_SIZE]):
                return node, i
        return self.root, 0

    def _mark(self, pages: Sequence[int], num_exact: int, window_pages: Sequence[int]) -> None:
        """Of full pages that are in the tree, ``num_exact`` tokens are exact after all."""
        marks: list[tuple[PrefixNode, int, int]] = []
        for i in range(min(len(pages), -(-num_exact // PAGE_SIZE)), 0, -1):
            node, exact = self.on_page.get(pages[i - 1]), _exact_in(i - 1, num_exact)
            if node is None:  # the tree has this text on another page
                return
            if node.num_exact >= exact:
                break
            marks.append((node, exact, window_pages[i - 1] if i <= len(window_pages) else NOWHERE))
        for node, exact, window_page in marks:
            self._raise_exact(node, exact, window_page)

    def _raise_exact(self, node: PrefixNode, num_exact: int, window_page: int) -> None:
        """So many of the node's tokens are exact, as those are on ``window_page``; another one is perhaps not."""
        if num_exact > node.num_exact:
            node.num_exact = num_exact
            if self._windows is not None and node.window_page != window_page:
                self._windows.detach(node)

    def _attach_before(self, node: PrefixNode, start: int, num_exact: int, window_pages: Sequence[int]) -> None:
        """Of a text's pages before ``start``, the last of which is the node's, those of the layers with a window, as
        far as they are not known yet: what is before them is known, too, or was given back."""
        for i in range(start - 1, -1, -1):
            if i < len(window_pages):
                if window_pages[i] in (self._windows.null_page, node.window_page):
                    return
                self._windows.attach(node, window_pages[i], _exact_in(i, num_exact))
            node = node.parent

    def enter(
        self, parent: PrefixNode, tokens: Tokens, page: int, num_exact: int, window_page: int = NOWHERE
    ) -> PrefixNode | None:
        """The node of these tokens, on ``page`` if it may be; None if that is the null page and they are not known.
        ``window_page``: theirs in the layers with a window."""
        known = parent.children.get(tokens)
        if page == self._null_page:
            return known
        own = self.on_page.get(page)
        if own is not None and own is not known:  # it has grown since it was remembered
            self.forget(own)
        if known is None:
            known = PrefixNode(tokens, parent, num_exact=num_exact)
            parent.attach(known)
            self.place(known, page)
        elif known.page == page:
            self._raise_exact(known, num_exact, window_page)
        elif num_exact >= known.num_exact and (known.is_away or known.page in self.kept):
            self._leave(known)
            known.num_exact = num_exact
            self.place(known, page)
        if self._windows is not None and window_page != NOWHERE:
            self._windows.attach(known, window_page, num_exact)
        return known

    def place(self, node: PrefixNode, page: int) -> None:
        """A node that is nowhere is on ``page`` from here on."""
        node.page = page
        self.on_page[page] = node

    def _leave(self, node: PrefixNode) -> None:
        """A node is nowhere from here on; a page that nobody holds is free then."""
        if self._windows is not None:
            self._windows.detach(node)
        if node.page != NOWHERE:
            del self.on_page[node.page]
            if node.page in self.kept:
                del self.kept[node.page]
                self._free.add([node.page])
        elif self.in_slot.pop(node.slot, None) is not None:
            self._free_slots.append(node.slot)
        else:  # it is pinned, and has its slot until it is not
            return
        node.page = node.slot = NOWHERE

    def forget(self, top: PrefixNode) -> None:
        """Takes a node and all below out of the tree."""
        top.detach()
        for node in list(top.subtree()):
            self._leave(node)

    def known_pages(self, holders: Sequence[int]) -> list[KnownPage]:
        """``PagePool.known_pages``."""
        held = [node for page, node in self.on_page.items() if holders[page]]
        by_use = [*self.in_slot.values(), *(self.on_page[page] for page in self.kept), *held]
        places: dict[PrefixNode, int] = {self.root: -1}
        for node in reversed(by_use):
            chain: list[PrefixNode] = []
            while node not in places and node.parent is not None:
                chain.append(node)
                node = node.parent
            for new in reversed(chain):
                places[new] = len(places) - 1
        return [
            KnownPage(places[node.parent], node.tokens, node.num_exact, node.page, node.slot)
            for node in places
            if node.parent is not None
        ]

    # ---- eviction ---------------------------------------------------------------------------------------------------

    def evict(self) -> tuple[int, int]:
        """Frees a page, and perhaps others: (page, slot) if its bytes are to be saved, else the slot is ``NOWHERE``."""
        node = self._victim()
        page = node.page
        slot = self._take_slot() if node.is_full else NOWHERE
        if node.page == NOWHERE:  # it was below the one that had the slot
            self._free_slots.append(slot)
            return page, NOWHERE
        if slot == NOWHERE:
            self.forget(node)
            return page, NOWHERE
        self._leave(node)
        node.slot = slot
        self.in_slot[slot] = node
        return page, slot

    def _victim(self) -> PrefixNode:
        """The least recently used page or, where that has others below, the end of its text: without their parent they
        could not be found."""
        node = self.on_page[next(iter(self.kept))]
        while True:
            below = next((child for child in node.children.values() if child.page in self.kept), None)
            if below is None:
                return node
            node = below

    def _take_slot(self) -> int:
        """A free slot, perhaps that of the least recently used page in the tier; ``NOWHERE`` if there is none."""
        if not self._free_slots and self.in_slot:
            self.forget(next(iter(self.in_slot.values())))
        return self._free_slots.pop() if self._free_slots else NOWHERE

    def pin(self, nodes: Iterable[PrefixNode]) -> None:
        """Slots of these nodes are given to nobody, until ``unpin`` or ``restored``."""
        for node in nodes:
            del self.in_slot[node.slot]

    def unpin(self, nodes: Iterable[PrefixNode]) -> None:
        """They are the most recently used."""
        for node in nodes:
            if self._is_known(node):
                self.in_slot[node.slot] = node
            else:
                self._free_slots.append(node.slot)
                node.slot = NOWHERE

    def restored(self, node: PrefixNode, page: int) -> None:
        """A pinned node is on a page again; its slot is free."""
        self._free_slots.append(node.slot)
        node.slot = NOWHERE
        if self._is_known(node):
            self.place(node, page)

    def _is_known(self, node: PrefixNode) -> bool:
        """Whether a pinned node is still in the tree: what is before it may have been forgotten."""
        while node.parent is not None:
            if node.parent.children.get(node.tokens) is not node:
                return False
            node = node.parent
        return node is self.root

    # ---- checks -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises ``RuntimeError`` unless nodes, pages and slots agree."""
        nodes = list(self.root.subtree())[1:]
        on_page = {node.page: node for node in nodes if node.page != NOWHERE}
        in_slot = {node.slot: node for node in nodes if node.is_away}
        if on_page != self.on_page or in_slot != dict(self.in_slot) or len(on_page) + len(in_slot) != len(nodes):
            raise RuntimeError("the tree and the pages that it knows differ")
        if not self.kept.keys() <= on_page.keys():
            raise RuntimeError("a page is kept that is not in the tree")
        if sorted([*in_slot, *self._free_slots]) != list(range(self._num_slots)):
            raise RuntimeError("the slots of the RAM tier do not add up")
        for node in nodes:
            parent = node.parent
            if parent is None or parent.children.get(node.tokens) is not node or (node.children and not node.is_full):
                raise RuntimeError(f"the tree is broken at page {node.page}")
            if node.num_exact and parent is not self.root and parent.num_exact < PAGE_SIZE:
                raise RuntimeError(f"page {node.page} is marked as exact, the page before it is not")


def _exact_in(i: int, num_exact: int) -> int:
    """Of the i-th page's tokens, if a text's first ``num_exact`` tokens are exact."""
    return min(max(num_exact - i * PAGE_SIZE, 0), PAGE_SIZE)


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Equal items at the beginning of both."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
