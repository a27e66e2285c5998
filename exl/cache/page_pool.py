"""Which sequence holds which page of the cache, and which pages a later prompt may reuse as its prefix. Host only.

A page is *held* by one or more sequences (counted), *kept* (nobody holds it, but its tokens are known and a prompt may
reuse it), *dirty* (its bytes must be zeroed before somebody else has it) or *free*. If free pages run out, kept pages
are evicted, least recently used first, the end of a text before its beginning.

A page is written only behind the tokens that are remembered of it, and only by a sequence that is its single holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from exl.batch import PAGE_SIZE
from exl.cache.free_pages import FreePages
from exl.cache.prefix_tree import NOWHERE, KnownPage, PrefixNode, PrefixPath, PrefixTree
from exl.errors import MemoryBudgetError
from exl.layout.window import pages_behind

if TYPE_CHECKING:
    import torch

CopyPages = Callable[[Sequence[int], Sequence[int]], None]  # (src, dst), as ``KVCache.copy_pages``


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


class PagePool:
    """Holders of pages, free pages, and the tree of known prefixes."""

    def __init__(
        self,
        num_pages: int,
        *,
        null: bool = False,
        tier: Tier | None = None,
        zero: Callable[[list[int]], None] | None = None,
    ) -> None:
        """``null``: page 0 is never given away and stays zeroed; it stands in tables of pages for pages that a sequence
        has given back because no window reaches them. It may be held and released, which does nothing. ``tier``: takes
        the bytes of full pages that are evicted, and gives them back. ``zero`` is called with pages that may hold what
        is no number (``doubt``), before somebody gets them to write to; None: they are given as they are."""
        self.num_pages = num_pages
        self.null_page = 0 if null else None
        self._num_usable = num_pages - null
        self._free = FreePages(int(null), num_pages)
        self._holders = [0] * num_pages
        self._epochs = [0] * num_pages
        self._tree = PrefixTree(self._free, tier.num_slots if tier else 0, self.null_page)
        self._dirty: set[int] = set()
        self._doubted: set[int] = set()
        self._zero = zero
        self.tier = tier
        self._counts: Counter[str] = Counter()

    @property
    def num_free(self) -> int:
        """Allocatable pages: free + kept."""
        return len(self._free) + len(self._tree.kept)

    @property
    def num_usable(self) -> int:
        """All pages but the null page."""
        return self._num_usable

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that a prompt may reuse."""
        return len(self._tree.kept)

    @property
    def stats(self) -> PoolStats:
        return PoolStats(**self._counts)

    # ---- pages of a sequence ----------------------------------------------------------------------------------------

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
                if not self._holders[page] and page not in self._tree.kept:
                    raise ValueError(f"page {page} is free: expected one that is held or kept")
                self._tree.kept.pop(page, None)
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
            if page in self._tree.on_page:
                self._tree.kept[page] = None
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
            node = self._tree.on_page.get(pages[i])
            if node is not None and (i > first or len(node.tokens) > rest):
                self._tree.forget(node)
            self._epochs[pages[i]] += 1  # a sequence that is paused may have had this page, too

    def poison(self, pages: Iterable[int]) -> None:
        """The bytes of these pages are not numbers. Those with a single holder, and all that was known to follow them,
        are forgotten; once released they wait for ``clean``. Other holders' pages were good when they came to them."""
        for page in pages:
            if page != self.null_page and self._holders[page] == 1:
                if page in self._tree.on_page:
                    self._tree.forget(self._tree.on_page[page])
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

    # ---- known prefixes ---------------------------------------------------------------------------------------------

    def find(self, ids: Sequence[int], *, exact: bool = False, multiple: int = 1) -> PrefixMatch:
        """The longest known beginning of a text. ``exact``: only tokens with the bits of a cold run. Its length is cut
        to a multiple of ``multiple``. Holds and changes nothing."""
        path = self._tree.find(ids, exact=exact, multiple=multiple)
        pages = tuple(node.page for node in path.nodes if not node.is_away)
        return PrefixMatch(path.num_tokens, path.num_exact, pages)

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
        path = self._tree.find(ids, exact=exact, multiple=multiple)
        if path.last is not None and path.last.page in self._doubted:  # what stands behind is another text's
            path = replace(path, last=None, num_last=0)
        if window is not None:
            path = path.without(pages_behind(window, len(path.nodes) * PAGE_SIZE))
            num_pages = min(num_pages - path.num_passed, most)
        room = self.num_free - sum(node.page in self._tree.kept for node in path.nodes)
        path, in_place = self._fit(path, room - spare, num_pages)
        num_missing = len(path.away)
        num_behind = max(num_pages - len(path.nodes), path.last is not None) - in_place
        room -= path.last is not None and path.last.page in self._tree.kept
        self._check_room(num_missing + num_behind + spare, room)
        self._counts.update(lookups=len(ids) > 0, hits=path.num_tokens > 0, tokens_reused=path.num_tokens)
        pages = self._take(path, in_place, num_missing, num_behind, copy)
        if path.num_passed:
            pages[:0] = [self._null] * path.num_passed
        return TakenPrefix(pages, path.num_tokens, path.num_exact, path.num_passed)

    def remember(self, ids: Sequence[int], pages: Sequence[int], num_exact: int | None = None) -> None:
        """Enters a sequence's pages into the tree: ``pages`` hold ``ids``; the last may be partly filled. To be called
        again when the sequence has grown; only the new part costs time.

        ``num_exact``: its first tokens that have the bits of a cold run (None: all). Where the tree has the text on
        another page, that one stays if somebody holds it or if it is exact where the new one is not.
        """
        usable = next((i for i, page in enumerate(pages) if page in self._dirty), len(pages)) if self._dirty else None
        self._tree.remember(ids, pages[:usable], len(ids) if num_exact is None else num_exact)

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

    def clear(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Forgets all prefixes. ``holders``: the lists of pages that are in use, from which the counts are made anew,
        after an interruption that ``check`` has found to have left them wrong."""
        self._tree = PrefixTree(self._free, self.tier.num_slots if self.tier else 0, self.null_page)
        if holders is not None:
            self._holders = self._count_holders(holders)
            self._epochs = [epoch + 1 for epoch in self._epochs]
        unusable = {*self._dirty, self.null_page}
        self._free.clear()
        self._free.add(page for page in range(self.num_pages) if not self._holders[page] and page not in unusable)

    def _count_holders(self, holders: Iterable[Sequence[int]]) -> list[int]:
        counts = Counter(page for pages in holders for page in pages if page != self.null_page)
        return [counts[page] for page in range(self.num_pages)]

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raises ``RuntimeError`` unless every page is in one place and the tree is in order. ``holders``: the lists of
        pages that are in use, which must give the counts."""
        free = set(self._free)
        if len(self._free) != len(free):
            raise RuntimeError(f"{len(self._free)} free pages are counted, there are {len(free)}")
        for page in range(self.num_pages):
            places = [
                *(["null"] if page == self.null_page else []),
                *(["free"] if page in free else []),
                *(["held"] if self._holders[page] else []),
                *(["kept"] if page in self._tree.kept else []),
                *(["dirty"] if page in self._dirty and not self._holders[page] else []),
            ]
            if len(places) != 1:
                raise RuntimeError(f"page {page} is {' and '.join(places) or 'lost'}")
        if holders is not None:
            for page, count in enumerate(self._count_holders(holders)):
                if self._holders[page] != count:
                    raise RuntimeError(f"page {page} counts {self._holders[page]} holders, {count} have it")
        self._tree.check()
        if self._dirty & self._tree.on_page.keys():
            raise RuntimeError("a page is known that is to be zeroed")

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _check_room(self, count: int, room: int) -> None:
        if count > room:
            raise MemoryBudgetError(
                f"KV cache: {count} pages of {PAGE_SIZE} tokens requested, {room} of {self._num_usable} available"
            )

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

    def _hold_unchanged(self, page: int) -> None:
        if not self._holders[page] and page not in self._tree.kept:
            self._free.discard(page)
            self._holders[page] = 1
        else:
            self.hold([page])

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
