"""Which models are in memory: loaded when asked for, unloaded for others, never under a request.

One model at a time is loaded or unloaded, in the order in which they were first asked for. Models that must go for it
yield: from then on their new requests wait behind it, those that run end, and then they are unloaded. So a model with
a constant stream of requests cannot keep another one waiting for ever, and of two that take turns each turn serves all
who have come meanwhile. All methods are for the event loop's thread where nothing else is said.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from exl.errors import DeviceLostError, ExlError, MemoryBudgetError, chain_of
from exl.llm import LLM
from exl.memory.host import trim_heap
from exl.server.budget import Sizes, choose_to_unload, left_beside, own_bytes, room_for
from exl.server.errors import RETRY_SECONDS, ApiError
from exl.server.loading import Loader
from exl.server.served import ServedModel

T = TypeVar("T")
LOG = logging.getLogger("exl.server")
MAX_WAIT = 600.0  # seconds that a request waits for its model, where nobody says less
_RETRY_LOAD = 5.0  # seconds after a load that failed in which requests get its error, and nothing is tried
_LOOK = 1.0  # seconds between two looks for idle models, at most


class LoadStoppedError(ExlError):
    """The server ends while a model is being loaded."""


@dataclass(eq=False)
class ModelState:
    """One model that clients may name."""

    name: str
    loader: Loader
    aliases: tuple[str, ...] = ()
    status: str = "unloaded"  # "loading", "loaded", "unloading", "failed"
    share: float = 0.0  # of its bytes that are loaded
    error: str | None = None  # why it could not be loaded
    served: ServedModel | None = None
    num_users: int = 0  # requests that hold it
    own: Sizes = field(default_factory=dict)  # bytes that it holds by memory, without what models share
    last_used: float = 0.0  # seconds of time.monotonic
    # The residency's own:
    cause: Exception | None = None  # of the last load
    failed_at: float = 0.0
    yields: bool = False  # another model gets its memory: new requests wait
    may_leave: bool = True  # its task waits for others, so it can be cancelled
    waiters: list[asyncio.Future[bool]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def loaded(self) -> ServedModel:
        """For whoever holds it."""
        if self.served is None:
            raise ExlError(f"{self.name}: the model is not loaded")
        return self.served

    @property
    def is_busy(self) -> bool:
        return self.num_users > 0

    @property
    def is_ready(self) -> bool:
        """It is loaded, and its engine works."""
        return self.status == "loaded" and self.served is not None and self.served.llm.failure is None

    def __repr__(self) -> str:
        return f"ModelState({self.name!r}, {self.status}, {self.num_users} users)"


class Residency:
    def __init__(
        self,
        budgets: Callable[[], Sizes] = dict,
        make_served: Callable[[LLM, str], ServedModel] = ServedModel,
        *,
        max_wait: float = MAX_WAIT,
        max_waiting: int = 512,
        idle_unload: float | None = None,
    ) -> None:
        """``budgets``: of all models together, by memory; called in a thread. ``max_wait``: seconds that a request
        waits for its model, ``max_waiting``: how many may. ``idle_unload``: seconds without a request."""
        self._budgets, self._make_served = budgets, make_served
        self._max_wait, self._max_waiting, self._idle_unload = max_wait, max_waiting, idle_unload
        self.held: list[ModelState] = []  # that are in memory, by when they were loaded
        self.lost: str | None = None  # the GPU answers no more: only another process can load a model
        self._turn = asyncio.Lock()  # who has it loads and unloads
        self._num_waiting = 0
        self._closing = threading.Lock()  # guards the next two
        self._open: set[LLM] = set()
        self._closed = False
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Future[Any]] = set()  # an event loop alone does not keep them
        self._wanted: dict[ModelState, None] = {}  # that are being loaded, or wait for their turn

    def start(self) -> None:
        """In a running event loop."""
        self._loop = asyncio.get_running_loop()
        if self._idle_unload is not None:
            self._spawn(self._unload_idle(self._idle_unload))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- requests

    async def lease(self, state: ModelState, *, however_long: bool = False) -> bool:
        """The model is loaded, and stays until ``release``. Returns whether it was loaded for this. Raises ``ApiError``
        if it cannot be loaded, or not in time."""
        self.check(state)
        if self.is_free(state):
            self._take(state)
            return False
        if self._num_waiting >= self._max_waiting:
            text = f"model: {self._num_waiting} requests wait for models already (max_queue={self._max_waiting})"
            raise ApiError(429, text, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        state.waiters.append(waiter)
        if state.task is None:
            state.may_leave = True
            state.task = self._spawn(self._bring(state))
            self._wanted[state] = None
        self._num_waiting += 1
        try:
            await asyncio.wait((waiter,), timeout=None if however_long else self._max_wait)
        except BaseException:
            self._leave(state, waiter)
            raise
        finally:
            self._num_waiting -= 1
        if not waiter.done():
            self._leave(state, waiter)
            text = f"model: {state.name!r} is {state.status}, and was not free in {self._max_wait:g} seconds"
            raise ApiError(503, text, code="model_loading", headers={"Retry-After": str(RETRY_SECONDS)})
        return waiter.result()

    @staticmethod
    def is_free(state: ModelState) -> bool:
        """Whether ``lease`` need not wait."""
        return state.is_ready and not state.yields

    def release(self, state: ModelState) -> None:
        state.num_users -= 1
        state.last_used = time.monotonic()
        if not state.num_users:
            state.idle.set()

    def _take(self, state: ModelState) -> None:
        state.num_users += 1
        state.last_used = time.monotonic()
        state.idle.clear()

    def check(self, state: ModelState) -> None:
        """Raises ``ApiError`` for a model that is not to be waited for."""
        if self._stopping:
            raise _stopped()
        left = state.failed_at + _RETRY_LOAD - time.monotonic()
        if self.lost is not None or (state.status == "failed" and state.task is None and left > 0):
            raise self._refusal(state, left)

    def _refusal(self, state: ModelState, seconds: float) -> ApiError:
        """Of a model that could not be loaded. ``seconds``: until it is tried again."""
        if self.lost is not None:
            return ApiError(503, self.lost, code="device_lost")
        is_short = isinstance(state.cause, MemoryBudgetError)
        status, code = (503, "out_of_memory") if is_short else (500, "model_load_failed")
        text = f"model: {state.name!r} cannot be loaded: {state.error}"
        return ApiError(status, text, code=code, headers={"Retry-After": str(math.ceil(seconds))})

    def _leave(self, state: ModelState, waiter: asyncio.Future[bool]) -> None:
        """A request gives up. If nobody else waits, the model need not be loaded; a load that has begun goes on."""
        if waiter.done():
            if waiter.exception() is None:
                self.release(state)
            return
        waiter.cancel()
        state.waiters.remove(waiter)
        if not state.waiters and state.may_leave:
            self._forget(state)

    def _forget(self, state: ModelState) -> None:
        """It is not wanted any more. Who asks from now on begins anew, behind others."""
        task, state.task = state.task, None
        self._wanted.pop(state, None)
        if task is not None:
            task.cancel()

    # ---- loading

    async def _bring(self, state: ModelState) -> None:
        """Loads the model when it is its turn, for all who wait for it then."""
        task = asyncio.current_task()
        try:
            async with self._turn:
                state.may_leave = False
                was_loaded = not state.is_ready
                if was_loaded:
                    await self._load(state)
                self._answer(state, lambda waiter: self._grant(state, waiter, was_loaded))
        except asyncio.CancelledError:
            if state.task is task:  # not because everybody has left: the event loop ends
                self._stopping = True
                self._answer(state, lambda waiter: waiter.set_exception(_stopped()))
            raise
        except Exception as error:
            self._fail(state, error)
        finally:
            if state.task is task:
                state.task = None
                self._wanted.pop(state, None)

    def _grant(self, state: ModelState, waiter: asyncio.Future[bool], was_loaded: bool) -> None:
        self._take(state)
        waiter.set_result(was_loaded)

    def _answer(self, state: ModelState, tell: Callable[[asyncio.Future[bool]], None]) -> None:
        waiters, state.waiters = state.waiters, []
        for waiter in waiters:
            tell(waiter)

    def _fail(self, state: ModelState, error: Exception) -> None:
        state.status, state.share, state.cause, state.failed_at = "unloaded", 0.0, error, time.monotonic()
        for one in chain_of(error):
            traceback.clear_frames(one.__traceback__)  # where half of a model may be
        if isinstance(error, LoadStoppedError):
            self._answer(state, lambda waiter: waiter.set_exception(_stopped()))
            return
        state.status, state.error = "failed", str(error) if isinstance(error, ExlError) else "internal error"
        unexpected = None if isinstance(error, ExlError) else error
        LOG.error("model %s cannot be loaded: %s", state.name, state.error.partition("\n")[0], exc_info=unexpected)
        self._note_loss(error)
        self._answer(state, lambda waiter: waiter.set_exception(self._refusal(state, _RETRY_LOAD)))

    def _note_loss(self, error: BaseException) -> None:
        if self.lost is None and any(isinstance(one, DeviceLostError) for one in chain_of(error)):
            self.lost = f"the GPU answers no more ({error}): the server has to be started again"

    async def _load(self, state: ModelState) -> None:
        if state.served is not None:
            await self._unload_broken(state)
        state.status, state.share, state.error = "loading", 0.0, None
        try:
            room = await self._make_room(state, await asyncio.to_thread(state.loader.needs))
            served = await asyncio.to_thread(self._load_now, state, room)
        except asyncio.CancelledError:
            state.status = "unloaded"
            raise
        state.served, state.status, state.share = served, "loaded", 1.0
        state.own, state.last_used = own_bytes(served.llm.plan), time.monotonic()
        self.held.append(state)

    async def _make_room(self, state: ModelState, needed: Sizes) -> Sizes | None:
        """Unloads others until there is room. Returns the model's own budgets; None: the options say them."""
        if not needed:
            return None
        budgets = await asyncio.to_thread(self._budgets)
        going = choose_to_unload(self.held, needed, budgets)
        if going is None:
            raise MemoryBudgetError(f"{state.name}: needs {dict(needed)} bytes, of {dict(budgets)} for all models")
        await self._end_users(state, going)
        for other in going:
            await self._unload_now(other)
        return room_for(needed, left_beside(budgets, self.held), budgets)

    async def _end_users(self, state: ModelState, going: list[ModelState]) -> None:
        """Waits until requests to others have ended, while new ones wait. They are taken again if ``state`` is not
        wanted any more."""
        for other in going:
            other.yields = True
        state.may_leave = True
        try:
            for other in going:
                await other.idle.wait()
        except BaseException:
            for other in going:
                other.yields = False
            raise
        finally:
            state.may_leave = False

    async def _unload_broken(self, state: ModelState) -> None:
        """Of a model whose engine has stopped: its requests have their errors, or get them now."""
        failure = state.loaded.llm.failure
        if failure is not None:
            LOG.error("model %s has stopped and is loaded again", state.name, exc_info=failure)
            self._note_loss(failure)
            if self.lost is not None:
                raise DeviceLostError(self.lost)
        await state.idle.wait()
        await self._unload_now(state)

    def _load_now(self, state: ModelState, room: Sizes | None) -> ServedModel:
        """In a thread, where it goes to its end also if nobody wants the model any more."""

        def tell(done: int, total: int) -> None:
            if self._stopping:
                raise LoadStoppedError
            state.share = done / total if total else 0.0

        llm = state.loader.load(room, tell)
        try:
            served = self._make_served(llm, state.name)
            with self._closing:
                if self._closed:
                    raise LoadStoppedError
                self._open.add(llm)
        except BaseException:
            llm.close()
            raise
        return served

    # ---- unloading

    async def unload(self, state: ModelState) -> None:
        """Raises ``ApiError`` (409) if the model answers requests, or somebody waits for it."""
        if state.is_busy or state.task is not None:
            raise _in_use(state)
        if not await asyncio.shield(self._spawn(self._unload(state, lambda: not state.is_busy))):
            raise _in_use(state)

    def retire(self, state: ModelState) -> None:
        """Its name is gone: it is unloaded when its requests have ended."""
        self._spawn(self._retire(state))

    async def _retire(self, state: ModelState) -> None:
        while state.served is not None or state.task is not None:
            await state.idle.wait()
            if not await self._unload(state, lambda: not state.is_busy):
                await asyncio.sleep(_LOOK)

    async def _unload(self, state: ModelState, may_go: Callable[[], bool]) -> bool:
        """When it is its turn, if it may go then."""
        async with self._turn:
            if not may_go():
                return False
            if state.served is not None:
                await self._unload_now(state)
            return True

    async def _unload_now(self, state: ModelState) -> None:
        """Who calls has the turn, and nobody uses the model."""
        llm = state.loaded.llm
        state.served, state.status, state.share = None, "unloading", 0.0
        try:
            await asyncio.to_thread(self._close_llm, llm)
        finally:
            self.held.remove(state)
            state.own, state.status, state.yields = {}, "unloaded", False

    def _close_llm(self, llm: LLM) -> None:
        """In a thread."""
        with self._closing:
            self._open.discard(llm)
        try:
            llm.close()
        except Exception:  # a GPU that answers no more; whatever was freed is free
            LOG.exception("%r could not be closed", llm)
        del llm
        gc.collect()  # an engine's parts know each other
        trim_heap()

    async def _unload_idle(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(min(seconds / 4, _LOOK))
            for state in list(self.held):
                if self._is_overdue(state, seconds):
                    await self._unload(state, functools.partial(self._is_overdue, state, seconds))

    @staticmethod
    def _is_overdue(state: ModelState, seconds: float) -> bool:
        is_wanted = state.is_busy or state.task is not None
        return not is_wanted and state.served is not None and time.monotonic() - state.last_used >= seconds

    # ---- the end

    def stop(self) -> None:
        """From any thread: nothing is loaded any more, and who waits is told so."""
        self._stopping = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._refuse_all)

    def _refuse_all(self) -> None:
        for state in list(self._wanted):
            self._answer(state, lambda waiter: waiter.set_exception(_stopped()))
            if state.may_leave:
                self._forget(state)

    def close(self) -> None:
        """Unloads all, when the event loop has ended."""
        self._stopping = True
        with self._closing:
            self._closed, found = True, list(self._open)
            self._open.clear()
        for llm in found:
            llm.close()
        for state in self.held:
            state.served, state.status, state.own = None, "unloaded", {}
        self.held.clear()


def _stopped() -> ApiError:
    text = "the server is shutting down, and takes no more requests"
    return ApiError(503, text, code="draining", headers={"Retry-After": str(RETRY_SECONDS)})


def _in_use(state: ModelState) -> ApiError:
    what = f"answers {state.num_users} requests" if state.is_busy else "is being loaded"
    return ApiError(409, f"model: {state.name!r} {what}", code="model_in_use", param="model")
