"""Beam search: the search alone, against all texts there are; and its sequences over a device without a model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from exl.engine.beams import BeamSearch
from exl.engine.request import TokenRequest
from exl.engine.sequence import State
from exl.errors import ConfigError, MemoryBudgetError
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import EOS, FakeDevice, V
from tests.unit.engine.fake_requests import CharSink, World, alone, results, told
from tests.unit.engine.test_scheduler import DEVICES, prompt, request

# ---- the search alone


def log_probs(text: tuple[int, ...], size: int = 4) -> list[float]:
    """Of a random model, whose last token ends a text."""
    x = np.random.RandomState(hash(text) % 2**31).standard_normal(size) * 2.0
    return (x - math.log(np.exp(x).sum())).tolist()


def likeliest(text: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(enumerate(log_probs(text)), key=lambda one: -one[1]))


def run(search: BeamSearch) -> BeamSearch:
    while not search.is_done:
        before = [beam.token_ids for beam in search.running]
        parents = search.advance([likeliest(beam.token_ids) for beam in search.running])
        for parent, beam in zip(parents, search.running, strict=not search.is_done):
            assert beam.token_ids[:-1] == before[parent]
    return search


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_search_that_is_wide_enough_finds_the_best_of_all_texts(length_penalty: float) -> None:
    """Three tokens and an end, up to four of them: no text is ever dropped."""
    scores: dict[tuple[int, ...], float] = {}
    for length in range(1, 5):
        for text in itertools.product(range(4), repeat=length):
            if 3 not in text[:-1] and (length == 4 or text[-1] == 3):
                total = sum(log_probs(text[:i])[text[i]] for i in range(length))
                scores[text] = total / length**length_penalty
    found = run(BeamSearch(81, 4, frozenset({3}), length_penalty, "never"))
    expected = sorted(scores, key=scores.get, reverse=True)[:10]
    assert [one.token_ids + (3,) * (one.stop_id is not None) for one in found.best(10)] == expected
    assert [one.score for one in found.best(10)] == pytest.approx([scores[text] for text in expected], rel=1e-12)


def test_a_search_that_is_ended_early_tells_the_best_so_far() -> None:
    search = BeamSearch(2, 10, frozenset({3}))
    assert [one.token_ids for one in search.best(2)] == [(), ()]
    search.advance([likeliest(()), likeliest(())])
    best = [one.score for one in search.best(2)]
    assert best == sorted(best, reverse=True)
    assert all(len(one.token_ids) <= 1 for one in search.best(2))


# ---- its sequences


def search(ids: list[int], num_beams: int, count: int, **options) -> TokenRequest:
    params = SamplingParams(max_tokens=count, temperature=0.0, seed=0)
    return TokenRequest(ids, params, num_beams=num_beams, **{"num_choices": num_beams} | options)


def reference(ids: list[int], num_beams: int, count: int) -> list[list[int]]:
    """The device's rows, computed by hand for each text from its beginning."""
    device = FakeDevice(4)

    def row(text: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        whole = [*ids, *text]
        device.ids[: len(whole)], device.bits[: len(whole)] = whole, 0
        x = device._row_logits(np.arange(4), len(whole), device.ids, device.bits).astype(np.float64)
        x -= x.max() + math.log(np.exp(x - x.max()).sum())
        return tuple(sorted(enumerate(x.tolist()), key=lambda one: -one[1]))

    found = BeamSearch(num_beams, count, frozenset({EOS}))
    while not found.is_done:
        found.advance([row(beam.token_ids) for beam in found.running])
    return [list(one.token_ids) for one in found.best(num_beams)]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 120])
def test_texts_are_those_of_a_search_that_computes_all_anew(length: int, runs_ahead: bool) -> None:
    world = World(FakeDevice(16, runs_ahead=runs_ahead, max_sequences=5))
    ticket = world.submit(search(prompt(length), 4, 80, make_sink=CharSink))
    other = world.submit(request(prompt(30, 2), 50))
    world.run()
    assert [answer.token_ids for answer in ticket.answers] == reference(prompt(length), 4, 80)
    assert results(world, other) == alone(other.request, world.device)
    assert world.pool.num_free == 16
    for i, answer in enumerate(ticket.answers):
        assert told(world.events[ticket], i) == (answer.token_ids, "".join(answer.pieces))
    scores = [answer.beam_score for answer in ticket.answers]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_a_paused_search_goes_on_as_if_nothing_had_been(invariant_rows: int, runs_ahead: bool) -> None:
    """Older texts take its pages again and again."""
    paused = 0
    for salt in (7, 8, 9):
        world = World(FakeDevice(9, runs_ahead=runs_ahead, invariant_rows=invariant_rows, chunk=32, max_sequences=6))
        older = [world.submit(request(prompt(60, i), 100, seed=i)) for i in range(2)]
        ticket = world.submit(search(prompt(70, salt), 3, 90))
        while not ticket.ended:
            before, begun = world.stats.preemptions, ticket.sequences[0].num_read > 0
            world.scheduler.step()
            world.check()
            paused += begun and world.stats.preemptions > before and ticket.sequences[0].state is State.WAITING
            assert len({sequence.state is State.WAITING for sequence in ticket.sequences}) == 1
        world.run()
        for one in (*older, ticket):
            assert results(world, one) == alone(one.request, world.device)
        assert world.pool.num_free == 9
    assert paused > 0


def test_beams_share_the_pages_of_their_beginning() -> None:
    world = World(FakeDevice(10, max_sequences=4))
    ticket = world.submit(search(prompt(150), 4, 20))
    while ticket.sequences[0].num_read < 2:
        world.scheduler.step()
    tables = [sequence.pages for sequence in ticket.sequences]
    assert [world.pool.num_holders(page) for page in tables[0]] == [4, 4, 1]
    assert world.device.rows["prompt"] == 149
    world.run()
    assert world.pool.num_free == 10


def test_others_find_its_prompt() -> None:
    world = World(FakeDevice(16, max_sequences=4))
    world.submit(search(prompt(150), 3, 10))
    later = world.submit(request(prompt(150), 5))
    world.run()
    assert later.answers[0].num_reused == 149
    assert results(world, later) == alone(later.request, world.device)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_cancelled_search_tells_the_best_so_far(after: int) -> None:
    world = World(FakeDevice(16, chunk=32, step_tokens=32))
    ticket = world.submit(search(prompt(40), 3, 50, num_choices=2))
    for _ in range(after):
        world.scheduler.step()
    length = ticket.sequences[0].num_read
    world.scheduler.cancel(ticket, "deadline")
    assert ticket.ended
    assert world.pool.num_free == 16
    for answer in ticket.answers:
        assert (answer.outcome.finish_reason, answer.outcome.limit) == ("cancelled", "deadline")
        assert len(answer.token_ids) <= length
    assert max(len(answer.token_ids) for answer in ticket.answers) == length


def test_what_fails_ends_the_search_alone() -> None:
    world = World(FakeDevice(12, max_sequences=5))
    sink = world.submit(search(prompt(9), 2, 5, make_sink=lambda: CharSink(fails_at=2)))
    row = world.submit(search(prompt(12, 4), 2, 20))
    other = world.submit(request(prompt(12, 2), 20))
    for _ in range(8):
        world.scheduler.step()
    world.device.nan_row = 1  # the sink has failed: of the second search
    world.run()
    assert isinstance(sink.error, ZeroDivisionError)
    assert "nan" in str(row.error)
    assert results(world, other) == alone(other.request, world.device)
    assert world.pool.num_free == 12


def test_nothing_may_be_drawn() -> None:
    world = World(FakeDevice(8))
    ticket = world.submit(search(prompt(9), 2, 0))
    world.run()
    assert [(answer.token_ids, answer.outcome.finish_reason) for answer in ticket.answers] == [([], "length")] * 2


def test_what_never_fits_is_refused() -> None:
    world = World(FakeDevice(5, max_sequences=4))
    with pytest.raises(ConfigError, match=r"num_beams: runs 5 sequences together.*max_sequences=4"):
        world.submit(search(prompt(9), 5, 5))
    with pytest.raises(ConfigError, match=rf"num_beams: found 7, expected 6 or fewer with {V} tokens"):
        world.submit(search(prompt(9), 7, 5))
    world.submit(search(prompt(66), 4, 62))  # one page for all and one for each
    with pytest.raises(MemoryBudgetError, match=r"num_beams: 4 sequences need 9 pages .*max_tokens=62 or fewer"):
        world.submit(search(prompt(66), 4, 63))
    world.run()
    assert world.pool.num_free == 5
