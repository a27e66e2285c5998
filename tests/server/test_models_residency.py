"""Who is in memory, who waits, in which order: with models that are loaded when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from exl.errors import CheckpointError, DeviceLostError, ExlError, MemoryBudgetError
from exl.server import residency
from exl.server.errors import ApiError
from exl.server.models import Models
from exl.server.residency import Residency
from tests.server.worlds import BUDGET, SECONDS, FakeLoader, World, run, settled, until


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """The collector takes 0.1 s in a process with so many modules, at each unload."""
    monkeypatch.setattr(residency, "gc", SimpleNamespace(collect=lambda: 0))


def test_requests_for_one_model_share_its_load():
    async def test():
        world = World({"a": 4})
        world["a"].loader.gate.clear()
        asked = [asyncio.ensure_future(world.ask("a")) for _ in range(5)]
        await until(lambda: world["a"].share == 0.5)
        assert world["a"].status == "loading"
        world["a"].loader.gate.set()
        assert await asyncio.gather(*asked) == [True] * 5
        assert await world.ask("a") is False
        assert world.log == ["load a", *["run a"] * 6]

    run(test())


def test_what_fits_stays_and_the_oldest_goes():
    async def test():
        world = World({"a": 4, "b": 4, "c": 4})
        for name in "abac":
            await world.ask(name)
        assert [world[name].status for name in "abc"] == ["loaded", "unloaded", "loaded"]
        assert world["c"].loader.rooms == [{"cpu": 5}]  # half of all; "a" leaves 6
        assert world.residency.held == [world["a"], world["c"]]

    run(test())


def test_no_model_is_unloaded_under_its_requests_and_new_ones_queue_behind():
    async def test():
        world, end = World({"a": 6, "b": 6}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end, "first a"))
        await until(lambda: world.log == ["load a", "first a"])
        asked_b = asyncio.ensure_future(world.ask("b"))
        await until(lambda: world["a"].yields)
        second = asyncio.ensure_future(world.ask("a", label="second a"))
        await asyncio.sleep(0.02)
        assert world.log == ["load a", "first a"]
        end.set()
        assert await asyncio.gather(running, asked_b, second) == [True, True, True]
        assert world.log == ["load a", "first a", "load b", "run b", "load a", "second a"]

    run(test())


def test_a_constant_stream_does_not_keep_another_model_waiting():
    async def test():
        world, over = World({"a": 6, "b": 6}), asyncio.Event()

        async def stream():
            while not over.is_set():
                await world.ask("a", SimpleNamespace(wait=lambda: asyncio.sleep(0.003)))

        streams = [asyncio.ensure_future(stream()) for _ in range(4)]
        await until(lambda: world["a"].num_users == 4)
        for _ in range(3):
            assert await world.ask("b") is True
            await until(lambda: world["a"].is_busy)
        over.set()
        await asyncio.gather(*streams)
        assert world.log.count("load b") == 3

    run(test())


def test_models_that_need_not_go_are_not_disturbed():
    async def test():
        world, end = World({"a": 6, "b": 4, "c": 6}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end))
        await world.ask("b")
        await until(lambda: "run a" in world.log)
        asked = asyncio.ensure_future(world.ask("c"))
        await until(lambda: world["a"].yields)
        assert await asyncio.wait_for(world.ask("b"), SECONDS) is False
        end.set()
        await asyncio.gather(running, asked)
        assert [world[name].status for name in "abc"] == ["unloaded", "loaded", "loaded"]

    run(test())


def test_who_leaves_while_waiting_leaves_nothing_behind():
    async def test():
        world, end = World({"a": 6, "b": 6}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        gone = asyncio.ensure_future(world.ask("b"))
        await until(lambda: world["a"].yields)
        behind = asyncio.ensure_future(world.ask("a", label="behind"))
        await settled()
        gone.cancel()
        assert await behind is False  # "a" is not unloaded any more
        assert not world["a"].yields
        assert world["b"].status == "unloaded"
        assert world["b"].waiters == []
        end.set()
        await running
        assert world["a"].num_users == world["b"].num_users == 0
        assert await world.ask("b") is True

    run(test())


def test_who_leaves_while_it_is_loaded_lets_it_be_loaded():
    async def test():
        world = World({"a": 6})
        world["a"].loader.gate.clear()
        asked = asyncio.ensure_future(world.ask("a"))
        await until(lambda: world["a"].share == 0.5)
        asked.cancel()
        await settled()
        world["a"].loader.gate.set()
        await until(lambda: world["a"].status == "loaded")
        assert (world["a"].num_users, await world.ask("a")) == (0, False)

    run(test())


def test_who_leaves_just_when_it_got_the_model_gives_it_back():
    async def test():
        world = World({"a": 6})
        world["a"].loader.gate.clear()
        asked = asyncio.ensure_future(world.residency.lease(world["a"]))
        await until(lambda: world["a"].share == 0.5)
        # Called after the model was given to it, before it goes on.
        world["a"].waiters[0].add_done_callback(lambda waiter: asked.cancel())
        world["a"].loader.gate.set()
        assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], asyncio.CancelledError)
        assert world["a"].num_users == 0
        assert world["a"].idle.is_set()

    run(test())


def test_a_wait_that_is_too_long_ends(monkeypatch):
    async def test():
        world, end = World({"a": 6, "b": 6}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        monkeypatch.setattr(world.residency, "_max_wait", 0.05)
        with pytest.raises(ApiError, match=r"'b' is loading, and was not free in 0.05 seconds") as caught:
            await world.ask("b")
        assert (caught.value.status, "Retry-After" in caught.value.headers) == (503, True)
        monkeypatch.undo()
        assert await world.ask("a") is False
        end.set()
        await running

    run(test())


def test_no_more_than_so_many_may_wait():
    async def test():
        world = World({"a": 6}, max_waiting=2)
        world["a"].loader.gate.clear()
        asked = [asyncio.ensure_future(world.ask("a")) for _ in range(2)]
        await settled()
        with pytest.raises(ApiError) as caught:
            await world.ask("a")
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        world["a"].loader.gate.set()
        await asyncio.gather(*asked)

    run(test())


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (CheckpointError("model.safetensors: damaged"), 500, "model.safetensors: damaged"),
        (MemoryBudgetError("needs 5 GB, the budget is 4"), 503, "needs 5 GB, the budget is 4"),
        (RuntimeError("a secret"), 500, "internal error"),
    ],
)
def test_a_load_that_fails_says_why_and_is_tried_again_later(monkeypatch, error, status, told):
    async def test():
        world = World({"a": 4, "b": 4})
        await world.ask("b")
        world["a"].loader.errors = [error]
        for _ in range(2):  # the second is told the same, and nothing is tried
            with pytest.raises(ApiError, match=f"'a' cannot be loaded: {told}") as caught:
                await world.ask("a")
            assert caught.value.status == status
            assert 1 <= int(caught.value.headers["Retry-After"]) <= 5
        assert world.log.count("load a") == 1
        assert (world["a"].status, world["a"].error, world["b"].status) == ("failed", told, "loaded")
        monkeypatch.setattr(residency, "_RETRY_LOAD", 0.0)
        assert await world.ask("a") is True
        assert world["a"].error is None

    run(test())


def test_a_model_whose_engine_has_stopped_is_loaded_again():
    async def test():
        world, end = World({"a": 4}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        first = world["a"].served.llm
        first.failure = ExlError("a step failed")
        again = asyncio.ensure_future(world.ask("a"))
        await settled()
        assert not first.closed.is_set()  # its request gets its error first
        end.set()
        await running
        assert await again is True
        assert first.closed.is_set()
        assert world["a"].served.llm is not first

    run(test())


def test_a_gpu_that_answers_no_more_is_not_asked_again():
    async def test():
        world = World({"a": 4, "b": 4})
        await world.ask("a")
        world["a"].served.llm.failure = DeviceLostError("it is gone")
        for name in ("a", "b", "a"):
            with pytest.raises(ApiError, match=r"answers no more .*it is gone") as caught:
                await world.ask(name)
            assert (caught.value.status, caught.value.code) == (503, "device_lost")
        assert world.log.count("load a") == 1
        assert "load b" not in world.log
        assert "has to be started again" in world.residency.lost

    run(test())


def test_unloading_by_hand():
    async def test():
        world, end = World({"a": 4}), asyncio.Event()
        await world.residency.unload(world["a"])  # nothing to do
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        with pytest.raises(ApiError, match="'a' answers 1 requests") as caught:
            await world.residency.unload(world["a"])
        assert caught.value.status == 409
        end.set()
        await running
        llm = world["a"].served.llm
        await world.residency.unload(world["a"])
        assert llm.closed.is_set()
        assert (world["a"].status, world["a"].served, world.residency.held) == ("unloaded", None, [])
        assert await world.ask("a") is True

    run(test())


def test_a_model_without_requests_is_unloaded_and_loaded_again():
    async def test():
        world, end = World({"a": 4, "b": 4}, idle_unload=0.1), asyncio.Event()
        world.residency.start()
        running = asyncio.ensure_future(world.ask("b", end))
        began = time.monotonic()
        await world.ask("a")
        await until(lambda: world["a"].status == "unloaded")
        assert time.monotonic() - began >= 0.1
        assert world["b"].status == "loaded"  # it answers
        end.set()
        await running
        await until(lambda: world["b"].status == "unloaded")
        assert await world.ask("a") is True

    run(test())


def test_a_model_whose_name_is_gone_goes_when_its_requests_have_ended():
    async def test():
        world, end = World({"a": 4}), asyncio.Event()
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        world.residency.retire(world["a"])
        await settled()
        assert world["a"].status == "loaded"
        end.set()
        await running
        await until(lambda: world["a"].status == "unloaded")

    run(test())


def test_who_waits_is_told_that_the_server_ends_and_a_load_stops():
    async def test():
        world, end = World({"a": 6, "b": 6, "c": 1}), asyncio.Event()
        world.residency.start()
        running = asyncio.ensure_future(world.ask("a", end))
        await until(lambda: "run a" in world.log)
        asked = [asyncio.ensure_future(world.ask("b"))]
        await until(lambda: world["a"].yields)
        asked += [asyncio.ensure_future(world.ask(name)) for name in "ac"]
        await settled()
        await asyncio.to_thread(world.residency.stop)
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert (error.status, error.code) == (503, "draining")
        with pytest.raises(ApiError, match="shutting down"):
            await world.ask("c")
        end.set()
        await running  # it has its answer
        assert world.log == ["load a", "run a"]

    run(test())


def test_the_end_of_the_server_stops_a_load():
    async def test():
        world.residency.start()
        world["a"].loader.gate.clear()
        asked = asyncio.ensure_future(world.ask("a"))
        await until(lambda: world["a"].share == 0.5)
        await asyncio.to_thread(world.residency.stop)
        with pytest.raises(ApiError, match="shutting down"):
            await asked
        await until(lambda: world["a"].task is None)  # its thread has ended

    world = World({"a": 6})
    run(test())
    world.residency.close()
    assert world.live == []


def test_closing_closes_what_is_loaded():
    world = World({"a": 4, "b": 4})

    async def test():
        await world.ask("a")
        await world.ask("b")

    run(test())
    world.residency.close()
    assert len(world.live) == 2
    assert all(llm.closed.is_set() for llm in world.live)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_requests_ends(monkeypatch, seed):
    """Four models of which some fit, requests of any length, some who leave, loads that fail, engines that stop: nobody
    waits for ever, the budget holds, no model is closed under a request, and nothing is left."""
    monkeypatch.setattr(residency, "_RETRY_LOAD", 0.0)
    draw = random.Random(seed)

    async def request(world, name):
        if draw.random() < 0.1:
            world[name].loader.errors.append(CheckpointError("damaged"))
        pause = SimpleNamespace(wait=lambda: asyncio.sleep(draw.choice([0, 0.001, 0.01])))
        asked = asyncio.ensure_future(world.ask(name, pause))
        if draw.random() < 0.3:
            await asyncio.sleep(draw.random() * 0.02)
            asked.cancel()
        (answer,) = await asyncio.gather(asked, return_exceptions=True)
        if isinstance(answer, ApiError):
            assert answer.code == "model_load_failed"
        else:
            assert isinstance(answer, bool | asyncio.CancelledError)
        if world[name].served is not None and draw.random() < 0.05:
            world[name].served.llm.failure = ExlError("a step failed")

    async def test():
        world = World({"a": 3, "b": 5, "c": 6, "d": 10}, idle_unload=0.03)
        world.residency.start()
        names = draw.choices("aaabbbccd", k=120)
        async with contextlib.AsyncExitStack() as stack:
            tasks = []
            stack.push_async_callback(lambda: asyncio.gather(*tasks))
            for name in names:
                tasks.append(asyncio.ensure_future(request(world, name)))
                await asyncio.sleep(draw.choice([0, 0, 0.002, 0.01]))
        await until(lambda: not world.residency.held)  # all idle
        for state in world.states.values():
            assert (state.num_users, state.waiters, state.task, state.yields) == (0, [], None, False)
        assert all(llm.closed.is_set() for llm in world.live)
        assert not world.residency._wanted
        assert world.residency._num_waiting == 0

    run(test())


def test_what_keeps_the_first_model_from_loading_is_raised():
    loader = FakeLoader(World({}), "a", 4)
    loader.errors = [CheckpointError("damaged")]

    async def test():
        models = Models("a", loader, residency=Residency(lambda: {"cpu": BUDGET}))
        models.start()
        assert models.starting is models.default
        with pytest.raises(CheckpointError, match="damaged"):
            await models.loaded()
        assert (models.starting, models.failure) == (None, "damaged")

    run(test())


def test_a_first_model_whose_server_ends_meanwhile_is_no_error():
    loader = FakeLoader(World({}), "a", 4)
    loader.gate.clear()

    async def test():
        models = Models("a", loader, residency=Residency(lambda: {"cpu": BUDGET}))
        models.start()
        await until(lambda: models.default.share == 0.5)
        assert await asyncio.to_thread(models.drain, 5.0)
        await models.loaded()
        assert models.default.served is None

    run(test())
