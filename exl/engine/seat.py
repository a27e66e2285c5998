"""Who drives: the thread of a caller whose requests are the only ones, else a thread of the engine's own.

A caller that is alone steps the scheduler itself until it has what it asked for: its latency is the model's, Ctrl-C
reaches it, and nothing is computed that nobody asked for. As soon as there are requests of another party, or a request
that nobody waits for in a thread of its own (``submit``, asynchronous streams), a thread of the engine's takes over
until all are done.

The seat is a lock that is held for a step, never while a caller has a result in its hands. What comes from outside a
step (new requests, requests that are given up) goes through the inbox, a ``SimpleQueue``: it may be put into from
anywhere, also from a finalizer that the garbage collector runs in the middle of a step.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from exl import forks
from exl.engine.scheduler import Scheduler
from exl.engine.ticket import Event, Ticket
from exl.errors import ExlError

_LOOK = 0.25  # seconds between two looks whether the engine's thread is still there
_IDLE = 1.0  # seconds without a request after which that thread ends; a later request starts another
_JOIN = 10.0  # seconds that closing waits for the step in flight
_OWN_CALLBACK = "a request of this model is running in this thread, and this call came from its callback"
_INTERRUPTED = "the request was interrupted, as its thread was in the middle of another one's step"


class Seat:
    def __init__(self, scheduler: Scheduler, guard: forks.ForkGuard, enter_thread: Callable[[], None]) -> None:
        """``enter_thread`` is called in the engine's thread before its first step: it chooses the device."""
        self.scheduler, self.guard = scheduler, guard
        self._enter_thread = enter_thread
        self._closed: str | None = None
        self._broken: BaseException | None = None
        self._make_locks()
        forks.register(self)
        _seats.add(self)

    def _make_locks(self) -> None:
        # Reentrant only because such a lock knows its owner: a step is never begun inside of a step.
        self._lock = threading.RLock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # the engine's thread sleeps here
        self._live: dict[Ticket, None] = {}  # requests that have not ended, by arrival
        self._woken: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []  # coroutines with news
        self._start_lock = threading.Lock()  # guards the next two
        self._thread: threading.Thread | None = None
        self._threaded = False  # the engine's thread drives

    # ---- requests, from any thread

    def submit(self, ticket: Ticket) -> None:
        """Raises ``ExlError`` if the model is closed, or does not work in this process."""
        self.check()
        self.guard.begin()
        ticket.woken = self._woken
        self._live[ticket] = None
        self._put(lambda: self._admit(ticket))
        if self._needs_thread():
            self._start()

    def cancel(self, ticket: Ticket) -> None:
        """The request gets no more rows. Never waits: it is done at once if nobody drives now, else by who does."""
        if not ticket.ended and not ticket.cancelled:
            ticket.cancelled = True
            self._put(lambda: self._cancel(ticket))
            self._look_after()

    def attend(self, ticket: Ticket) -> None:
        """The engine's thread takes over this request, if it does not drive already: its reader cannot."""
        ticket.party = None
        if not self._threaded and ticket in self._live:
            self._start()

    def taken(self, ticket: Ticket, num_tokens: int) -> None:
        """A reader has taken tokens: if its request waited for that, it goes on."""
        lagged = ticket.lags
        ticket.num_taken += num_tokens
        if lagged and self._threaded:
            self._wake.put(None)

    def check(self) -> None:
        """Raises ``ExlError`` if no request can be made from here."""
        self.check_open()
        if self._lock._is_owned():
            raise ExlError(_OWN_CALLBACK)

    def check_open(self) -> None:
        """Raises ``ExlError`` if the model is closed, or does not work in this process."""
        self.guard.check()
        if self._closed is not None:
            raise ExlError(self._closed)
        if self._broken is not None:
            raise ExlError(f"the engine has stopped: {self._broken}") from self._broken

    def close(self, reason: str) -> None:
        """Ends all requests with this reason, after the step in flight. Raises ``ExlError`` if this thread is in it."""
        if self._lock._is_owned():
            raise ExlError(_OWN_CALLBACK)
        self._closed = reason
        with self._driving():
            self._intake()
            self._end_all(ExlError(reason))
        with self._start_lock:
            thread = self._thread
        if thread is not None:
            self._wake.put(None)
            thread.join(_JOIN)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Between two steps, after the one in flight: nothing else runs meanwhile."""
        self.check()
        with self._driving():
            self.check_open()
            yield

    # ---- the inbox

    def _put(self, what: Callable[[], None]) -> None:
        self._inbox.put(what)
        if self._threaded:
            self._wake.put(None)

    def _intake(self) -> None:
        while True:
            try:
                what = self._inbox.get_nowait()
            except queue.Empty:
                return
            what()

    def _admit(self, ticket: Ticket) -> None:
        if self._closed is not None:
            ticket.end(ExlError(self._closed))
        elif ticket.cancelled:
            self.scheduler.answers.refused(ticket)
        else:
            try:
                self.scheduler.submit(ticket)
            except Exception as error:
                self.scheduler.fail(ticket, error)

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.ended:
            self.scheduler.cancel(ticket)

    def _look_after(self) -> None:
        """What is in the inbox is done now, if nobody drives. A finalizer may call this in the middle of a step of the
        same thread: then the step's end does it."""
        while not self._inbox.empty() and not self._threaded and not self._lock._is_owned():
            if not self._lock.acquire(blocking=False):
                return
            try:
                self._intake()
                self._forget_ended()
            finally:
                self._lock.release()

    def _forget_ended(self) -> None:
        for ticket in [ticket for ticket in list(self._live) if ticket.ended]:
            del self._live[ticket]
            self.guard.end()
        if self._woken:
            self._wake_coroutines()

    def _wake_coroutines(self) -> None:
        """One callback for each event loop."""
        woken, self._woken[:] = list(self._woken), []
        for loop in {loop for loop, _ in woken}:
            wakes = [wake for other, wake in woken if other is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: its handles are dropped, too
                loop.call_soon_threadsafe(lambda wakes=wakes: [wake() for wake in wakes])

    # ---- callers' threads

    def next_event(self, ticket: Ticket, timeout: float | None = None) -> Event | None:
        """Drives, or waits for whoever does, until the ticket has news; None: it has ended. Raises ``TimeoutError``."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            ended = ticket.ended  # first: all events are put before it is set
            with contextlib.suppress(queue.Empty):
                event = ticket.outbox.get_nowait()
                if event is not None:
                    return event
                continue
            if ended:
                return None
            self.guard.check()
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"no result within {timeout} s")
            if self._drive(ticket, until):
                continue
            wait = _LOOK if until is None else max(0.0, min(_LOOK, until - time.monotonic()))
            with contextlib.suppress(queue.Empty):
                event = ticket.outbox.get(timeout=wait)
                if event is not None:
                    return event

    def _drive(self, ticket: Ticket, until: float | None) -> bool:
        """Steps until the ticket has news. False: the engine's thread drives, or another one of the same party."""
        if self._lock._is_owned():
            raise ExlError(_OWN_CALLBACK)
        if self._needs_thread():
            self._start()
        if self._threaded:
            return False
        try:
            if not self._lock.acquire(timeout=_LOOK):
                return False
            while ticket.outbox.empty() and not ticket.ended and not self._threaded:
                if until is not None and time.monotonic() >= until:
                    break
                self._intake()
                if not self.scheduler.step() and ticket.outbox.empty() and not ticket.ended and self._inbox.empty():
                    raise ExlError("this request has nothing to run: its model was used while it was being closed")
            self._forget_ended()
            return True
        except BaseException as error:
            if self._lock._is_owned():
                self._interrupted(ticket, error)
            raise
        finally:
            if self._lock._is_owned():  # Ctrl-C may come between taking it and the next statement
                self._lock.release()
            self._look_after()

    def _interrupted(self, ticket: Ticket, error: BaseException) -> None:
        """Ctrl-C may fall anywhere in a step. Only requests of this party are live: all of them end."""
        self._end_all(ExlError(_INTERRUPTED), but=ticket)

    def _end_all(self, error: ExlError, but: Ticket | None = None) -> None:
        tickets = list(self._live)
        self.scheduler.drop_all(tickets)
        for ticket in tickets:
            ticket.end(None if ticket is but else error)
        self._forget_ended()

    @contextlib.contextmanager
    def _driving(self) -> Iterator[None]:
        try:
            self._lock.acquire()
            yield
        finally:
            if self._lock._is_owned():
                self._lock.release()

    # ---- the engine's thread

    def _needs_thread(self) -> bool:
        parties = {ticket.party for ticket in list(self._live)}
        return None in parties or len(parties) > 1

    def _start(self) -> None:
        with self._start_lock:
            self._threaded = True
            self._wake.put(None)
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._serve, name="exl engine", daemon=True)
                self._thread.start()

    _ending = False  # the process ends

    def _serve(self) -> None:
        try:
            self._enter_thread()
            while self._serve_some():
                pass
        except BaseException as error:
            self._break(error)

    def _serve_some(self) -> bool:
        """A step, or a nap. False: there has been nothing to do for a while, and the thread ends."""
        worked = False
        with self._driving():
            self._intake()
            if self._threaded and not self._ending:
                worked = self.scheduler.step()
            self._forget_ended()
        if worked:
            return True
        with self._start_lock:
            if not self._live or self._ending:
                self._threaded = False
        if not self._inbox.empty() and self._threaded:
            return True
        try:
            self._wake.get(timeout=_IDLE)
            return True
        except queue.Empty:
            pass
        with self._start_lock:
            if self._threaded or not self._wake.empty():
                return True
            self._thread = None
            return False

    def _break(self, error: BaseException) -> None:
        """Nothing runs any more; every caller learns why."""
        self._broken = error
        with self._driving(), contextlib.suppress(Exception):
            self._end_all(ExlError(f"the engine has stopped: {error}"))
        with self._start_lock:
            self._thread, self._threaded = None, False

    def end(self) -> None:
        """The process ends: the thread must not be in the middle of a step then."""
        self._ending = True
        with self._start_lock:
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._wake.put(None)
            thread.join(_JOIN)

    # ---- forks

    def before_fork(self) -> None:
        pass

    def after_fork(self, in_child: bool) -> None:
        """The thread does not exist in the child, and whoever held a lock may not either. Where a request was running,
        the guard lets nothing be asked any more; else the engine starts anew."""
        if in_child:
            self._make_locks()


_seats: weakref.WeakSet[Seat] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    for seat in list(_seats):
        seat.end()
