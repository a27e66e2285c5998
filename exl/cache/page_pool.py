"""Which pages of the cache a later prompt may reuse as its prefix, beside which sequence holds which. Host only.

Of pages that nobody holds those whose tokens are known are kept. They are evicted least recently used first, the end of
a text before its beginning.

A page is written only behind the tokens that are remembered of it, and only by a sequence that is its single holder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from exl.batch import PAGE_SIZE
from exl.cache.holders import CopyPages, PageHolders
from exl.cache.prefix_tree import NOWHERE, KnownPage, PrefixNode, PrefixPath, PrefixTree
from exl.cache.window_pool import WindowPool
from exl.layout.window import pages_behind

if TYPE_CHECKING:
    import torch


class Tier(Protocol):
    """Where evicted pages go, in slots. Whatever is queued for the cache later comes after these copies."""

    num_slots: int

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None: ...

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None: ...

    def read(self, slot: int, out: torch.Tensor) -> None:
        """A page's bytes, u8 on the host."""


@dataclass(frozen=True)
class PrefixMatch:
    """The known beginning of a text. Nothing of it is held."""

    num_tokens: int
    num_exact: int  # its first tokens that have the bits of a cold run
    pages: tuple[int, ...]  # full pages that a sequence would share; it needs others for the rest of the tokens


@dataclass(frozen=True)
class TakenPrefix:
    """Pages that are a sequence's from here on, and what it need not compute."""

    pages: list[int]
    num_reused: int
    num_exact: int  # of the reused tokens the first that have the bits of a cold run
    num_passed: int = 0  # leading pages that no window reaches, for which the null page stands


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was made."""

    lookups: int = 0
    hits: int = 0  # lookups that reused at least one token
    tokens_reused: int = 0
    evictions: int = 0  # kept pages that were given to others; if there is a RAM tier, their bytes went there
    pages_restored: int = 0  # that came back from the RAM tier


class PagePool(PageHolders):
    """Holders of pages, free pages, and the tree of known prefixes."""

    def __init__(
        self,
        num_pages: int,
        *,
        null: bool = False,
        tier: Tier | None = None,
        zero: Callable[[list[int]], None] | None = None,
        windows: WindowPool | None = None,
    ) -> None:
        """``null``, ``zero``: see ``PageHolders``. ``tier``: takes the bytes of full pages that are evicted, and gives
        them back. ``windows``: the pages of layers that have a window, in a model that has others, too; then ``null``
        and ``tier`` are not for this pool."""
        if windows is not None and (null or tier is not None):
            raise ValueError("windows=: expected neither a null page nor a tier")
        super().__init__(num_pages, null=null, zero=zero)
        self.windows = windows
        self.tier = tier
        self._tree = self._new_tree()
        self._counts: Counter[str] = Counter()

    def _new_tree(self) -> PrefixTree:
        return PrefixTree(self._free, self.tier.num_slots if self.tier else 0, self.null_page, self.windows)

    @property
    def _known(self) -> PrefixTree:
        return self._tree

    @property
    def stats(self) -> PoolStats:
        return PoolStats(**self._counts)

    # ---- known prefixes ---------------------------------------------------------------------------------------------

    def find(self, ids: Sequence[int], *, exact: bool = False, multiple: int = 1) -> PrefixMatch:
        """The longest known beginning of a text. ``exact``: only tokens with the bits of a cold run. Its length is cut
        to a multiple of ``multiple``; with ``windows`` to whole pages, too, and to where all that their window reaches
        is known. Holds and changes nothing."""
        path = self._find(ids, exact, multiple)
        pages = tuple(node.page for node in path.nodes if not node.is_away)
        return PrefixMatch(path.num_tokens, path.num_exact, pages)

    def _find(self, ids: Sequence[int], exact: bool, multiple: int) -> PrefixPath:
        if self.windows is None:
            return self._tree.find(ids, exact=exact, multiple=multiple)
        multiple = math.lcm(multiple, PAGE_SIZE)
        path = self._tree.find(ids, exact=exact, multiple=multiple)
        return replace(path, nodes=path.nodes[: self.windows.reaching(path.nodes, multiple // PAGE_SIZE)])

    def take_prefix(
        self,
        ids: Sequence[int],
        copy: CopyPages,
        *,
        num_pages: int = 0,
        spare: int = 0,
        exact: bool = False,
        multiple: int = 1,
        window: int | None = None,
        most: int = 0,
    ) -> TakenPrefix:
        """What ``find`` finds, as pages that a new sequence holds: full ones shared, a partly filled one its own: a
        copy by ``copy``, or the page itself if nobody else needs it or there is none to copy it to. Then fresh pages up
        to ``num_pages`` in all. ``window``: of all layers; pages that no later row sees are not taken, and there are at
        most ``most`` others.

        Raises ``MemoryBudgetError``, and nothing is changed, if that would leave less than ``spare`` pages to others.
        """
        path = self._find(ids, exact, multiple)
        if path.last is not None and path.last.page in self._doubted:  # what stands behind is another text's
            path = replace(path, last=None, num_last=0)
        if window is not None:
            path = path.without(pages_behind(window, len(path.nodes) * PAGE_SIZE))
            num_pages = min(num_pages - path.num_passed, most)
        taken = self._take_path(path, copy, num_pages, spare)
        self._counts.update(lookups=len(ids) > 0, hits=taken.num_reused > 0, tokens_reused=taken.num_reused)
        return taken

    def take_both(
        self,
        ids: Sequence[int],
        *,
        num_pages: int,
        spare: int = 0,
        exact: bool = False,
        multiple: int = 1,
        most: int,
    ) -> tuple[TakenPrefix, list[int]]:
        """``take_prefix`` with ``windows``, of which all pages are shared: also a sequence's pages there, ``most`` at
        most besides null pages. ``spare`` pages of each kind are left to others."""
        windows = self._windows
        path = self._find(ids, exact, multiple)
        num_passed = pages_behind(windows.window, path.num_tokens)
        known = [node.window_page for node in path.nodes[num_passed:]]
        beside = windows.take(known, num_passed, min(num_pages - num_passed, most), spare)
        try:
            taken = self._take_path(path, _copy_nothing, num_pages, spare)
        except BaseException:
            windows.release(beside)
            raise
        self._counts.update(lookups=len(ids) > 0, hits=taken.num_reused > 0, tokens_reused=taken.num_reused)
        return replace(taken, num_passed=num_passed), beside

    @property
    def _windows(self) -> WindowPool:
        if self.windows is None:
            raise ValueError("this pool is for all layers: expected windows=")
        return self.windows

    def _take_path(self, path: PrefixPath, copy: CopyPages, num_pages: int, spare: int) -> TakenPrefix:
        """``num_pages``: the path's and fresh ones."""
        room = self.num_free - sum(node.page in self._tree.kept for node in path.nodes)
        path, in_place = self._fit(path, room - spare, num_pages)
        num_missing = len(path.away)
        num_behind = max(num_pages - len(path.nodes), path.last is not None) - in_place
        room -= path.last is not None and path.last.page in self._tree.kept
        self._check_room(num_missing + num_behind + spare, room)
        pages = self._take(path, in_place, num_missing, num_behind, copy)
        if path.num_passed:
            pages[:0] = [self._null] * path.num_passed
        return TakenPrefix(pages, path.num_tokens, path.num_exact, path.num_passed)

    def remember(
        self,
        ids: Sequence[int],
        pages: Sequence[int],
        num_exact: int | None = None,
        window_pages: Sequence[int] = (),
    ) -> None:
        """Enters a sequence's pages into the tree: ``pages`` hold ``ids``; the last may be partly filled. To be called
        again when the sequence has grown; only the new part costs time.

        ``num_exact``: its first tokens that have the bits of a cold run (None: all). Where the tree has the text on
        another page, that one stays if somebody holds it or if it is exact where the new one is not. ``window_pages``:
        the same tokens' pages of ``windows``, null pages among them; then ``ids`` are whole pages.
        """
        usable = next((i for i, page in enumerate(pages) if page in self._dirty), len(pages)) if self._dirty else None
        self._tree.remember(ids, pages[:usable], len(ids) if num_exact is None else num_exact, window_pages)

    def known_pages(self) -> list[KnownPage]:
        """All that the tree knows, each after the page before it; else what was used last comes first."""
        return self._tree.known_pages(self._holders)

    def adopt(self, known: Sequence[KnownPage], fill: Callable[[int, int], None]) -> int:
        """Enters pages that come from elsewhere, in the order of ``known_pages``; their ``page`` and ``slot`` mean
        nothing. Only as many as are free or kept: others are evicted, the last of ``known`` are left out. ``fill(i,
        page)`` writes the i-th to its page. If it raises, nothing has been entered. Returns how many tokens of
        ``known`` can be found now, those that were here before included."""
        nodes: list[PrefixNode | None] = []  # those that are here
        for entry in known:
            parent = self._tree.root if entry.parent < 0 else nodes[entry.parent]
            node = parent.children.get(entry.tokens) if parent is not None else None
            nodes.append(node if node is not None and not node.is_away else None)
        pages = {i: node.page for i, node in enumerate(nodes) if node is not None}
        missing = [i for i in range(len(known)) if i not in pages]
        self.hold(pages.values())
        fresh: list[int] = []
        try:
            fresh = self.allocate(min(len(missing), self.num_free))
            for i, page in zip(missing, fresh, strict=False):
                fill(i, page)
        except BaseException:
            self.release(fresh)
            self.release(list(pages.values()))
            raise
        for i, page in zip(missing, fresh, strict=False):
            pages[i] = page
            parent = self._tree.root if known[i].parent < 0 else nodes[known[i].parent]
            if parent is not None:
                nodes[i] = self._tree.enter(parent, known[i].tokens, page, known[i].num_exact)
        self.release([pages[i] for i in sorted(pages)])
        return sum(len(known[i].tokens) for i in pages)

    def clear(
        self, holders: Iterable[Sequence[int]] | None = None, window_holders: Iterable[Sequence[int]] | None = None
    ) -> None:
        """Forgets all prefixes. ``holders``: the lists of pages that are in use, from which the counts are made anew,
        after an interruption that ``check`` has found to have left them wrong; ``window_holders``: those of
        ``windows``."""
        self._tree = self._new_tree()
        self._count_anew(holders)
        if self.windows is not None:
            self.windows.clear(window_holders)

    def check(
        self, holders: Iterable[Sequence[int]] | None = None, window_holders: Iterable[Sequence[int]] | None = None
    ) -> None:
        """Raises ``RuntimeError`` unless every page is in one place and the tree is in order. ``holders``: the lists of
        pages that are in use, which must give the counts; ``window_holders``: those of ``windows``."""
        self._check_places(holders)
        self._tree.check()
        if self.windows is not None:
            self.windows.check(self._tree.root.subtree(), window_holders)

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _fit(self, path: PrefixPath, room: int, num_pages: int) -> tuple[PrefixPath, bool]:
        """How the partly filled page comes to a sequence that may take ``room`` pages: the path, and whether the page
        itself is taken. Where there is neither room for a copy nor the right to take it, it is left out."""
        last = path.last
        if last is None:
            return path, False
        is_kept = last.page in self._tree.kept
        if is_kept and not last.is_full and path.num_last == len(last.tokens):
            return path, True  # the caller writes on behind its tokens
        num_fresh = max(num_pages - len(path.nodes), 1) + len(path.away)
        if num_fresh <= room - is_kept:
            return path, False
        if is_kept:
            return path, True  # the page to copy from is the one that lacks
        return replace(path, last=None, num_last=0), False

    def _take(self, path: PrefixPath, in_place: bool, num_missing: int, num_behind: int, copy: CopyPages) -> list[int]:
        """There is room. ``num_missing`` pages of the path are in the tier; ``num_behind`` fresh pages follow it."""
        own = path.last.page if path.last is not None and in_place else NOWHERE
        source = path.last.page if path.last is not None and not in_place else NOWHERE
        away = [*path.away, *([path.last] if path.last is not None and path.last.is_away else [])]
        shared = {node: node.page for node in path.nodes}  # the tree may forget them for lack of what is before them
        held = [page for page in (*shared.values(), own, source) if page != NOWHERE]
        self.hold(held)
        self._tree.pin(away)  # allocating may evict to the tier
        fresh: list[int] = []
        try:
            if path.last is not None and in_place:
                self._tree.forget(path.last)
                self._epochs[own] += 1
            fresh = self.allocate(num_missing + num_behind, held[-1] if held else None)
            if self.tier is not None and away:
                self.tier.load([node.slot for node in away], fresh[: len(away)])
            if source != NOWHERE:
                copy([source], fresh[num_missing : num_missing + 1])
        except BaseException:
            self._tree.unpin(away)
            self.release(fresh)
            self.release(held)
            raise
        for node, page in zip(away[:num_missing], fresh, strict=False):
            self._tree.restored(node, page)
            shared[node] = page
        self.doubt(fresh[:num_missing])
        self._tree.unpin(away[num_missing:])
        self._counts["pages_restored"] += len(away)
        if source != NOWHERE:
            self.release([source])
        return [*shared.values(), *([own] if in_place else []), *fresh[num_missing:]]

    def _make_room(self, count: int) -> None:
        """Evicts until ``count`` pages are free. The bytes of full pages go to the tier, if there is one."""
        saved: list[tuple[int, int]] = []
        while len(self._free) < count:
            page, slot = self._tree.evict()
            self._counts["evictions"] += 1
            if slot != NOWHERE:
                saved.append((page, slot))
        if self.tier is not None and saved:
            try:
                self.tier.save([page for page, _ in saved], [slot for _, slot in saved])
            except BaseException:
                for _, slot in saved:
                    if slot in self._tree.in_slot:  # else it has gone with one before
                        self._tree.forget(self._tree.in_slot[slot])
                raise


def _copy_nothing(src: Sequence[int], dst: Sequence[int]) -> None:
    raise ValueError(f"pages {list(src)} to {list(dst)}: whole pages are shared")
