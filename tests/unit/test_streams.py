"""Unfinished streams: whoever leaves one is told, never hangs, and loses no error of their own."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import exl

STORIES = Path(__file__).parents[1] / "data" / "stories260K"


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES) as model:
        yield model


def begun(llm: exl.LLM) -> exl.TextIterator:
    stream = llm.stream("One day", 100)
    next(stream)
    return stream


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BrokenPipeError, OSError, None])
@pytest.mark.parametrize("kind", ["text", "chat", "logits"])
def test_leaving_a_block_with_an_unfinished_stream(error, kind):
    """``break``, an exception of the caller's own, Ctrl-C, a closed pipe, a full disk: the model is closed, the error
    is the caller's, and the stream says why it has ended."""

    def use() -> None:
        nonlocal stream, llm
        with exl.load(STORIES, prefill_chunk=32) as llm:
            chat = llm.chat()
            make = {"text": lambda: llm.stream("One", 50), "chat": lambda: chat.stream("One", 50)}
            stream = make.get(kind, lambda: llm.iter_logits([1] * 500))()
            for _ in stream:
                if error is None:
                    break
                raise error("the caller's own")

    stream = llm = None
    if error is None:
        use()
    else:
        with pytest.raises(error, match="the caller's own"):
            use()
    assert repr(llm).endswith("closed)")
    with pytest.raises(exl.ExlError, match="stories260K: the model was closed"):
        next(stream)


def test_a_chat_keeps_what_it_had_when_the_model_is_closed():
    llm = exl.load(STORIES)
    chat = llm.chat()
    stream = chat.stream("One", 50)
    said = next(stream) + next(stream)
    llm.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said.strip()}


def test_closing_from_another_thread_ends_what_runs():
    llm = exl.load(STORIES)
    told: list[str] = []
    running = threading.Event()

    def ask() -> None:
        try:
            for _ in llm.stream("One day", 480):
                running.set()
        except exl.ExlError as error:
            told.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    assert running.wait(60)
    llm.close()
    thread.join(60)
    assert not thread.is_alive()
    assert told == ["stories260K: the model was closed"]


def test_a_stream_closed_by_another_thread_stops_after_its_token(llm):
    stream = llm.stream("One day", 480)
    pieces: list[str] = []
    running = threading.Event()

    def take() -> None:
        for piece in stream:
            pieces.append(piece)
            running.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert running.wait(60)
    stream.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(pieces) < 400
    assert llm.generate("One day", 5).num_tokens == 5
    with pytest.raises(exl.ExlError, match="has not ended"):
        _ = stream.completion


def test_a_with_block_closes_a_stream(llm):
    with llm.stream("One day", 50) as stream:
        next(stream)
    assert repr(stream) == "TextIterator(closed, 1 pieces so far)"
    assert list(stream) == []
    assert llm.generate("One day", 5).num_tokens == 5


def test_what_iterators_show(llm):
    stream = llm.stream("One day", 5)
    assert repr(stream) == "TextIterator(unfinished, 0 pieces so far)"
    list(stream)
    assert repr(stream) == f"TextIterator(ended: {stream.completion!r})"


def test_a_stream_counts_its_tokens(llm):
    for stream in (llm.stream("One day", 9), llm.chat().stream("One day", 9)):
        counts = [stream.num_tokens, *(stream.num_tokens for _ in stream)]
        assert counts[0] == 0
        assert counts == sorted(counts)
        assert len(set(counts)) > 4
        assert stream.num_tokens == stream.completion.num_tokens == 9


def test_a_stream_that_threads_take_turns_at_keeps_nobody_waiting(llm):
    """A server's threads take a stream's pieces in turn: the thread that began one may be given another request."""
    expected = llm.generate("One day", 30).text
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        first = llm.stream("One day", 30)
        pieces = [one.submit(next, first).result(60)]
        # By the thread that took the first piece, while nobody takes the next.
        assert one.submit(llm.generate, "The dog", 5).result(60).num_tokens == 5
        pieces += two.submit(list, first).result(60)
    assert "".join(pieces) == expected


def test_a_stream_that_nobody_goes_on_with_waits_for_its_reader(llm):
    """It may be some hundred tokens ahead, not more, and its text is the same."""
    expected = llm.generate("One day", 480, temperature=1.0, seed=3, ignore_eos=True).text
    stream = llm.stream("One day", 480, temperature=1.0, seed=3, ignore_eos=True)
    first = next(stream)
    stream._handle._ticket.max_unread = 20
    for _ in range(3):  # another thread: the engine's own drives both
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(llm.generate, "The dog", 30).result(60).num_tokens == 30
    assert 1 < stream.num_tokens <= 21
    assert first + "".join(stream) == expected


def test_two_streams_of_one_thread_go_on_side_by_side(llm):
    expected = [llm.generate(prompt, 20).text for prompt in ("One day", "The dog")]
    streams = [llm.stream(prompt, 20) for prompt in ("One day", "The dog")]
    pieces = list(zip(*streams, strict=True))
    assert ["".join(side) for side in zip(*pieces, strict=True)] == expected


def test_a_callback_that_calls_its_own_model_is_told(llm):
    def call(progress) -> None:
        llm.generate("The dog", 5)

    def close(progress) -> None:
        llm.close()

    for callback in (call, close):
        with ThreadPoolExecutor(1) as pool, pytest.raises(exl.ExlError, match="this call came from its callback"):
            pool.submit(llm.generate, "One day in the park", 5, prompt_progress=callback).result(60)
    assert llm.generate("One day", 5).num_tokens == 5


def test_async_iteration_leaves_the_loop_free(llm):
    expected = [llm.generate(prompt, 20).text for prompt in ("One day", "The dog", "Lily")]

    async def ask(prompt: str) -> str:
        return "".join([piece async for piece in llm.stream(prompt, 20)])

    async def ask_all() -> list[str]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        found = await asyncio.gather(*map(ask, ("One day", "The dog", "Lily")))
        ticking.cancel()
        assert ticks > 20
        return found

    assert asyncio.run(ask_all()) == expected


@pytest.mark.parametrize("how", ["break", "cancel", "cancel while waiting", "aclose"])
def test_async_streams_that_end_early_give_their_pages_back(llm, how):
    async def use() -> None:
        async with llm.stream("One day", 400) as stream:
            async for _ in stream:
                if how == "break":
                    break
                if how == "aclose":
                    await stream.aclose()
                    await stream.aclose()
                    break
                if how == "cancel":
                    running.set()
                if how == "cancel while waiting":
                    waiting = asyncio.create_task(llm.submit("The dog", 480).aresult())
                    await asyncio.sleep(0)
                    waiting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                    return

    async def run() -> None:
        nonlocal running
        running = asyncio.Event()
        task = asyncio.create_task(use())
        if how == "cancel":
            await asyncio.wait_for(running.wait(), 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await asyncio.wait_for(task, 60)

    running = None
    asyncio.run(run())
    assert llm.generate("One day", 5).num_tokens == 5
    engine = llm._engine.generator
    assert not engine.scheduler.live
    engine.pool.check([])


def test_an_async_stream_tells_errors_and_its_completion(llm):
    async def run() -> exl.Completion:
        stream = llm.stream("One day", 5)
        async for _ in stream:
            pass
        with pytest.raises(exl.ConfigError, match="context holds"):
            async for _ in llm.stream([1] * 10_000, 5):
                pass
        assert [piece async for piece in stream] == []  # as often as one asks
        assert await anext(aiter(stream), "none") == "none"
        await stream.aclose()
        return stream.completion

    assert asyncio.run(run()).text == llm.generate("One day", 5).text
