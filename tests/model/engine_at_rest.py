"""What must be true of an engine that has nothing to do: no page is held, no thread is left, nothing waits."""

from __future__ import annotations

import gc
import os
import threading
import time

import exl
from exl.engine.handle import Handle
from exl.engine.sequence import Sequence
from exl.engine.ticket import Ticket

SECONDS = 60


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "exl engine"]


def wait_for(condition) -> bool:
    until = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return bool(condition())


def check_at_rest(llm: exl.LLM) -> None:
    """Waits for the engine's thread to come to its step's end, then looks."""
    generator = llm._engine.generator
    seat, scheduler = generator.seat, generator.scheduler
    assert wait_for(lambda: not seat._live), "requests that have not ended"
    assert wait_for(lambda: not seat._torn), "somebody is in the seat"
    assert seat._lock.acquire(timeout=SECONDS), "the seat is taken"
    try:
        assert (scheduler.running, scheduler.waiting) == ([], [])
        assert scheduler._inflight is None
        generator.pool.check([])
        assert generator.pool.num_free == generator.pool.num_pages
    finally:
        seat._lock.release()


def resources() -> dict[str, int]:
    """What must be the same before and after any number of requests."""
    gc.collect()
    alive = [type(thing) for thing in gc.get_objects() if isinstance(thing, Ticket | Handle | Sequence)]
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0,
        **{kind.__name__: alive.count(kind) for kind in (Ticket, Handle, Sequence)},
    }
