"""The pages of layers that have a sliding window, in a model that has layers without one, too. Host only.

Such a model's layers have two slabs, and each text a page in both for every 64 tokens. What no window reaches any more
is given back in this one while the sequence runs, so that it is much smaller than the other. What is known of a page is
a node of the tree of the other slab's pool (``PrefixNode.window_page``), whose page may be gone here and there still.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from exl.batch import PAGE_SIZE
from exl.cache.free_pages import FreePages
from exl.cache.holders import PageHolders
from exl.cache.prefix_tree import NOWHERE, PrefixNode
from exl.layout.window import pages_behind


class _KnownWindows:
    """See ``exl.cache.holders.Known``."""

    def __init__(self, free: FreePages) -> None:
        self.kept: OrderedDict[int, None] = OrderedDict()
        self.on_page: dict[int, PrefixNode] = {}
        self._free = free

    def forget(self, node: PrefixNode) -> None:
        """The node has no page here from now on."""
        page, node.window_page = node.window_page, NOWHERE
        if page == NOWHERE:
            return
        del self.on_page[page]
        if page in self.kept:
            del self.kept[page]
            self._free.add([page])


class WindowPool(PageHolders):
    """Page 0 is the null page."""

    def __init__(self, num_pages: int, window: int, zero: Callable[[list[int]], None] | None = None) -> None:
        """``window``: the widest of these layers. ``zero``: as for ``PageHolders``."""
        super().__init__(num_pages, null=True, zero=zero)
        self.window = window
        self._windows = _KnownWindows(self._free)

    @property
    def _known(self) -> _KnownWindows:
        return self._windows

    def reaching(self, nodes: Sequence[PrefixNode], step: int = 1) -> int:
        """How many of a text's first pages, ``nodes``, a sequence can go on behind: the most, a multiple of ``step``,
        of which all that the next row sees is here."""
        run = found = 0
        for i, node in enumerate(nodes, 1):
            run = run + 1 if node.window_page != NOWHERE else 0
            if i % step == 0 and run >= i - pages_behind(self.window, i * PAGE_SIZE):
                found = i
        return found

    def take(self, known: Sequence[int], num_passed: int, count: int, spare: int) -> list[int]:
        """A new sequence's pages: null pages, then those that are known, which it holds from here on, and fresh ones up
        to ``count`` besides the null pages. Raises ``MemoryBudgetError``, and nothing is changed, if that would leave
        less than ``spare`` pages to others."""
        num_fresh = max(0, count - len(known))
        self._check_room(num_fresh + spare, self.num_free - sum(page in self._windows.kept for page in known))
        self.hold(known)
        try:
            fresh = self.allocate(num_fresh, known[-1] if known else None)
        except BaseException:
            self.release(known)
            raise
        return [self._null] * num_passed + [*known, *fresh]

    def clean_up(self) -> None:
        """``clean`` with this pool's own ``zero``."""
        if self._zero is not None:
            self.clean(self._zero)

    # ---- what the tree tells

    def attach(self, node: PrefixNode, page: int, num_exact: int) -> None:
        """A held page has the tokens of the node, ``num_exact`` of them with the bits of a cold run. The node has it
        from here on, unless it has one already or is exact where this page is not."""
        if page == self.null_page or page in self._dirty or node.window_page != NOWHERE or num_exact < node.num_exact:
            return
        own = self._windows.on_page.get(page)
        if own is not None:
            self._windows.forget(own)
        node.window_page = page
        self._windows.on_page[page] = node

    def detach(self, node: PrefixNode) -> None:
        self._windows.forget(node)

    def _make_room(self, count: int) -> None:
        while len(self._free) < count:
            page = next(iter(self._windows.kept))
            self._windows.forget(self._windows.on_page[page])

    # ---- after an interruption

    def clear(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """As ``PagePool.clear``, which calls it: the nodes are gone."""
        self._windows = _KnownWindows(self._free)
        self._count_anew(holders)

    def check(self, nodes: Iterable[PrefixNode], holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raises ``RuntimeError`` unless every page is in one place, and ``nodes``, all that the tree has, have the
        pages that are known."""
        self._check_places(holders)
        if {node.window_page: node for node in nodes if node.window_page != NOWHERE} != self._windows.on_page:
            raise RuntimeError("the tree and the pages with a window differ")
        if not self._windows.kept.keys() <= self._windows.on_page.keys():
            raise RuntimeError("a page with a window is kept that is not in the tree")
