"""Pages that nobody has, as the bits of one integer: a run of neighbours is found by a few shifts of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class FreePages:
    """A set of page numbers that gives neighbours where it can, since attention reads neighbours as one view.

    Each operation costs a pass or a few over one bit for each page: 16,384 pages (a million tokens) are 2 KB.
    """

    def __init__(self, start: int = 0, stop: int = 0) -> None:
        """All from ``start`` to before ``stop``."""
        self._bits = (1 << stop) - (1 << start)
        self._count = stop - start

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (page for page, bit in enumerate(reversed(f"{self._bits:b}")) if bit == "1")

    def add(self, pages: Iterable[int]) -> None:
        """Pages that are not in the set yet."""
        for page in pages:
            self._bits |= 1 << page
            self._count += 1

    def discard(self, page: int) -> None:
        """One page of the set."""
        self._bits &= ~(1 << page)
        self._count -= 1

    def clear(self) -> None:
        self._bits = self._count = 0

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Removes ``count`` pages, of at least as many. First those right behind ``after``; of the others the lowest
        run that has them all, else the lowest pages."""
        pages: list[int] = []
        if after is not None:
            pages += self._take_at(after + 1, count)
        rest = count - len(pages)
        start = self._first_run(rest) if rest else None
        if start is not None:
            pages += self._take_at(start, rest)
        while len(pages) < count:
            lowest = (self._bits & -self._bits).bit_length() - 1
            pages += self._take_at(lowest, count - len(pages))
        return pages

    def _take_at(self, start: int, count: int) -> list[int]:
        """Removes the pages from ``start`` on, at most ``count``, up to the first that is not in the set."""
        behind = self._bits >> start
        num = min(count, (~behind & behind + 1).bit_length() - 1)  # bits before the lowest zero
        self._bits &= ~(((1 << num) - 1) << start)
        self._count -= num
        return list(range(start, start + num))

    def _first_run(self, count: int) -> int | None:
        """Where the lowest run of ``count`` pages begins: bit i stays while pages i .. i + length - 1 are all here."""
        bits, length = self._bits, 1
        while length < count and bits:
            step = min(length, count - length)
            bits &= bits >> step
            length += step
        return (bits & -bits).bit_length() - 1 if bits else None
