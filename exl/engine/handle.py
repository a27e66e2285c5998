"""A caller's side of a request: take its news one by one, in a thread or an event loop, or wait for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from exl.engine.seat import Seat
from exl.engine.ticket import Answer, Event, Ticket

Result = TypeVar("Result")
_LOOK = 0.25  # seconds between two looks at the engine, of a coroutine that waits


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class Handle(Generic[Result]):
    """One request. Iterating gives pieces of the first choice's text, in a thread or with ``async for``; ``events``
    gives all there is to know. ``cancel()`` or ``close()``, the end of a ``with`` block or dropping the handle ends the
    request; nobody else notices.

    A reader that takes pieces may be 512 tokens behind (``max_unread``); then the request waits for it. One whose
    pieces nobody takes runs to its end.
    """

    def __init__(self, seat: Seat, ticket: Ticket, finish: Callable[[list[Answer]], Result]) -> None:
        """``finish`` makes what ``result`` returns of the request's choices."""
        self._seat, self._ticket, self._finish = seat, ticket, finish
        self._result: Result | None = None

    # ---- threads

    def events(self) -> Iterator[Event]:
        """News as it comes, until the request has ended. Raises what ended it, if that was an error."""
        while (event := self.next_event()) is not None:
            yield event

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event; None: there are no more. Raises ``TimeoutError``, and what ended the request."""
        self._ticket.iterated = True
        event = self._seat.next_event(self._ticket, timeout)
        if event is None:
            self._raise()
            return None
        self._took(event)
        return event

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (event := self.next_event()) is not None:
            if event.text and event.choice == 0:
                return event.text
        raise StopIteration

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end. Raises ``TimeoutError`` after so many seconds, and what ended the request if that was an
        error; of a cancelled one the result is what there was."""
        until = None if timeout is None else time.monotonic() + timeout
        self._ticket.iterated = False  # nothing has to wait for this reader
        self._seat.taken(self._ticket, 0)
        while not (self._ticket.ended and self._ticket.outbox.empty()):
            left = None if until is None else until - time.monotonic()
            if self._seat.next_event(self._ticket, left) is None:
                break
        self._raise()
        return self._finished()

    def _finished(self) -> Result:
        if self._result is None:
            self._result = self._finish(self._ticket.answers)
        return self._result

    def _took(self, event: Event) -> None:
        self._seat.taken(self._ticket, event.num_tokens)

    def _raise(self) -> None:
        error = self._ticket.error
        if error is not None:
            raise error

    # ---- event loops

    async def aevents(self) -> AsyncIterator[Event]:
        """``events()`` for an event loop, which stays free. Leaving it early cancels the request."""
        try:
            while (event := await self.anext_event()) is not None:
                yield event
        finally:
            if not self._ticket.ended:
                self.cancel()

    async def anext_event(self) -> Event | None:
        """``next_event()`` for an event loop. If the waiting is cancelled, so is the request."""
        ticket = self._ticket
        ticket.iterated = True
        event = await self._anext()
        if event is None:
            self._raise()
            return None
        self._took(event)
        return event

    def ready_event(self) -> Event | None:
        """An event that has come already; None if a caller would have to wait for it. After ``anext_event``: whoever is
        late takes all there is at once."""
        while True:
            try:
                event = self._ticket.outbox.get_nowait()
            except queue.Empty:
                return None
            if event is not None:
                self._took(event)
                return event

    async def _anext(self) -> Event | None:
        """Sleeps until the engine's thread wakes this loop."""
        ticket, loop = self._ticket, asyncio.get_running_loop()
        while True:
            woken = loop.create_future()
            ticket.waiter = (loop, functools.partial(_wake, woken))  # before looking, so that no news is missed
            ended = ticket.ended
            if not ended:
                self._seat.guard.check()  # see Seat.next_event
            with contextlib.suppress(queue.Empty):
                event = ticket.outbox.get_nowait()
                if event is not None:
                    ticket.waiter = None
                    return event
                continue
            if ended:
                return None
            self._seat.attend(ticket)
            look = loop.call_later(_LOOK, _wake, woken)
            try:
                await woken
            except BaseException:  # the task was cancelled, or its loop is closed
                self.cancel()
                raise
            finally:
                look.cancel()

    def __aiter__(self) -> Handle[Result]:
        return self

    async def __anext__(self) -> str:
        while (event := await self.anext_event()) is not None:
            if event.text and event.choice == 0:
                return event.text
        raise StopAsyncIteration

    async def aresult(self) -> Result:
        """``result()`` for an event loop."""
        self._ticket.iterated = False
        self._seat.taken(self._ticket, 0)
        while await self._anext() is not None:
            pass
        self._raise()
        return self._finished()

    def __await__(self):
        return self.aresult().__await__()

    # ---- the end

    @property
    def status(self) -> str:
        """ "waiting", "running", "stop", "length", "cancelled" or "error"; of several choices, that of the first."""
        ticket = self._ticket
        if ticket.error is not None:
            return "error"
        outcome = ticket.answers[0].outcome
        if outcome is not None:
            return outcome.finish_reason
        return "running" if ticket.answers[0].began else "waiting"

    @property
    def answers(self) -> list[Answer]:
        """What has come of each choice so far."""
        return self._ticket.answers

    @property
    def is_complete(self) -> bool:
        """Whether the request has ended by itself."""
        return self._ticket.ended and self._ticket.error is None and not self._ticket.cancelled

    @property
    def cancelled(self) -> bool:
        return self._ticket.cancelled

    def cancel(self) -> None:
        """Ends the request: what it has made so far is its result. Does not wait."""
        self._seat.cancel(self._ticket)

    close = cancel

    async def aclose(self) -> None:
        self.cancel()

    def __enter__(self) -> Handle[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Handle[Result]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The engine holds the ticket, never the handle. No ``weakref.finalize``: that would hold the ticket for ever if
        # what ended it was raised from here, as its traceback holds the handle.
        self.cancel()

    def __repr__(self) -> str:
        num_tokens = sum(len(answer.token_ids) for answer in self._ticket.answers)
        return f"Handle({self.status}, {num_tokens} tokens so far)"
