"""Iterators over what a request gives, plain and asynchronous. The request begins when the first item is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from exl.errors import ExlError

if TYPE_CHECKING:
    from exl.engine.handle import Handle
    from exl.engine.ticket import Event

T = TypeVar("T")


class Stream(Generic[T]):
    """An iterator that computes each item when it is asked for; also asynchronous, and a context manager.

    ``close()`` stops the request and frees what it holds; so does the end of a ``with`` block, and so does the garbage
    collector. In an event loop the engine's own thread computes, so that the loop stays free; it may be some hundred
    tokens ahead of its reader.
    """

    _handle: Handle[Any] | None = None
    _closed = False  # by its user
    _done = False  # there are no more items
    _ended_by: str | None = None  # the model has ended it, and why

    def __init__(
        self,
        start: Callable[[bool], Handle[Any]],
        item: Callable[[Event], T | None],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """``start(inline)`` makes the request. ``item``: what of an event is handed on; None: nothing. ``on_end`` is
        called once, however the stream ends."""
        self._start, self._item, self._on_end = start, item, on_end

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        handle = self._begun(inline=True)
        while handle is not None:
            try:
                event = handle.next_event()
            except BaseException:
                self._finish()
                raise
            if event is None:
                break
            item = self._item(event)
            if item is not None:
                return item
        self._finish()
        raise StopIteration

    def _begun(self, *, inline: bool) -> Handle[Any] | None:
        """The request, which is made now if it was not; None: there are no more items. Raises ``ExlError`` if the model
        has ended it."""
        if self._ended_by is not None:
            raise ExlError(self._ended_by)
        if self._closed or self._done:
            return None
        if self._handle is None:
            self._handle = self._start(inline)
        return self._handle

    def _finish(self) -> None:
        """No more items come."""
        if not self._done:
            self._done = True
            if self._handle is not None:
                self._handle.cancel()  # if it has not ended: after an error of the reader's own
            if self._on_end is not None:
                self._on_end()

    def close(self) -> None:
        """Stops the request: there are no more items. If another thread waits for one, it gets none."""
        if not self._done:
            self._closed = True
            self._finish()

    def end(self, reason: str) -> None:
        """Like ``close``, for the model: whoever asks for the next item gets an ``ExlError`` with this reason."""
        if not self._done:
            self._ended_by = reason
            self._finish()

    def __del__(self) -> None:
        self.close()

    def __enter__(self):  # -> Self, which Python 3.10 does not have
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.close()

    # ---- in an event loop

    def __aiter__(self):
        return self

    async def __anext__(self) -> T:
        handle = self._begun(inline=False)
        while handle is not None:
            try:
                event = await handle.anext_event()
            except BaseException:
                self._finish()
                raise
            if event is None:
                break
            item = self._item(event)
            if item is not None:
                return item
        self._finish()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """``close()``."""
        self.close()

    async def __aenter__(self):
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ):
        self.close()
