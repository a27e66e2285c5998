"""What a server needs of an engine: numbers, an end in good order, a queue and requests with limits, and errors that
reach everybody."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import exl
from tests.model.engine_at_rest import SECONDS, check_at_rest, wait_for

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
LONG = {"max_tokens": 200, "temperature": 1.0, "seed": 12}  # does not stop before that


def load(**options) -> exl.LLM:
    return exl.load(STORIES, device="cpu", **{"context": 256, **options})


@pytest.fixture
def llm():
    with load(cache_tokens=1024) as model:
        yield model


def test_the_long_request_is_long(llm):
    assert llm.generate("One day", **LONG).num_tokens == 200


def test_numbers_add_up(llm):
    empty = llm.stats()
    assert (empty.steps, empty.running, empty.waiting, empty.pages_free) == (0, 0, 0, empty.pages_total)
    done = [llm.generate("One day in the park there was a dog", 9) for _ in range(2)]
    stats = llm.stats()
    assert (stats.prefix_lookups, stats.prefix_hits) == (2, 1)
    assert stats.prefix_tokens == done[1].num_reused_tokens > 0
    assert stats.prompt_tokens == sum(one.num_prompt_tokens - one.num_reused_tokens for one in done)
    assert stats.generated_tokens == sum(one.num_tokens for one in done) == 18
    assert stats.steps >= 18
    assert stats.pages_kept > 0
    assert (stats.running, stats.waiting, stats.pages_free) == (0, 0, stats.pages_total)
    story = "Once upon a time, there was a little"
    guessed = llm.generate(f"{story} girl named Lily. {story}", 12, speculate="prompt", draft_tokens=3)
    stats = llm.stats()
    assert (stats.drafts_tried, stats.drafts_accepted) == (guessed.num_drafted, guessed.num_accepted)
    assert stats.drafts_tried > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.steps = 1
    assert empty.steps == 0  # a snapshot


def test_numbers_of_requests_that_run_and_wait():
    with load(max_sequences=2, cache_tokens=512) as llm:
        handles = [llm.submit("One day", **LONG) for _ in range(5)]
        assert wait_for(lambda: llm.stats().running == 2)
        stats = llm.stats()
        assert stats.waiting == 3
        assert stats.pages_free < stats.pages_total
        for handle in handles:
            handle.cancel()
        check_at_rest(llm)
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_pauses_are_counted():
    with load(context=128, cache_tokens=192, max_sequences=3) as llm:  # three pages; two want four
        prompts = [list(range(i, i + 55)) for i in (10, 20, 30)]
        for handle in [llm.submit(ids, 30, temperature=1.0, seed=1) for ids in prompts]:
            handle.result(SECONDS)
        assert llm.stats().preemptions > 0


@pytest.mark.parametrize("who", ["submit", "inline"])
def test_draining_lets_requests_end(llm, who):
    with ThreadPoolExecutor(1) as pool:
        asked = (
            llm.submit("One day", 30)
            if who == "submit"
            else pool.submit(llm.generate, "One day", **{**LONG, "max_tokens": 30})
        )
        if who == "inline":
            assert wait_for(lambda: llm.stats().running or asked.done())
        assert llm.drain(SECONDS)
        assert asked.result(SECONDS).finish_reason in ("length", "stop")
    for call in (lambda: llm.generate("A", 1), lambda: llm.submit("A", 1), lambda: next(llm.stream("A", 1))):
        with pytest.raises(exl.ExlError, match="the model is being drained"):
            call()
    assert llm.drain(0)  # as often as one likes
    check_at_rest(llm)


def test_draining_ends_what_does_not_end_by_itself(llm):
    unread = llm.stream("One day", **LONG, max_unread=4)
    next(unread)
    long = llm.submit("The dog", **LONG)
    assert not llm.drain(0.01)
    assert long.result(SECONDS).finish_reason in ("cancelled", "length")
    list(unread)
    check_at_rest(llm)


def test_a_full_queue_refuses():
    with load(max_sequences=1, max_queue=2, cache_tokens=512) as llm:
        handles = [llm.submit("One day", **LONG) for _ in range(3)]  # one runs, two wait
        with pytest.raises(exl.QueueFullError, match=r"\(max_sequences=1\), and . requests wait \(max_queue=2\)"):
            llm.submit("The dog", 3)
        with ThreadPoolExecutor(1) as pool, pytest.raises(exl.QueueFullError):
            pool.submit(llm.generate, "The dog", 3).result(SECONDS)
        handles[1].cancel()
        assert wait_for(lambda: llm.stats().waiting == 1)
        other = llm.submit("The dog", 3)  # there is room again
        for handle in handles:
            handle.cancel()
        assert other.result(SECONDS).num_tokens == 3
    with load(max_sequences=1, max_queue=0) as llm:
        assert llm.generate("The dog", 3).num_tokens == 3
        with llm.submit("One day", **LONG), pytest.raises(exl.QueueFullError):
            llm.submit("The dog", 3)


@pytest.mark.parametrize("value", [-1, True, 1.5, "3"])
def test_a_queue_of_no_length_is_refused(value):
    with pytest.raises(exl.ConfigError, match="max_queue: found"):
        load(max_queue=value)


@pytest.mark.parametrize("how", ["submit", "generate", "stream", "waiting"])
def test_a_deadline_ends_a_request_with_what_it_has(how):
    with load(max_sequences=1, cache_tokens=512) as llm:
        expected = llm.generate("One day", **LONG)
        step = llm._engine.generator.scheduler.step
        llm._engine.generator.scheduler.step = lambda: (time.sleep(0.01), step())[1]  # 200 tokens take 2 s
        options = LONG | {"deadline": 0.3}
        if how == "generate":
            found = llm.generate("One day", **options)
        elif how == "stream":
            stream = llm.stream("One day", **options)
            text = "".join(stream)
            found = stream.completion
            assert found.text == text
        elif how == "submit":
            found = llm.submit("One day", **options).result(SECONDS)
        else:
            first = llm.submit("The dog", **LONG)
            found = llm.submit("One day", **options).result(SECONDS)
            assert found.num_tokens == 0
            first.cancel()
        assert (found.finish_reason, found.limit) == ("cancelled", "deadline")
        assert found.num_tokens < 200
        assert found.token_ids == expected.token_ids[: found.num_tokens]
        check_at_rest(llm)


def test_a_deadline_that_is_far_away_changes_nothing(llm):
    expected = llm.generate("One day", 9, temperature=1.0, seed=3)
    assert llm.generate("One day", 9, temperature=1.0, seed=3, deadline=1e6).token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("deadline", value) for value in (0, -1.0, float("inf"), float("nan"), "1", True)),
        *(("max_unread", value) for value in (0, 2.0, True)),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(llm, name, value):
    with pytest.raises(exl.ConfigError, match=f"{name}: found"):
        llm.submit("One day", 3, **{name: value})


@pytest.mark.parametrize("how", ["inline", "threaded"])
def test_a_driver_that_fails_tells_everybody(llm, how, monkeypatch):
    expected = llm.generate("One day", 5).text

    def fail() -> bool:
        raise ZeroDivisionError("a fault of the engine's own")

    handles = [llm.submit(prompt, **LONG) for prompt in ("One day", "The dog")] if how == "threaded" else []
    stream = llm.stream("Lily", **LONG)
    if handles:
        next(handles[0])
    told: list[BaseException] = []

    def read() -> None:
        try:
            list(stream)
        except Exception as error:
            told.append(error)

    monkeypatch.setattr(llm._engine.generator.scheduler, "step", fail)
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    (error,) = told
    if how == "inline":  # the engine is as it was before
        assert isinstance(error, ZeroDivisionError)
        monkeypatch.undo()
        assert llm.generate("One day", 5).text == expected
        return
    message = "the engine has stopped: ZeroDivisionError: a fault of the engine's own"
    for handle in handles:
        with pytest.raises(exl.ExlError, match=message) as found:
            handle.result(SECONDS)
        assert isinstance(found.value.__cause__, ZeroDivisionError)
    for call in (lambda: llm.generate("A", 1), lambda: llm.submit("A", 1)):
        with pytest.raises(exl.ExlError, match=message) as found:
            call()
        assert isinstance(found.value.__cause__, ZeroDivisionError)
    assert message in str(error)
    assert wait_for(lambda: llm._engine.generator.seat._thread is None)
    check_at_rest(llm)


@pytest.mark.parametrize("how", ["inline", "threaded"])
def test_a_device_that_is_lost_ends_the_engine_and_everybody_learns_it(llm, how, monkeypatch):
    """As after an illegal access on a GPU: all that is asked of it from then on fails, also what tidies up."""
    runner = llm._engine.generator.runner

    def fail(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    streams = [llm.stream(prompt, **LONG) for prompt in ("One day", "The dog")]
    handles = [llm.submit("Lily", **LONG)] if how == "threaded" else []
    for one in streams + handles:
        next(one)
    for name in ("step", "sample", "abandon", "zero_pages", "copy_pages"):
        monkeypatch.setattr(runner, name, fail)
    monkeypatch.setattr(runner, "is_lost", lambda: True)
    for one in streams + handles:
        with pytest.raises(exl.ExlError, match="the GPU answers no more: RuntimeError: CUDA error: an illegal memory"):
            for _ in one:
                pass
    for _ in range(2):
        with pytest.raises(exl.ExlError, match="the engine has stopped: DeviceLostError: the GPU answers no more"):
            llm.generate("One day", 3)
    llm.close()
    with pytest.raises(exl.ExlError, match="the model is closed"):
        llm.generate("One day", 3)


def test_a_pass_that_fails_ends_those_who_took_part_alone(llm, monkeypatch):
    """A fault of ours or too little memory, on a device that goes on."""
    runner = llm._engine.generator.runner
    expected = llm.generate("The dog", 20).token_ids
    step, bad = runner.step, llm.stream("One day", **LONG)
    next(bad)

    def fail(*_) -> None:
        raise MemoryError("no memory for this pass")

    monkeypatch.setattr(runner, "step", fail)
    with pytest.raises(MemoryError, match="no memory for this pass"):
        list(bad)
    monkeypatch.setattr(runner, "step", step)
    assert llm.generate("The dog", 20).token_ids == expected
    check_at_rest(llm)


def test_a_thread_that_cannot_be_started_is_told(llm, monkeypatch):
    def fail(_) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(exl.ExlError, match="could not start its thread: can't start new thread"):
        llm.submit("One day", 3)
    assert llm.generate("One day", 3).num_tokens == 3  # which needs none
    monkeypatch.undo()
    assert llm.submit("One day", 3).result(SECONDS).num_tokens == 3
    check_at_rest(llm)
