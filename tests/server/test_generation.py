"""From the engine's events to updates: what comes together, what is counted, what is merged."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from exl.engine.request import Outcome
from exl.engine.ticket import Event
from exl.parse.parts import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from exl.server.generation import Generation, Job, Update, Usage, _merged, _Reader, together, total
from exl.server.watch import Journey
from tests.server.running import wait_until


class Scripted:
    """A parser that gives these parts, one list for each token."""

    is_whole = True

    def __init__(self, *parts):
        self.parts = list(parts)

    def push(self, token_ids):
        assert len(token_ids) == 1
        return self.parts.pop(0)

    def finish(self):
        return [part for parts in self.parts for part in parts]


def test_tokens_of_reasoning_are_counted():
    """A silent token, such as a tag, belongs to what comes after it."""
    reader = _Reader(Scripted([], [Reasoning("a")], [Reasoning("b")], [], [Text("c")], [Text("d")]))
    assert reader.read((1, 2, 3), is_last=False) == [Reasoning("ab")]
    assert reader.num_reasoning == 3
    assert reader.read((4, 5), is_last=False) == [Text("c")]
    assert reader.read((), is_last=True) == [Text("d")]
    assert reader.num_reasoning == 3
    cut_off = _Reader(Scripted([Reasoning("a")], [], [Reasoning("b")]))
    assert cut_off.read((1, 2), is_last=True) == [Reasoning("ab")]
    assert cut_off.num_reasoning == 2


def test_neighbours_of_a_kind_are_one_part():
    parts = [
        [Text("a"), Text("b")],
        [ToolCallBegin(0, "f"), ToolCallArguments(0, "{")],
        [ToolCallArguments(0, "}"), ToolCallEnd(0), ToolCallBegin(1, "f"), ToolCallArguments(1, "{}")],
    ]
    assert _Reader(Scripted(*parts)).read((1, 2, 3), is_last=False) == [
        Text("ab"),
        ToolCallBegin(0, "f"),
        ToolCallArguments(0, "{}"),
        ToolCallEnd(0),
        ToolCallBegin(1, "f"),
        ToolCallArguments(1, "{}"),
    ]


def test_events_of_a_choice_are_merged():
    ended = Outcome("stop", 2)
    first = Event(1, "a", (5,), (((5, -1.0),),))
    second = Event(1, "b", (6, 7), (((6, -2.0),), ((7, -3.0),)))
    last = Event(1, "", (), None, ended)
    merged = _merged(_merged(first, second), last)
    assert merged == Event(1, "ab", (5, 6, 7), (((5, -1.0),), ((6, -2.0),), ((7, -3.0),)), ended)


def test_a_late_reader_gets_all_at_once(running):
    """What waits is one update of each choice; together they are the whole answers."""
    served = running.server.models.states[0].served
    options = {"max_tokens": 30, "n": 2, "temperature": 0.9, "seed": 1, "top_logprobs": 0}
    expected = running.llm.generate("One day", **options)

    async def read():
        job = Job(running.llm.encode("One day"), options)
        generation = await Generation.begin(running.server, served, job, Journey("r", "/"))
        while not all(answer.outcome for answer in generation._handle.answers):
            await asyncio.sleep(0.01)
        return [update async for update in generation.updates()], generation.usage

    updates, usage = asyncio.run(read())
    assert sorted(update.choice for update in updates) == [0, 1]
    for update in updates:
        choice = expected.choices[update.choice]
        assert update.token_ids == choice.token_ids
        assert update.logprobs == choice.logprobs
        assert "".join(part.text for part in update.parts) == choice.text
    assert usage.num_generated == 60


def test_who_leaves_the_updates_ends_the_request(running):
    served = running.server.models.states[0].served
    journey = Journey("r", "/")

    async def read():
        job = Job(running.llm.encode("One day"), {"max_tokens": 400, "ignore_eos": True})
        generation = await Generation.begin(running.server, served, job, journey)
        async with aclosing(generation.updates()) as updates:
            async for _ in updates:
                break
        return generation

    generation = asyncio.run(read())
    assert generation._handle.cancelled
    assert journey.finish_reasons == ("cancelled",)
    wait_until(lambda: not running.llm.stats().running)


def test_several_generations_come_as_they_come():
    async def one(name, count, error=None):
        for i in range(count):
            await asyncio.sleep(0)
            yield Update(i, [Text(name)])
        if error is not None:
            raise error

    async def read(*works):
        return [(place, update.choice) async for place, update in together(works)]

    found = asyncio.run(read(one("a", 3), one("b", 2)))
    assert sorted(found) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert found[:2] == [(0, 0), (1, 0)]
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(read(one("a", 1000), one("b", 1, ValueError("broken"))))


def test_usages_are_added():
    assert total([Usage(1, 2, 3, 4, 5, 6, 7.0, 8.0), Usage(10, 20, 30, 40, 50, 60, 70.0, 80.0)]) == Usage(
        11, 22, 33, 44, 55, 66, 77.0, 88.0
    )
