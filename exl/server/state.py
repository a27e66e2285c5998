"""What all parts of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from exl.server.models import Models
from exl.server.options import ServerOptions
from exl.server.watch import Watch

T = TypeVar("T")
_THREADS = 8  # that encode prompts and render templates; others wait
_SLOW_THREADS = 4  # that compile grammars, which may take seconds: other requests do not wait for them


class Server:
    """Options, models, and who looks on. ``close`` ends all."""

    def __init__(self, options: ServerOptions, models: Models) -> None:
        self.options, self.models = options, models
        self.watches: list[Watch] = []
        self.num_open = 0  # HTTP requests under way
        self.num_requests = 0  # that have come, in all
        self.draining = False  # SIGTERM came: what runs goes on, nothing new is taken
        self._threads = ThreadPoolExecutor(_THREADS, "exl-server")
        self._slow_threads = ThreadPoolExecutor(_SLOW_THREADS, "exl-server-slow")

    async def in_thread(self, work: Callable[[], T], slow: bool = False) -> T:
        """What ``work`` returns, while the event loop goes on. If the waiting is cancelled, a result that comes later
        is closed if it can be."""
        future = asyncio.get_running_loop().run_in_executor(self._slow_threads if slow else self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_dispose)
            raise

    def close(self) -> None:
        self.models.close()
        for threads in (self._threads, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)


def _dispose(future: asyncio.Future[object]) -> None:
    """A request that was submitted for a client who has left meanwhile must not run on."""
    if future.cancelled() or future.exception() is not None:
        return
    result = future.result()
    for item in result if isinstance(result, tuple) else (result,):
        cancel = getattr(item, "cancel", None)
        if cancel is not None:
            cancel()
