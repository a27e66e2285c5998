"""Iterators over a request's results, and the turn: a model runs one request at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

from exl import forks
from exl.errors import ExlError

T = TypeVar("T")

# A request waits this long for a stream that nobody takes a piece of. Whoever forgot it is told, instead of hanging.
PATIENCE = 60.0  # seconds
_LOOK = 0.1  # seconds between two looks at the stream that has the turn
_BRIEF = 0.001  # the same for whoever ends that stream


class Ticket:
    """A request that has the turn, or waits for it."""

    def __init__(self) -> None:
        self.stream: weakref.ref[Stream[Any]] | None = None  # what its user holds
        self.thread: threading.Thread | None = None  # which took the last item
        self.idle_since: float | None = None  # None: it is computing
        self.num_tokens = 0  # that it has made so far
        self.closed = False  # its user has closed it while another thread was computing: to be seen after that item
        self.ended_by: str | None = None  # the model has ended it, and why

    def goes_on(self) -> bool:
        """False if its user has closed it. Raises ``ExlError`` if the model has ended it."""
        if self.ended_by is not None:
            raise ExlError(self.ended_by)
        return not self.closed


class Stream(Generic[T]):
    """An iterator that computes each item when it is asked for; also asynchronous, and a context manager.

    ``close()`` stops the request and frees what it holds; so does the end of a ``with`` block, and so does the garbage
    collector. Asynchronous iteration computes in a thread of the stream's own, so that the event loop stays free.
    """

    def __init__(self, items: Generator[T, None, None], ticket: Ticket) -> None:
        self._items, self._ticket = items, ticket
        self._executor: ThreadPoolExecutor | None = None
        ticket.stream = weakref.ref(self)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except StopIteration:
            if self._ticket.ended_by is not None:
                raise ExlError(self._ticket.ended_by) from None
            raise

    def close(self) -> None:
        """Stops the request: there are no more items. If another thread is computing one, that is the last."""
        self._ticket.closed = True
        with contextlib.suppress(ValueError):  # a generator that runs in another thread cannot be closed
            self._items.close()

    def end(self, reason: str) -> None:
        """Like ``close``, for the model: whoever asks for the next item gets an ``ExlError`` with this reason."""
        self._ticket.ended_by = reason
        with contextlib.suppress(ValueError):
            self._items.close()

    def __enter__(self):  # -> Self, which Python 3.10 does not have
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.close()

    # ---- in an event loop

    def __aiter__(self):
        return self

    async def __anext__(self) -> T:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="exl stream")
        item = asyncio.get_running_loop().run_in_executor(self._executor, self._next_or_end)
        try:
            found = await asyncio.shield(item)
            if found is not _END:
                return found  # type: ignore[return-value]
        except asyncio.CancelledError:
            item.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it any more
            self._ticket.closed = True  # seen after the item that the thread may be computing
            self._executor.submit(self.close)
            self._end_executor()
            raise
        except BaseException:
            self._end_executor()
            raise
        self._end_executor()
        raise StopAsyncIteration

    def _next_or_end(self) -> object:
        """A ``StopIteration`` cannot pass through a future."""
        return next(self, _END)

    def _end_executor(self) -> None:
        """Its thread ends after what it has been given."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    async def aclose(self) -> None:
        """``close()``, after the item that is being computed."""
        self._ticket.closed = True
        if self._executor is None:
            self.close()
            return
        closing = self._executor.submit(self.close)
        self._end_executor()
        await asyncio.wrap_future(closing)

    async def __aenter__(self):
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ):
        await self.aclose()


_END = object()
_OWN_CALLBACK = "a request of this model is running in this thread, and this call came from its callback"


class Turn:
    """Lets one request run at a time; the others wait in line.

    A stream keeps the turn between its items. Another request waits for it, since another thread may take the stream's
    next item; in a server, that is any thread of a pool. It does not wait for a stream that the same main thread has
    left unfinished, nor for one that nobody takes an item of for ``PATIENCE`` seconds: then it raises ``ExlError``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: Ticket | None = None
        forks.register(self)

    def before_fork(self) -> None:
        pass

    def after_fork(self, in_child: bool) -> None:
        """The thread that had the turn may not exist in the child."""
        if in_child:
            self._lock, self._holder = threading.Lock(), None

    def _give_back(self, lock: threading.Lock) -> None:
        if lock is self._lock:  # not in a fork that was made meanwhile
            self._holder = None
            lock.release()

    @contextlib.contextmanager
    def take(self, ticket: Ticket) -> Iterator[None]:
        """Waits for the turn and keeps it. Raises ``ExlError`` if it would never come."""
        lock = self._lock
        while not lock.acquire(timeout=_LOOK):
            self._check_holder()
            if not ticket.goes_on():
                raise ExlError("the stream was closed while it waited for another request of this model")
        try:
            ticket.thread, self._holder = threading.current_thread(), ticket
            yield
        finally:
            self._give_back(lock)

    @contextlib.contextmanager
    def take_over(self, reason: str) -> Iterator[None]:
        """Takes the turn from whoever has it: its stream is ended, after the item that it may be computing."""
        lock = self._lock
        while not lock.acquire(timeout=_BRIEF):
            holder = self._holder
            if holder is not None:
                self._end(holder, reason)
        try:
            yield
        finally:
            self._give_back(lock)

    def _end(self, holder: Ticket, reason: str) -> None:
        holder.ended_by = reason
        if holder.idle_since is None:
            if holder.thread is threading.current_thread():
                raise ExlError(_OWN_CALLBACK)
        elif (stream := holder.stream and holder.stream()) is not None:
            stream.end(reason)

    @contextlib.contextmanager
    def paused(self, ticket: Ticket) -> Iterator[None]:
        """Around a ``yield``: the request keeps the turn and computes nothing."""
        ticket.idle_since = time.monotonic()
        try:
            yield
        finally:
            ticket.thread, ticket.idle_since = threading.current_thread(), None

    def _check_holder(self) -> None:
        """Raises ``ExlError`` if waiting for the request that has the turn makes no sense."""
        holder, me = self._holder, threading.current_thread()
        if holder is None:
            return
        idle_since = holder.idle_since
        if holder.thread is me and idle_since is None:
            raise ExlError(_OWN_CALLBACK)
        if holder.thread is me and me is threading.main_thread():
            raise ExlError("another stream of this model is unfinished in this thread: exhaust it or close() it first")
        if idle_since is not None and time.monotonic() - idle_since > PATIENCE:
            raise ExlError(
                "another stream of this model is unfinished, and nobody has taken a piece of it for "
                f"{PATIENCE:.0f} s: exhaust it or close() it first"
            )
