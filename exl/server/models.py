"""The models of a server: which names clients may use, and a loaded model for each request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exl.errors import ConfigError, ExlError
from exl.llm import LLM
from exl.progress import Progress
from exl.server.directory import list_models
from exl.server.errors import ApiError
from exl.server.loading import Loader, OnlyLoader
from exl.server.residency import LoadStoppedError, ModelState, Residency
from exl.server.served import ServedModel
from exl.server.watch import CURRENT_JOURNEY

_NAMED = 10  # models that an error names, at most


@dataclass(frozen=True)
class Directory:
    """``--models-dir``."""

    path: Path
    make_loader: Callable[[Path], Loader]  # of a folder in it
    first: Path | None = None  # the folder of the model that the server begins with, which is not listed twice


class Models:
    """One model, which is loaded when the server starts, and those of a directory, which are loaded when asked for."""

    def __init__(
        self,
        name: str | None,
        load: Callable[[Progress], LLM] | Loader | None,
        aliases: tuple[str, ...] = (),
        *,
        directory: Directory | None = None,
        residency: Residency | None = None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """``name``, ``load``: of the first model; None: there is none. A function is called in a thread.
        ``residency``: of these models alone; None: one without a budget. ``adapters``: names of the first model's,
        each of which clients use as a model's name. Raises ``ConfigError`` if the directory cannot be read, and for an
        adapter that is called as the model is."""
        for taken in {name, *aliases}.intersection(adapters):
            raise ConfigError(f"lora: found an adapter called {taken!r}, which is a name of the model itself")
        self.adapters = adapters
        self.states: list[ModelState] = []  # the first model, then those of the directory by name
        self._first: ModelState | None = None
        if name is not None and load is not None:
            loader = load if isinstance(load, Loader) else OnlyLoader(load)
            self._first = ModelState(name, loader, aliases)
            self.states.append(self._first)
        self._directory, self._listing = directory, asyncio.Lock()
        self._listed: dict[str, ModelState] = {}
        self._residency = Residency() if residency is None else residency
        self._starting: asyncio.Task[None] | None = None
        if directory is not None:
            self._list(directory, list_models(directory.path))

    @property
    def default(self) -> ModelState | None:
        """Of a request that names no model."""
        if self._first is not None:
            return self._first
        return self.states[0] if len(self.states) == 1 else None

    @property
    def starting(self) -> ModelState | None:
        """The first model, while it is loaded for the first time."""
        return self._first if self._starting is not None and not self._starting.done() else None

    @property
    def failure(self) -> str | None:
        """Why no request can be answered; None: some can."""
        if self._residency.lost is not None:
            return self._residency.lost
        only = self.states[0] if len(self.states) == 1 else None
        return only.error if only is not None and only.status == "failed" else None

    # ---- the first model

    def start(self) -> None:
        """Begins to load the first model; in a running event loop."""
        self._residency.start()
        if self._first is not None:
            self._starting = asyncio.ensure_future(self._load_first(self._first))

    async def loaded(self) -> None:
        """Waits for the model that the server was started with. Raises what kept it from loading."""
        if self._starting is not None:
            await asyncio.shield(self._starting)

    async def _load_first(self, state: ModelState) -> None:
        try:
            await self._residency.lease(state, however_long=True)
        except ApiError:
            if isinstance(state.cause, LoadStoppedError) or state.cause is None:
                return  # the server ends
            raise state.cause from None
        self._residency.release(state)

    # ---- names

    def find(self, name: str | None) -> ModelState:
        """The model that a client names, as the directory was last read; None or "": the default. Raises ``ApiError``:
        400 if there is no default, 404 for a name that nobody has."""
        if not name:
            if self.default is not None:
                return self.default
            text = f"model: found no name, expected one of {self._known()}"
            raise ApiError(400, text, code="model_required", param="model")
        if self._first is not None and name in (self._first.name, *self._first.aliases, *self.adapters):
            return self._first
        if name in self._listed:
            return self._listed[name]
        text = f"model: found {name!r}, this server has {self._known()}"
        raise ApiError(404, text, code="model_not_found", param="model")

    def _known(self) -> str:
        return _some_of([*(state.name for state in self.states), *self.adapters]) or "no models"

    def known_adapters(self) -> str:
        """Their names, for a message."""
        return _some_of(self.adapters) or "no adapters"

    async def refresh(self) -> None:
        """Reads the directory again. One that cannot be read now leaves the models as they are."""
        directory = self._directory
        if directory is None:
            return
        async with self._listing:  # else an older listing might be taken for the newer one
            with contextlib.suppress(ExlError):
                self._list(directory, await asyncio.to_thread(list_models, directory.path))

    async def named(self, name: str | None) -> ModelState:
        """``find``, after another look at the directory if need be."""
        try:
            return self.find(name)
        except ApiError:
            if self._directory is None:
                raise
        await self.refresh()
        return self.find(name)

    def _list(self, directory: Directory, folders: Mapping[str, Path]) -> None:
        first = self._first
        own = set() if first is None else {first.name, *first.aliases, *self.adapters}
        listed: dict[str, ModelState] = {}
        for name, folder in folders.items():
            if directory.first is not None and folder.resolve() == directory.first:
                if first is not None and name not in own:
                    first.aliases += (name,)
                continue
            if name in self._listed:
                listed[name] = self._listed.pop(name)
            elif name not in own:
                listed[name] = ModelState(name, directory.make_loader(folder))
        for gone in self._listed.values():
            self._residency.retire(gone)
        self._listed = listed
        self.states = [*([] if first is None else [first]), *listed.values()]

    # ---- use

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """A loaded model, which stays loaded inside; who asks waits until it is loaded and, if another model has to go
        for it, until that has answered. Raises ``ApiError``: 404 for a name that nobody has, 503 while the server
        starts or ends, if there is no room and if it takes too long, 500 if the model cannot be loaded."""
        state = await self.named(name)
        self._residency.check(state)
        if state is self.starting:
            text = f"model: {state.name!r} is {state.status}, {state.share:.0%} of it"
            raise ApiError(503, text, code="model_loading", headers={"Retry-After": "1"})
        await self._lease(state)
        try:
            yield state.loaded.with_adapter(name) if name in self.adapters else state.loaded
        finally:
            self._residency.release(state)

    async def _lease(self, state: ModelState) -> None:
        """Tells the request's journey of the wait."""
        journey, began, must_wait = CURRENT_JOURNEY.get(), time.perf_counter(), not self._residency.is_free(state)
        was_loaded = False
        try:
            was_loaded = await self._residency.lease(state)
        finally:
            if journey is not None and must_wait:
                journey.model_wait += time.perf_counter() - began
                journey.loaded_model = journey.loaded_model or was_loaded

    async def load(self, name: str) -> None:
        """Raises as ``use``."""
        async with self.use(name):
            pass

    async def unload(self, name: str) -> None:
        """Raises ``ApiError``: 404 for a name that nobody has, 409 if the model answers requests or is being loaded."""
        await self._residency.unload(await self.named(name))

    # ---- the end

    def drain(self, seconds: float) -> bool:
        """Requests that run get so many seconds to end; no model takes more, and none is loaded. Returns whether all
        ended by themselves. Blocks: for a thread."""
        self._residency.stop()
        until = time.monotonic() + seconds
        served = [state.served for state in list(self._residency.held) if state.served is not None]
        ended = [each.llm.drain(max(0.0, until - time.monotonic())) for each in served]
        return all(ended)

    def close(self) -> None:
        """When the event loop has ended."""
        self._residency.close()


def _some_of(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
