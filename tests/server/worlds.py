"""A residency whose models are loaded when the test says so, and hold nothing."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

from exl.planning.plan import MemoryPlan, Placement, PlanLine
from exl.server.loading import Loader
from exl.server.residency import ModelState, Residency

SECONDS = 20.0
BUDGET = 10


class FakeLLM:
    """What a residency knows of a model."""

    def __init__(self, size):
        self.plan = MemoryPlan((PlanLine("resident layers", "cpu", size, True),), Placement(()), 64, 1, 0)
        self.failure, self.closed = None, threading.Event()

    def close(self):
        self.closed.set()


class FakeLoader(Loader):
    """``gate`` holds a load until it is set; ``errors`` are raised by the next ones."""

    def __init__(self, world, name, size):
        self.world, self.name, self.size = world, name, size
        self.gate, self.errors, self.rooms = threading.Event(), [], []
        self.gate.set()

    def needs(self):
        return {"cpu": self.size}

    def load(self, room, tell):
        self.rooms.append(room)
        self.world.log.append(f"load {self.name}")
        tell(1, 2)
        while not self.gate.wait(0.01):
            tell(1, 2)
        if self.errors:
            raise self.errors.pop(0)
        llm = FakeLLM(self.size)
        self.world.live.append(llm)
        used = sum(one.plan.num_bytes for one in self.world.live if not one.closed.is_set())
        assert used <= BUDGET, "more than the budget is loaded"
        return llm


class World:
    def __init__(self, sizes, **options):
        self.log, self.live = [], []
        options = {"max_wait": SECONDS, "max_waiting": 100, "idle_unload": None} | options
        self.residency = Residency(
            lambda: {"cpu": BUDGET}, lambda llm, name: SimpleNamespace(llm=llm, name=name), **options
        )
        self.states = {name: ModelState(name, FakeLoader(self, name, size)) for name, size in sizes.items()}

    def __getitem__(self, name):
        return self.states[name]

    async def ask(self, name, until=None, label=None):
        """A request: holds the model until the event is set."""
        was_loaded = await self.residency.lease(self[name])
        try:
            assert self[name].served is not None
            self.log.append(label or f"run {name}")
            if until is not None:
                await until.wait()
            assert not self[name].served.llm.closed.is_set(), "a model was closed under its request"
        finally:
            self.residency.release(self[name])
        return was_loaded


def run(test):
    asyncio.run(asyncio.wait_for(test, SECONDS))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)
