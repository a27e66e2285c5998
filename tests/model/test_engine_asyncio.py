"""Coroutines use a model while their loop stays free; whichever way one leaves, nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from pathlib import Path

import pytest

import exl
from tests.model.engine_at_rest import SECONDS, check_at_rest

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
PROMPTS = ("One day", "The dog", "Lily and Tom were", "Once upon a time there was a", "A")


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES, device="cpu", context=256, cache_tokens=2048) as model:
        yield model


@pytest.fixture(autouse=True)
def _nothing_stays(llm):
    yield
    gc.collect()
    check_at_rest(llm)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, SECONDS))


async def ask(llm: exl.LLM, how: str, prompt: str, **options) -> str:
    if how == "await":
        return (await llm.submit(prompt, **options)).text
    if how == "aresult":
        return (await llm.submit(prompt, **options).aresult()).text
    if how == "aevents":
        return "".join([event.text async for event in llm.submit(prompt, **options).aevents()])
    if how == "async for":
        return "".join([piece async for piece in llm.submit(prompt, **options)])
    return "".join([piece async for piece in llm.astream(prompt, **options)])


KINDS = ("await", "aresult", "aevents", "async for", "astream")


def test_many_coroutines_at_once_get_what_each_gets_alone(llm):
    wanted = [
        (KINDS[i % 5], PROMPTS[i * 7 % 5], {"max_tokens": 5 + i, "temperature": 1.0, "seed": i}) for i in range(15)
    ]
    expected = [llm.generate(prompt, **options).text for _, prompt, options in wanted]

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(ask(llm, how, prompt, **options) for how, prompt, options in wanted))

    assert run(all_at_once()) == expected


def test_a_step_wakes_a_loop_once(llm):
    """However many coroutines have news."""
    posted = 0

    async def use() -> None:
        nonlocal posted
        loop = asyncio.get_running_loop()
        post = loop.call_soon_threadsafe

        def counted(*args, **kwargs):
            nonlocal posted
            posted += 1
            return post(*args, **kwargs)

        loop.call_soon_threadsafe = counted
        await asyncio.gather(*(ask(llm, "aevents", "One day", max_tokens=20, reuse_prefix=False) for _ in range(8)))

    before = llm.stats().steps
    run(use())
    num_steps = llm.stats().steps - before
    assert num_steps >= 20
    assert posted <= num_steps + 8  # and some for requests that arrive


@pytest.mark.parametrize("seed", range(4))
def test_tasks_that_are_cancelled_anywhere_leave_nothing(llm, seed):
    rng = random.Random(seed)
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 9}
    expected = llm.generate("The dog", **options).text

    async def use() -> str:
        stays = asyncio.create_task(ask(llm, "await", "The dog", **options))
        tasks = [asyncio.create_task(ask(llm, how, "One day", max_tokens=240)) for how in KINDS for _ in range(2)]
        rng.shuffle(tasks)
        for task in tasks:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01)))
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return await stays

    assert run(use()) == expected


def test_a_loop_that_ends_with_unfinished_requests(llm):
    async def begin() -> tuple:
        first, second = llm.submit("One day", 200), llm.submit("The dog", 240, ignore_eos=True)
        await anext(first)
        left = asyncio.create_task(second.aresult())  # long: it must not have ended before the loop
        await asyncio.sleep(0)
        return first, second, left

    first, second, _ = asyncio.run(begin())  # cancels the task that is left
    assert second.cancelled
    text = "".join(first)  # another loop, or none, goes on with it
    assert text
    assert first.result(SECONDS).finish_reason in ("stop", "length")


@pytest.mark.parametrize("how", ["aevents", "async with", "timeout", "aclose"])
def test_leaving_early_cancels(llm, how):
    async def use() -> None:
        handle = llm.submit("One day", 240)
        if how == "aevents":
            events = handle.aevents()
            await anext(events)
            await events.aclose()
        elif how == "async with":
            async with handle:
                await anext(handle)
        elif how == "timeout":
            with pytest.raises((asyncio.TimeoutError, TimeoutError)):
                await asyncio.wait_for(handle.aresult(), 0.001)
        else:
            await handle.aclose()
        assert handle.cancelled
        assert (await handle).finish_reason == "cancelled"

    run(use())


def test_what_fails_is_raised_where_it_is_awaited(llm):
    def fail(_) -> None:
        raise ZeroDivisionError("the caller's own")

    async def use() -> None:
        for how in KINDS:
            with pytest.raises(ZeroDivisionError, match="the caller's own"):
                await ask(llm, how, "One day in the park", max_tokens=5, prompt_progress=fail)

    run(use())


def test_a_model_that_is_closed_wakes_who_awaits():
    llm = exl.load(STORIES, device="cpu", context=256, max_sequences=1)

    async def use() -> None:
        tasks = [asyncio.create_task(ask(llm, how, "One day", max_tokens=240)) for how in KINDS]
        await asyncio.sleep(0.02)
        await asyncio.get_running_loop().run_in_executor(None, llm.close)
        for task in tasks:
            with pytest.raises(exl.ExlError, match="the model was closed"):
                await task

    run(use())


def test_an_async_reader_that_stops_reading_stops_its_request(llm):
    """It is ``max_unread`` tokens ahead, then it waits; others go on."""
    expected = llm.generate("One day", 150, temperature=1.0, seed=3)

    async def use() -> None:
        handle = llm.submit("One day", 150, temperature=1.0, seed=3, max_unread=10)
        pieces = [await anext(handle)]
        await llm.submit("The dog", 40, temperature=1.0, seed=1)
        assert len(handle.answers[0].token_ids) <= 13
        pieces += [piece async for piece in handle]
        assert "".join(pieces) == expected.text

    run(use())
