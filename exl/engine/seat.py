"""Who drives: the thread of a caller whose requests are the only ones, else a thread of the engine's own.

A caller that is alone steps the scheduler itself until it has what it asked for: its latency is the model's, Ctrl-C
reaches it, and nothing is computed that nobody asked for. As soon as there are requests of another party, or a request
that nobody waits for in a thread of its own (``submit``, asynchronous streams), a thread of the engine's takes over
until all are done.

The seat is a lock that is held for a step, never while a caller has a result in its hands. What comes from outside a
step (new requests, requests that are given up) goes through the inbox, a ``SimpleQueue``: it may be put into from
anywhere, also from a finalizer that the garbage collector runs in the middle of a step.

Ctrl-C may come between any two operations, also while the seat is being taken or left, and again while that is being
mended. So whoever takes the seat says first that it is in use and last that it is not: who finds it torn mends it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from exl import forks
from exl.engine.scheduler import Scheduler
from exl.engine.ticket import Event, Ticket
from exl.errors import DeviceLostError, ExlError, QueueFullError, with_causes

Result = TypeVar("Result")
_LOOK = 0.25  # seconds between two looks whether the engine's thread is still there
_IDLE = 1.0  # seconds without a request after which that thread ends; a later request starts another
_JOIN = 10.0  # seconds that closing waits for the step in flight
_NAP = 0.005  # seconds between two looks of ``drain``
_OWN_CALLBACK = "a request of this model is running in this thread, and this call came from its callback"
_INTERRUPTED = "the request was interrupted, as its thread was in the middle of another one's step"
_DRAINED = "the model is being drained: it takes no more requests"


class Seat:
    def __init__(
        self,
        scheduler: Scheduler,
        guard: forks.ForkGuard,
        enter_thread: Callable[[], None],
        max_queue: int | None = None,
    ) -> None:
        """``enter_thread`` is called in the engine's thread before its first step: it chooses the device.
        ``max_queue``: how many requests may wait to begin."""
        self.scheduler, self.guard, self.max_queue = scheduler, guard, max_queue
        self._enter_thread = enter_thread
        self._closed: str | None = None
        self._broken: BaseException | None = None
        self._draining = False
        self._ending = False  # the process ends
        self._make_locks()
        forks.register(self)
        _seats.add(self)

    def _make_locks(self) -> None:
        # Reentrant only because such a lock knows its owner: a step is never begun inside of a step.
        self._lock = threading.RLock()
        self._torn = False  # somebody is in the seat, or was interrupted there
        self._held_for_fork = False
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # the engine's thread sleeps here
        self._live: dict[Ticket, None] = {}  # requests that have not ended, by arrival; and some that just have
        self._woken: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []  # coroutines with news
        self._start_lock = threading.Lock()  # guards the next two
        self._thread: threading.Thread | None = None
        self._threaded = False  # the engine's thread drives

    @property
    def failure(self) -> BaseException | None:
        """What has stopped the engine for good; None: it works. From any thread."""
        return self._broken

    @property
    def unfinished(self) -> list[Ticket]:
        """Requests that have not ended, by arrival. From any thread."""
        return [ticket for ticket in list(self._live) if not ticket.ended]

    # ---- requests, from any thread

    def submit(self, ticket: Ticket) -> None:
        """Raises ``ExlError`` if the model is closed, or does not work in this process; ``QueueFullError`` if too many
        requests wait."""
        self.check()
        self._check_queue()
        ticket.woken = self._woken
        self._live[ticket] = None
        try:
            self._put(lambda: self._admit(ticket))
            if self._needs_thread():
                self._start()
        except BaseException:
            self.cancel(ticket)
            raise

    def _check_queue(self) -> None:
        if self.max_queue is None:
            return
        unfinished, rows = self.unfinished, self.scheduler.device.max_sequences
        running = len(self.scheduler.running)
        waiting = sum(not ticket.began for ticket in unfinished)
        if waiting >= self.max_queue + max(0, rows - running):
            raise QueueFullError(
                f"the queue is full: {running} sequences run (max_sequences={rows}), and {waiting} requests wait "
                f"(max_queue={self.max_queue})"
            )

    def cancel(self, ticket: Ticket) -> None:
        """The request gets no more rows. Never waits: it is done at once if nobody drives now, else by who does."""
        if not ticket.ended and not ticket.cancelled:
            self._put(lambda: self._cancel(ticket))
            ticket.cancelled = True  # not before: an interrupt may come between the two
            self._look_after()

    def attend(self, ticket: Ticket) -> None:
        """The engine's thread takes over this request, if it does not drive already: its reader cannot."""
        ticket.party = None
        if ticket in self._live and not self._is_served():
            self._start()
            if self._ending:
                raise ExlError("the process ends, and no event loop is waited for any more")

    def taken(self, ticket: Ticket, num_tokens: int) -> None:
        """A reader has taken tokens: if its request waited for that, it goes on."""
        waited = ticket.iterated and ticket.num_put - ticket.num_taken >= ticket.max_unread
        ticket.num_taken += num_tokens
        if waited and self._threaded:
            self._wake.put(None)

    def check(self) -> None:
        """Raises ``ExlError`` if no request can be made from here."""
        self.guard.check()
        if self._closed is not None:
            raise ExlError(self._closed)
        if self._broken is not None:
            raise self._stopped() from self._broken
        if self._in_own_step():
            raise ExlError(_OWN_CALLBACK)
        if self._draining:
            raise ExlError(_DRAINED)

    def close(self, reason: str) -> None:
        """Ends all requests with this reason, after the step in flight. Raises ``ExlError`` if this thread is in it."""
        if self._in_own_step():
            raise ExlError(_OWN_CALLBACK)
        self._closed = reason  # from now on, whoever sits down ends all requests
        while self._hold(self._shut, _LOOK) is None:
            pass
        with self._start_lock:
            thread = self._thread
        if thread is not None:
            self._wake.put(None)
            thread.join(_JOIN)

    def drain(self, seconds: float) -> bool:
        """Takes no more requests; those that there are may go on for so many seconds, then they are cancelled. Returns
        whether all had ended by themselves. Raises ``ExlError`` if this thread is in a step."""
        if self._in_own_step():
            raise ExlError(_OWN_CALLBACK)
        self._draining = True
        until = time.monotonic() + seconds
        while (left := self.unfinished) and time.monotonic() < until:
            self._start()  # also for those whose reader drives, if it is reading
            time.sleep(_NAP)
        for ticket in left:
            self.cancel(ticket)
        until = time.monotonic() + _JOIN
        while self.unfinished and time.monotonic() < until:
            time.sleep(_NAP)
        return not left

    def apart(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, called between two steps: nothing else runs meanwhile. Its errors are raised here."""
        self.check()
        found: list[Result] = []

        def between() -> bool:
            self._intake()
            found.append(work())
            return True

        while self._hold(between, _LOOK, torn=self._not_torn) is None:
            self.check()
        return found[0]

    def _not_torn(self, error: BaseException) -> None:
        """After an error of work that leaves requests as they are."""
        if isinstance(error, Exception):
            self._torn = False
        else:
            self._mend(error)

    # ---- who sits

    def _hold(
        self, work: Callable[[], bool], timeout: float = -1, torn: Callable[[BaseException], None] | None = None
    ) -> bool | None:
        """What ``work`` returns, called in the seat. None: it was not free in ``timeout`` seconds. ``torn`` is called
        in it after an exception."""
        try:
            if not self._lock.acquire(timeout=timeout):
                return None
            if self._torn:
                self._mend()
            self._torn = True
            found = work()
            self._torn = False
            return found
        except BaseException as error:
            if self._lock._is_owned() and self._torn:
                (torn or self._mend)(error)
            raise
        finally:
            if self._lock._is_owned():  # Ctrl-C may come between taking it and the next statement
                self._lock.release()

    def _in_own_step(self) -> bool:
        """Whether this thread is in the seat. One that was interrupted just when it left may still have the lock: then
        it leaves now."""
        if not self._lock._is_owned():
            return False
        frame, hold = sys._getframe(), Seat._hold.__code__
        while frame is not None:
            if frame.f_code is hold and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        while self._lock._is_owned():
            self._lock.release()
        return False

    def _interrupted(self, error: BaseException, own: Ticket) -> None:
        if isinstance(error, DeviceLostError):
            self._break(error)
        else:
            self._mend(error, own)

    def _mend(self, error: BaseException | None = None, own: Ticket | None = None) -> None:
        """After an interrupt, which may have come anywhere: ends the requests that have begun, as nothing is known of
        them. Those are all of the party of the interrupted thread, whose request ``own`` is just cancelled; others, if
        there are, have not begun: they go on."""
        begun = [ticket for ticket in list(self._live) if ticket.sequences or ticket is own]
        ended = ExlError(_INTERRUPTED)
        ended.__cause__ = error
        self._end(begun, ended, own)
        for ticket in self.unfinished:  # on its way from the inbox to the scheduler, maybe
            self._inbox.put(lambda ticket=ticket: self._admit(ticket))
        self._torn = False

    def _shut(self) -> bool:
        self._intake()
        self._end(list(self._live), ExlError(self._closed))
        return True

    def _end(self, tickets: list[Ticket], error: ExlError, own: Ticket | None = None) -> None:
        """Ends requests, among them all that have begun, wherever they are."""
        try:
            if not self.guard.is_lost:
                self.scheduler.drop_all(tickets)
        except Exception:
            if self._broken is None:
                raise
        finally:
            for ticket in tickets:
                if ticket is own:
                    ticket.cancelled = True
                    self.scheduler.answers.refused(ticket)
                else:
                    ticket.end(error)
            self._forget_ended()

    # ---- the inbox

    def _put(self, what: Callable[[], None]) -> None:
        self._inbox.put(what)
        if self._threaded:
            self._wake.put(None)

    def _intake(self) -> None:
        while not self._inbox.empty():  # asked first, in each step: an exception takes longer
            try:
                what = self._inbox.get_nowait()
            except queue.Empty:
                return
            what()

    def _admit(self, ticket: Ticket) -> None:
        if ticket.ended or ticket.sequences:
            return
        if self._closed is not None:
            ticket.end(ExlError(self._closed))
        elif self._broken is not None:
            ticket.end(self._stopped())
        elif ticket.cancelled:
            self.scheduler.answers.refused(ticket)
        else:
            try:
                self.scheduler.submit(ticket)
            except Exception as error:
                self.scheduler.fail(ticket, error)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        ticket.cancelled = True
        if ticket.sequences:
            self.scheduler.cancel(ticket)
        else:
            self.scheduler.answers.refused(ticket)

    def _look_after(self) -> None:
        """What is in the inbox is done now, and what is torn mended, if nobody drives. A finalizer may call this in the
        middle of a step of the same thread: then the step's end does it."""
        while self._torn or not self._inbox.empty():
            if self._threaded or self.guard.is_lost or self._in_own_step() or self._hold(self._tidy, timeout=0) is None:
                return

    def _tidy(self) -> bool:
        self._intake()
        self._forget_ended()
        return True

    def _forget_ended(self) -> None:
        for ticket in [ticket for ticket in list(self._live) if ticket.ended]:
            self._live.pop(ticket, None)
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
            if not ended:
                self.guard.check()  # also before events that had come: in a fork they would be half an answer
            if not ticket.outbox.empty():
                with contextlib.suppress(queue.Empty):  # another reader has taken it
                    event = ticket.outbox.get_nowait()
                    if event is not None:
                        return event
                continue
            if ended:
                return None
            if until is not None and time.monotonic() >= until:
                raise TimeoutError("there is no news of the request in time; it goes on")
            if self._drive(ticket, until):
                continue
            with contextlib.suppress(queue.Empty):
                event = ticket.outbox.get(timeout=_wait(until))
                if event is not None:
                    return event

    def _drive(self, ticket: Ticket, until: float | None) -> bool:
        """Steps until the ticket has news, if somebody takes them one by one, else until it has ended. False: the
        engine's thread drives, or another one of the same party."""
        if self._in_own_step():
            raise ExlError(_OWN_CALLBACK)
        if not self._threaded and self._needs_thread():
            self._start()
        if self._closed is not None:
            return self._hold(self._shut, _wait(until)) is not None
        if self._threaded:
            if not self._is_served():
                self._start()
            return False
        try:
            return (
                self._hold(
                    lambda: self._steps(ticket, until), _wait(until), lambda error: self._interrupted(error, ticket)
                )
                is not None
            )
        finally:
            self._look_after()

    def _steps(self, ticket: Ticket, until: float | None) -> bool:
        while not ticket.ended and not self._threaded and self._closed is None:
            if ticket.iterated and not ticket.outbox.empty():
                break
            if until is not None and time.monotonic() >= until:
                break
            self._intake()
            if not self.scheduler.step() and ticket.outbox.empty() and not ticket.ended and self._inbox.empty():
                raise ExlError("this request has nothing to run: its model was used while it was being closed")
        self._forget_ended()
        return True

    # ---- the engine's thread

    def _needs_thread(self) -> bool:
        live = list(self._live)
        if len(live) == 1 and live[0].party is not None:
            return False
        parties = {ticket.party for ticket in live if not ticket.ended}
        return not self._ending and (None in parties or len(parties) > 1)

    def _is_served(self) -> bool:
        thread = self._thread
        return self._threaded and thread is not None and thread.is_alive()

    def _start(self) -> None:
        """The engine's thread drives from here on, if there is anything to do."""
        with self._start_lock:
            if self._ending:
                return
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._serve, name="exl engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise ExlError(f"the engine could not start its thread: {error}") from error
                self._thread = thread
            if not self._threaded:
                self._threaded = True
                self._wake.put(None)

    def _serve(self) -> None:
        try:
            self._enter_thread()
            while self._serve_some():
                pass
        except BaseException as error:
            if self._broken is None:  # it could not begin
                with contextlib.suppress(BaseException):
                    self._hold(functools.partial(self._break, error))
            with self._start_lock:
                self._thread, self._threaded = None, False

    def _serve_some(self) -> bool:
        """A step, or a nap. False: there has been nothing to do for a while, and the thread ends."""
        if self._hold(self._turn, torn=self._break):
            return True
        leaves = self._closed is not None or self._ending
        with self._start_lock:
            if not self._live or leaves:
                self._threaded = False
        if not leaves and ((self._threaded and not self._inbox.empty()) or self._nap()):
            return True
        with self._start_lock:
            if not leaves and (self._threaded or not self._wake.empty()):
                return True
            self._thread = None
            return False

    def _turn(self) -> bool:
        if self._closed is not None:
            return not self._shut()
        self._intake()
        worked = self._threaded and not self._ending and self.scheduler.step()
        self._forget_ended()
        return worked

    def _nap(self) -> bool:
        """Whether somebody has called. One look at the inbox then serves all who have."""
        try:
            self._wake.get(timeout=_IDLE)
        except queue.Empty:
            return False
        with contextlib.suppress(queue.Empty):
            while True:
                self._wake.get_nowait()
        return True

    def _break(self, error: BaseException) -> bool:
        """Nothing runs any more; every caller learns why."""
        self._broken = error
        stopped = self._stopped()
        self._end(list(self._live), stopped)
        self._torn = False
        return False

    def _stopped(self) -> ExlError:
        error = ExlError(f"the engine has stopped: {with_causes(self._broken)}")
        error.__cause__ = self._broken
        return error

    def end(self) -> None:
        """The process ends: the thread must not be in the middle of a step then. Whoever still wants something drives
        from here on."""
        self._ending = True
        with self._start_lock:
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._wake.put(None)
            thread.join(_JOIN)

    # ---- forks

    def before_fork(self) -> None:
        """No step is in progress when the process is forked, unless one is for a request that runs: then the child may
        use nothing of this anyway."""
        self._held_for_fork = not self.unfinished and self._lock.acquire(timeout=_LOOK)

    def after_fork(self, in_child: bool) -> None:
        """The thread does not exist in the child, and whoever held a lock may not either. Where a request was running,
        nothing can be asked any more; else the engine starts anew."""
        if in_child:
            if self.unfinished:
                self.guard.lose()
            self._make_locks()
        elif self._held_for_fork:
            self._held_for_fork = False
            self._lock.release()


def _wait(until: float | None) -> float:
    """Seconds until the next look."""
    return _LOOK if until is None else max(0.0, min(_LOOK, until - time.monotonic()))


_seats: weakref.WeakSet[Seat] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    for seat in list(_seats):
        seat.end()
