"""Many threads use one model: each gets the text that it would get alone, whoever leaves is missed by nobody, and a
program of one thread has no other."""

from __future__ import annotations

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import exl
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.request import TokenRequest
from exl.sampling_params import SamplingParams
from tests.model.engine_at_rest import SECONDS, check_at_rest, engine_threads, wait_for

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
PROMPTS = ("One day", "The dog", "Lily and Tom were", "Once upon a time there was a", "A")


@pytest.fixture(scope="module", params=[STORIES, BUNDLED_MODEL], ids=["dense", "int4"])
def llm(request):
    with exl.load(request.param, device="cpu", context=256, cache_tokens=1024) as model:
        yield model


@pytest.fixture(autouse=True)
def _nothing_stays(llm):
    yield
    gc.collect()
    check_at_rest(llm)


def ask(llm: exl.LLM, how: str, prompt: str, seed: int) -> str:
    options = {"max_tokens": 6 + seed % 11, "temperature": 0.9, "seed": seed}
    if how == "generate":
        return llm.generate(prompt, **options).text
    if how == "stream":
        return "".join(llm.stream(prompt, **options))
    if how == "submit":
        return llm.submit(prompt, **options).result(SECONDS).text
    if how == "events":
        return "".join(event.text for event in llm.submit(prompt, **options).events())
    return llm.generate([prompt, "Another"], **options)[0].text


def test_threads_that_ask_at_once_get_what_each_gets_alone(llm):
    rng = random.Random(1)
    kinds = ("generate", "stream", "submit", "events", "list")
    wanted = [(kinds[i % 5], rng.choice(PROMPTS), rng.randrange(1000)) for i in range(24)]
    expected = [ask(llm, "generate", prompt, seed) for _, prompt, seed in wanted]
    assert wait_for(lambda: not engine_threads())
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(ask, llm, *one) for one in wanted]
        assert [one.result(SECONDS) for one in found] == expected


def test_one_thread_of_the_callers_is_the_only_one(llm):
    assert wait_for(lambda: not engine_threads())
    before = threading.enumerate()
    seen: list[threading.Thread] = []
    first, second = llm.stream("One day", 9), llm.stream("The dog", 9)
    for _ in zip(first, second, strict=False):
        seen += threading.enumerate()
        llm.generate("Lily", 2)
        llm.generate(["A", "B"], 2)
    first.close()
    second.close()
    llm.logits([1, 2, 3])
    llm.stream("One day", 5)  # is never begun
    seen += threading.enumerate()
    assert set(seen) == set(before)


def test_the_thread_comes_with_a_second_party_and_goes_when_nothing_runs(llm):
    assert wait_for(lambda: not engine_threads())
    stream = llm.stream("One day", 40)
    next(stream)
    assert not engine_threads()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llm.generate, "The dog", 5).result(SECONDS)
    (thread,) = engine_threads()  # the stream is not at its end
    assert thread.daemon
    list(stream)
    assert wait_for(lambda: not engine_threads())
    assert llm.submit("The dog", 5).result(SECONDS).num_tokens == 5
    (other,) = engine_threads()
    assert other is not thread
    assert wait_for(lambda: not engine_threads())


def test_both_threads_compute_with_as_many_threads_and_the_same_bits(llm):
    """What a request's own thread computes, and the engine's."""
    seen: dict[str, set[tuple[str, int]]] = {"inline": set(), "threaded": set()}

    def tell(kind: str):
        def progress(_) -> None:
            seen[kind].add((threading.current_thread().name, torch.get_num_threads()))

        return progress

    options = {"max_tokens": 12, "top_logprobs": 3, "temperature": 1.0, "seed": 4, "reuse_prefix": False}
    inline = llm.generate("Once upon a time", **options, prompt_progress=tell("inline"))
    threaded = llm.submit("Once upon a time", **options, prompt_progress=tell("threaded")).result(SECONDS)
    assert seen["inline"] == {(threading.current_thread().name, torch.get_num_threads())}
    assert seen["threaded"] == {("exl engine", torch.get_num_threads())}
    assert inline.logprobs == threaded.logprobs  # float by float
    ids = list(range(3, 90))
    expected = llm.logits(ids)
    with llm.submit("The dog", 200):  # in company
        assert torch.equal(llm.logits(ids), expected)


@pytest.mark.parametrize("how", ["dropped handle", "dropped stream", "with", "break", "error", "cancel", "close"])
@pytest.mark.parametrize("threaded", [False, True], ids=["inline", "threaded"])
@pytest.mark.sample(2)
def test_whoever_leaves_is_missed_by_nobody(llm, how, threaded):
    expected = llm.generate("The dog", 30, temperature=1.0, seed=5)
    other = llm.submit("The dog", 30, temperature=1.0, seed=5) if threaded else None

    def leave() -> None:
        if how == "dropped handle":
            next(llm.submit("One day", 200))
        elif how == "dropped stream":
            next(llm.stream("One day", 200))
        elif how == "with":
            with llm.stream("One day", 200) as stream:
                next(stream)
        elif how == "break":
            for _ in llm.stream("One day", 200):
                break
        elif how == "error":
            for _ in llm.stream("One day", 200):
                raise ZeroDivisionError
        else:
            handle = llm.submit("One day", 200)
            next(handle)
            (handle.cancel if how == "cancel" else handle.close)()
            found = handle.result(SECONDS)
            assert found.finish_reason == handle.status == "cancelled"
            assert 1 <= found.num_tokens < 200
            assert not handle.is_complete
            assert handle.cancelled

    if how == "error":
        with pytest.raises(ZeroDivisionError):
            leave()
    else:
        leave()
    gc.collect()
    if other is not None:
        assert other.result(SECONDS).token_ids == expected.token_ids
    assert llm.generate("The dog", 30, temperature=1.0, seed=5).token_ids == expected.token_ids
    assert not llm._engine.generator.seat.unfinished  # also before anything else is asked


def test_another_thread_cancels(llm):
    started = threading.Event()

    def read(handle) -> str:
        for _ in handle:
            started.set()
        return handle.result().finish_reason

    handle = llm.submit("One day", 240, stop=None)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, handle)
        assert started.wait(SECONDS)
        handle.cancel()
        handle.cancel()
        assert reading.result(SECONDS) in ("cancelled", "stop")  # it may have come to its end before


def test_who_waits_too_long_is_told_and_the_request_goes_on(llm):
    expected = llm.generate("One day", 100, temperature=1.0, seed=2)
    handle = llm.submit("One day", 100, temperature=1.0, seed=2)
    with pytest.raises(TimeoutError, match="no news of the request in time; it goes on"):
        handle.result(0)
    with pytest.raises(TimeoutError):
        handle.next_event(timeout=-1.0)
    assert handle.result(SECONDS).token_ids == expected.token_ids
    assert handle.result(0).token_ids == expected.token_ids  # it is there
    assert handle.is_complete


def test_requests_outlive_whoever_made_the_model():
    handle = exl.load(STORIES, device="cpu", context=64).submit("One day", 20)
    gc.collect()
    assert handle.result(SECONDS).num_tokens == 20


@pytest.mark.parametrize("began", [False, True])
def test_after_close_all_raise_but_what_is_done(began):
    llm = exl.load(STORIES, device="cpu", context=256, max_sequences=1)
    done = llm.submit("One day", 3)
    done.result(SECONDS)
    running, waiting = llm.submit("One day", 250), llm.submit("The dog", 250)
    if began:
        next(running)
    stream = llm.stream("Lily", 50)
    thread = llm._engine.generator.seat._thread
    llm.close()
    assert not thread.is_alive()  # at once
    for handle in (running, waiting):
        for _ in range(2):
            with pytest.raises(exl.ExlError, match="stories260K: the model was closed"):
                handle.result(SECONDS)
        with pytest.raises(exl.ExlError, match="the model was closed"):
            list(handle)
        assert handle.status == "error"
        handle.cancel()
    assert done.result().num_tokens == 3
    for call in (lambda: next(stream), lambda: llm.submit("A", 1), lambda: llm.generate("A", 1), lambda: llm.stats()):
        with pytest.raises(exl.ExlError, match=r"the model (is|was) closed"):
            call()


def test_closing_while_many_threads_ask_keeps_nobody_waiting():
    llm = exl.load(STORIES, device="cpu", context=128, max_sequences=4)
    begun = threading.Barrier(7)
    told: list[str] = []

    def go_on(how: str) -> None:
        begun.wait(SECONDS)
        try:
            while True:
                ask(llm, how, "One day", 9)
        except exl.ExlError as error:
            told.append(str(error))

    threads = [threading.Thread(target=go_on, args=(how,)) for how in ("generate", "stream", "submit") * 2]
    for thread in threads:
        thread.start()
    begun.wait(SECONDS)
    threading.Event().wait(0.1)
    llm.close()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 6
    assert all("closed" in text for text in told)


@pytest.mark.parametrize("act", ["generate", "submit", "close", "drain"])
def test_a_callback_in_the_engines_thread_is_told_too(llm, act):
    told: list[str] = []

    def call(_) -> None:
        try:
            {
                "generate": lambda: llm.generate("A", 1),
                "submit": lambda: llm.submit("A", 1),
                "close": llm.close,
                "drain": lambda: llm.drain(0),
            }[act]()
        except exl.ExlError as error:
            told.append(str(error))

    assert llm.submit("One day in the park", 3, prompt_progress=call).result(SECONDS).num_tokens == 3
    assert told
    assert all("this call came from its callback" in text for text in told)


def test_a_callback_that_fails_ends_its_request_alone(llm):
    expected = llm.generate("The dog", 20).token_ids

    def fail(_) -> None:
        raise ZeroDivisionError("the caller's own")

    good = llm.submit("The dog", 20)
    bad = llm.submit("One day in the park", 20, prompt_progress=fail)
    with pytest.raises(ZeroDivisionError, match="the caller's own"):
        bad.result(SECONDS)
    assert good.result(SECONDS).token_ids == expected


class _Sink:
    """Of a request's own: fails when it is made, at a token, or at the end."""

    num_final_tokens = 0

    def __init__(self, where: str) -> None:
        self.where = where
        if where == "make":
            raise ZeroDivisionError(where)

    def push(self, token_id: int):
        if self.where == "push":
            raise ZeroDivisionError(self.where)
        from exl.text.sink import Verdict

        return Verdict("", None, None)

    def finish(self) -> str:
        raise ZeroDivisionError(self.where)


@pytest.mark.parametrize(
    ("where", "inline"),
    [(where, inline) for where in ("make", "push", "finish") for inline in (False, True)] + [("cancel", False)],
)
def test_a_sink_that_fails_ends_its_request_alone(llm, where, inline):
    generator = llm._engine.generator
    expected = llm.generate("The dog", 20).token_ids
    good = llm.submit("The dog", 20) if not inline else None
    params = SamplingParams(max_tokens=200 if where == "cancel" else 4)
    request = TokenRequest([1, 2, 3], params, make_sink=lambda: _Sink(where), num_choices=2)
    bad = generator.submit(request, inline=inline)
    if where == "cancel":
        assert wait_for(lambda: len(bad.answers[1].token_ids) > 0)
        bad.cancel()
    with pytest.raises(ZeroDivisionError, match=where):
        bad.result(SECONDS)
    if good is not None:
        assert good.result(SECONDS).token_ids == expected
    assert llm.generate("The dog", 20).token_ids == expected


def test_an_interrupt_ends_requests_of_its_own_thread_alone(llm):
    """Another thread's request comes while the interrupted thread is in the middle of a step."""
    expected = llm.generate("The dog", 20).token_ids
    others: list = []

    def interrupt(_) -> None:
        with ThreadPoolExecutor(1) as pool:
            others.append(pool.submit(llm.submit, "The dog", 20).result(SECONDS))
        raise KeyboardInterrupt

    own = llm.stream("Lily", 50)
    next(own)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("One day in the park", 20, prompt_progress=interrupt, reuse_prefix=False)
    with pytest.raises(exl.ExlError, match="the request was interrupted, as its thread was in the middle"):
        list(own)
    assert others[0].result(SECONDS).token_ids == expected
    assert llm.generate("The dog", 20).token_ids == expected


def test_a_request_on_its_way_outlives_another_threads_interrupt(llm, monkeypatch):
    """It was taken from the inbox, and the interrupt came before the scheduler had it."""
    expected = llm.generate("The dog", 20).token_ids
    seat = llm._engine.generator.seat

    def interrupt(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(seat, "_needs_thread", lambda: False)  # not yet
    with ThreadPoolExecutor(1) as pool:
        handle = pool.submit(llm.submit, "The dog", 20).result(SECONDS)
    monkeypatch.setattr(seat.scheduler, "submit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("One day", 3)
    monkeypatch.undo()
    assert handle.result(SECONDS).token_ids == expected


def test_a_seat_that_an_interrupt_left_taken_is_left_by_the_next_call(llm):
    """Ctrl-C after the last statement of a step and before the lock's release."""
    expected = llm.generate("The dog", 20).token_ids
    seat = llm._engine.generator.seat
    for call in (lambda: llm.generate("The dog", 20), lambda: llm.submit("The dog", 20).result(SECONDS)):
        seat._lock.acquire()
        seat._torn = True
        assert call().token_ids == expected
    seat._lock.acquire()
    llm.submit("One day", 1).cancel()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(llm.generate, "The dog", 20).result(SECONDS).token_ids == expected
