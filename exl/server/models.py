"""The models of a server: what is loaded, what could be, and who uses it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from exl.errors import ExlError
from exl.llm import LLM
from exl.server.errors import ApiError
from exl.server.served import ServedModel

Progress = Callable[[int, int], None]


@dataclass
class ModelState:
    """One model that clients may name."""

    name: str
    aliases: tuple[str, ...] = ()
    status: str = "unloaded"  # "loading", "loaded", "unloading", "failed"
    share: float = 0.0  # of its bytes that are loaded
    error: str | None = None
    served: ServedModel | None = None
    num_users: int = 0  # requests that hold it


class Models:
    """One model, which is loaded when the server starts."""

    def __init__(
        self, name: str, load: Callable[[Progress], LLM], aliases: tuple[str, ...] = (), **formats: str
    ) -> None:
        """``load``: called in a thread. ``formats``: of ``ServedModel``."""
        self.states = [ModelState(name, aliases)]
        self._load, self._formats = load, formats
        self._ending = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to load; in a running event loop."""
        self._task = asyncio.ensure_future(self._load_first())

    async def loaded(self) -> None:
        """Waits for the model that the server was started with. Raises what kept it from loading."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _load_first(self) -> None:
        state = self.states[0]
        state.status = "loading"

        def tell(done: int, total: int) -> None:
            if self._ending:
                raise ExlError(f"{state.name}: the server ended while it was loading")
            state.share = done / total if total else 0.0

        try:
            llm = await asyncio.to_thread(self._load, tell)
        except ExlError as error:
            state.status, state.error = "failed", str(error)
            raise
        state.served, state.status, state.share = ServedModel(llm, state.name, **self._formats), "loaded", 1.0

    def find(self, name: str | None) -> ModelState:
        """The model that a client names; None or "" is the one that the server began with. Raises ``ApiError``."""
        if not name:
            return self.states[0]
        for state in self.states:
            if name == state.name or name in state.aliases:
                return state
        known = ", ".join(repr(state.name) for state in self.states)
        raise ApiError(404, f"model: found {name!r}, this server has {known}", code="model_not_found", param="model")

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """A loaded model, which stays loaded inside. Raises ``ApiError``: 404 for a name that nobody has, 503 while the
        model is loading."""
        state = self.find(name)
        if state.served is None:
            text = f"model: {state.name!r} is {state.status}, {state.share:.0%} of it"
            raise ApiError(503, text, code="model_loading", headers={"Retry-After": "1"})
        state.num_users += 1
        try:
            yield state.served
        finally:
            state.num_users -= 1

    def drain(self, seconds: float) -> bool:
        """Requests that run get so many seconds to end; no model takes more. Returns whether all ended by themselves.
        Blocks: for a thread."""
        until = time.monotonic() + seconds
        self._ending = True
        served = [state.served for state in self.states if state.served is not None]
        ended = [each.llm.drain(max(0.0, until - time.monotonic())) for each in served]
        return all(ended)

    def close(self) -> None:
        for state in self.states:
            if state.served is not None:
                state.served.llm.close()
                state.served, state.status = None, "unloaded"
