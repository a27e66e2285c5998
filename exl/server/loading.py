"""How one model is planned and loaded: ``exl.load`` with the options of the server, in what the budgets leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl.adapters.choice import find_adapters
from exl.checkpoint.hub import find_model
from exl.engine.build import choose_device, plan_engine
from exl.errors import MemoryBudgetError
from exl.llm import LLM
from exl.load_model import load
from exl.memory.host import system_ram
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan
from exl.progress import Progress
from exl.server.budget import Sizes, needed_bytes

_FIRST_GPU, _RAM, _CPU = "cuda:0", "ram", "cpu"
_KEPT_FREE = 16  # of the RAM that is available when nobody says how much may be used, one part in so many stays free


class Budgets:
    """What all models of a server may take together: ``ram`` and ``vram`` of the options, or what was free when it was
    first asked. Thread-safe."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """``arguments``: of ``exl.load``. Raises ``ConfigError`` for what makes no sense."""
        self._options = EngineOptions.from_arguments({**arguments, "draft": None})
        self._found: dict[str, int] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Sizes:
        """Bytes by memory; one without a limit is left out. A GPU is started for it: not for an event loop's thread.
        Raises ``ConfigError`` for a GPU that is not there."""
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> dict[str, int]:
        options, backend = choose_device(self._options)
        found = {} if backend is None else {_FIRST_GPU: options.vram_bytes[0]}
        ram = options.budget
        if ram is None:
            total, available = system_ram()
            free = total if available is None else available
            ram = None if free is None else free - free // _KEPT_FREE
        if ram is not None:
            found[_CPU if backend is None else _RAM] = ram
        return found


class Loader:
    """One model. Both methods take their time: for a thread."""

    def needs(self) -> Sizes:
        """Bytes by memory that must be free for it, at least; empty: there is no other model. Raises ``ExlError``."""
        return {}

    def load(self, room: Sizes | None, tell: Progress) -> LLM:
        """``room``: its budgets; None: those of the options. ``tell`` may raise, which ends the loading. Raises
        ``ExlError``."""
        raise NotImplementedError


class OnlyLoader(Loader):
    """Of a server's only model, by a function."""

    def __init__(self, load_model: Callable[[Progress], LLM]) -> None:
        self._load = load_model

    def load(self, room: Sizes | None, tell: Progress) -> LLM:
        return self._load(tell)


class SharingLoader(Loader):
    """Of one of several models, which have one budget."""

    def __init__(self, model: str | Path | None, arguments: Mapping[str, Any], budgets: Callable[[], Sizes]) -> None:
        """``arguments``: of ``exl.load``."""
        self._model, self._arguments, self._budgets = model, dict(arguments), budgets

    def needs(self) -> Sizes:
        """Of the plan with all budgets for this model, and with a cache of one context where it may have any size. So
        a model whose layers can all be in memory has them there, whatever else is loaded."""
        options = self._options(self._budgets())
        may_be_less = options.context == "auto"
        context = None if may_be_less else options.context
        cache_tokens = None if options.cache_tokens == "auto" else options.cache_tokens
        least = replace(options, context=context, cache_tokens=cache_tokens)
        folder = find_model(self._model, **self._source(), quiet=True)
        plan: MemoryPlan | None = None
        try:
            plan = plan_engine(folder, least)
        except MemoryBudgetError:
            if not may_be_less:
                raise
        if plan is None or (may_be_less and plan.placement.num_streamed):  # with a smaller context it may fit
            plan = plan_engine(folder, options)
        return needed_bytes(plan)

    def load(self, room: Sizes | None, tell: Progress) -> LLM:
        arguments = {**self._arguments, **_budget_arguments(self._budgets() if room is None else room)}
        return load(self._model, **arguments, progress=tell)

    def _options(self, room: Sizes) -> EngineOptions:
        found = {**self._arguments, **_budget_arguments(room)}
        if found.get("draft") is not None:
            found["draft"] = find_model(found["draft"], token=found.get("token"), quiet=True)
        found["lora"] = find_adapters(found.get("lora"), token=found.get("token"), quiet=True).folders
        return EngineOptions.from_arguments(found)

    def _source(self) -> dict[str, Any]:
        return {name: self._arguments[name] for name in ("revision", "token") if name in self._arguments}


def _budget_arguments(room: Sizes) -> dict[str, int]:
    """Keywords of ``exl.load``."""
    found = {}
    if _FIRST_GPU in room:
        found["vram"] = room[_FIRST_GPU]
    for memory in (_CPU, _RAM):
        if memory in room:
            found["ram"] = room[memory]
    return found
