"""Scheduling over a device without a model: what runs together, waits, is paused, is shared, or fails alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exl.batch import PAGE_SIZE
from exl.engine.prompt_lookup import PromptLookup
from exl.engine.request import TokenRequest
from exl.engine.sequence import State
from exl.engine.ticket import Ticket
from exl.errors import CheckpointError, ExlError
from exl.ops.base import ALL_ROWS as ALL_ALIKE
from exl.request_options import PromptProgress
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import EOS, FakeDevice, Faults
from tests.unit.engine.fake_requests import CharSink, StepMatcher, World, alone, char, results

DEVICES = (ALL_ALIKE, 100, 1)  # invariant rows: compiled kernels, a GPU, torch on a CPU


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(i * i + salt + i // 3) % 11 for i in range(length)]


def request(ids: list[int], max_tokens: int = 8, seed: int = 0, **options) -> TokenRequest:
    params = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    params = {"temperature": 1.0, "ignore_eos": True, **params}
    return TokenRequest(ids, SamplingParams(max_tokens=max_tokens, seed=seed, **params), **options)


def run_all(world: World, requests: list[TokenRequest]) -> list[Ticket]:
    tickets = [world.submit(one) for one in requests]
    world.run()
    for ticket, one in zip(tickets, requests, strict=True):
        assert ticket.error is None, ticket.error
        assert results(world, ticket) == alone(one, world.device)
    return tickets


# ---- few pages


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_who_is_paused_goes_on_as_if_nothing_had_been(invariant_rows: int, runs_ahead: bool) -> None:
    world = World(FakeDevice(5, runs_ahead=runs_ahead, invariant_rows=invariant_rows))
    run_all(world, [request(prompt(length, i), 80, seed=i) for i, length in enumerate((60, 70, 50))])
    assert world.stats.preemptions > 0
    assert world.pool.num_free == 5


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_pages_for_drafts_that_are_not_needed_any_more_are_given_back_when_a_sequence_goes_on(
    invariant_rows: int,
) -> None:
    world = World(FakeDevice(8, invariant_rows=invariant_rows))
    ticket = world.submit(request(prompt(60), 40, temperature=0.0, speculate="prompt", draft_tokens=7))
    (sequence,) = ticket.sequences
    while len(sequence.pages) <= sequence.pages_needed:
        world.scheduler.step()
        assert not ticket.ended
    world.scheduler.lineup.pause(sequence)
    world.run()
    assert results(world, ticket) == alone(ticket.request, world.device)


def test_a_prompt_that_lost_pages_is_cut_again_where_a_cold_run_cuts_it() -> None:
    """One page of a chunk of two is left: the chunk runs again, whole."""
    world = World(FakeDevice(4, invariant_rows=1, chunk=128, step_tokens=128))
    first = world.submit(request(prompt(130), 3))
    (sequence,) = first.sequences
    while sequence.state is not State.RUNNING:
        world.scheduler.step()
    world.scheduler.lineup.pause(sequence)
    kept = sequence.old_pages[0][0]
    world.pool.clear()  # all are free, none is known
    pages = [page for page in range(4) if page != kept]
    world.pool._epochs = [epoch + (page in pages) for page, epoch in enumerate(world.pool._epochs)]
    sequence.old_pages[0] = (kept, world.pool.epoch(kept))
    world.run()
    assert results(world, first) == alone(first.request, world.device)


def test_all_logits_of_a_text_that_fills_the_cache() -> None:
    world = World(FakeDevice(2), context=2 * PAGE_SIZE)
    ticket = world.submit(request(prompt(2 * PAGE_SIZE), 0, wants_all=True, reuse_prefix=False))
    world.run()
    assert sum(len(event.logits) for event in world.events[ticket] if event.logits is not None) == 2 * PAGE_SIZE


def test_all_logits_come_once_though_their_text_is_paused() -> None:
    world = World(FakeDevice(4, chunk=16, step_tokens=16))
    ticket = world.submit(request(prompt(100), 0, wants_all=True, reuse_prefix=False))
    for _ in range(5):
        world.scheduler.step()
    world.scheduler.lineup.pause(ticket.sequences[0])
    world.pool.clear()
    world.run()
    rows = [event.logits for event in world.events[ticket] if event.logits is not None]
    assert sum(map(len, rows)) == 100


# ---- shared prompts


def test_choices_share_the_pages_of_their_prompt() -> None:
    world = World(FakeDevice(12))
    ticket = world.submit(request(prompt(150), 6, num_choices=4))
    while any(sequence.state is not State.RUNNING for sequence in ticket.sequences):
        world.scheduler.step()
    tables = [sequence.pages for sequence in ticket.sequences]
    assert [world.pool.num_holders(page) for page in tables[0]] == [4, 4, 1]
    assert all(table[:2] == tables[0][:2] for table in tables)
    world.run()
    assert world.device.rows["prompt"] == 150
    assert results(world, ticket) == alone(ticket.request, world.device)


def test_choices_without_a_seed_differ() -> None:
    world = World(FakeDevice(12))
    ticket = world.submit(TokenRequest(prompt(5), SamplingParams(max_tokens=20), num_choices=3))
    world.run()
    assert ticket.error is None
    assert len({tuple(answer.token_ids) for answer in ticket.answers}) == 3


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_a_beginning_that_is_being_computed_is_waited_for(invariant_rows: int) -> None:
    world = World(FakeDevice(16, invariant_rows=invariant_rows, step_tokens=64))
    run_all(world, [request(prompt(192) + [i] * 3, 4, seed=i) for i in range(4)])
    assert world.stats.prompt_tokens == 192 + 4 * 3


def test_nobody_waits_for_a_beginning_whose_reader_does_not_read() -> None:
    world = World(FakeDevice(16, step_tokens=64))
    slow = world.submit(request(prompt(200), 0, wants_all=True, reuse_prefix=False), most_unread=1)
    world.scheduler.step()
    assert slow.lags
    other = world.submit(request(prompt(150), 4))
    for _ in range(20):
        world.scheduler.step()
    assert other.ended


def test_a_short_prompt_reuses_nothing_that_other_kernels_have_computed() -> None:
    """Prompts of up to four tokens run as decode rows here, longer ones do not."""
    world = World(FakeDevice(8, invariant_rows=100, max_decode_prompt=4))
    run_all(world, [request(prompt(20), 4)])
    run_all(world, [request(prompt(4), 12, temperature=0.0)])


# ---- run ahead


def test_no_token_is_read_before_the_next_step_is_launched() -> None:
    world = World(FakeDevice(16, runs_ahead=True))
    run_all(world, [request(prompt(20 + i, i), 8 + i, seed=i) for i in range(3)])
    calls = " ".join(world.device.log)
    assert "sample step read sample step" in calls
    assert "sample read step" not in calls


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_stop_that_is_found_late_costs_a_row(runs_ahead: bool) -> None:
    world = World(FakeDevice(16, runs_ahead=runs_ahead))
    requests = [request(prompt(20 + i, i), 60, seed=i, ignore_eos=False) for i in range(4)]
    tickets = run_all(world, requests)
    num_stops = sum(ticket.answers[0].outcome.stop_reason == EOS for ticket in tickets)
    assert num_stops > 0
    assert world.stats.wasted_rows <= num_stops * runs_ahead
    drawn = sum(len(ticket.answers[0].token_ids) - 1 for ticket in tickets) + num_stops
    assert world.device.rows["decode"] <= drawn + world.stats.wasted_rows


@pytest.mark.parametrize("passes", [False, True])
def test_pages_of_a_prompt_that_never_drew_are_zeroed_for_another_text(passes: bool) -> None:
    """Its rows may be no numbers, which nobody has seen: it was cancelled, or its window has passed them."""
    device = FakeDevice(6 if passes else 5, window=70 if passes else None, step_tokens=64, chunk=64)
    world = World(device, passes=passes)
    device.nan_row = 60
    first = world.submit(request(prompt(250), 4))
    world.scheduler.step()
    device.nan_row = None
    if passes:
        for _ in range(3):
            world.scheduler.step()
    world.scheduler.cancel(first)
    others = run_all(world, [request(prompt(100, salt), 20, seed=salt) for salt in (1, 2, 3)])
    assert all(ticket.error is None for ticket in others)
    assert device.zeroed


def test_nothing_is_left_to_those_that_need_no_page_more() -> None:
    """Each fits into one page to its end: all run at once, paused by nobody."""
    world = World(FakeDevice(4))
    tickets = [world.submit(request(prompt(30, i), 20, seed=i)) for i in range(4)]
    world.scheduler.step()
    world.scheduler.step()
    assert len(world.scheduler.running) == 4
    world.run()
    assert [results(world, ticket) for ticket in tickets] == [alone(t.request, world.device) for t in tickets]
    assert world.stats.preemptions == 0


# ---- drafts


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("draft_tokens", [None, 1, 7])
def test_drafts_change_nothing(draft_tokens: int | None, runs_ahead: bool) -> None:
    def banning() -> CharSink:
        return CharSink(banned=("bc", "ea"))

    options = {"speculate": "prompt", "draft_tokens": draft_tokens}
    world = World(FakeDevice(16, runs_ahead=runs_ahead))
    tickets = run_all(
        world,
        [
            request(prompt(20), 30, temperature=0.0, **options),
            request(prompt(30, 1), 30, mirostat_tau=2.0, **options),
            request(
                prompt(40, 2), 30, repetition_penalty=1.2, make_sink=lambda: CharSink(banned=("bc", "ea")), **options
            ),
            request(prompt(50, 3), 30, make_matcher=StepMatcher, **options),
        ],
    )
    assert sum(answer.num_accepted for ticket in tickets for answer in ticket.answers) > 0


def test_drafts_that_were_asked_for_leave_those_of_others_their_rows() -> None:
    """The device checks that no batch has more rows than it has room for."""
    world = World(FakeDevice(16, decode_rows=8))
    options = {"speculate": "prompt", "temperature": 0.0}
    run_all(
        world,
        [
            request([1, 2] * 20, 40, draft_tokens=7, **options),
            request([3, 4, 5] * 20, 40, **options),
            request([6, 7] * 20, 40, draft_tokens=7, **options),
        ],
    )


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_draft_model_that_fails_ends_the_requests_that_use_it(runs_ahead: bool) -> None:
    class Failing(PromptLookup):
        def propose(self, want):
            if any(len(sequence.ids) > 50 for sequence, _ in want):
                raise RuntimeError("out of luck")
            return super().propose(want)

    world = World(FakeDevice(16, runs_ahead=runs_ahead))
    world.scheduler.drafts.add("draft", Failing((2, 1)))
    longest, shorter, other = (
        world.submit(one)
        for one in (
            request(prompt(40), 20, temperature=0.0, speculate="draft", draft_tokens=2),
            request(prompt(30, 1), 30, temperature=0.0, speculate="draft", draft_tokens=2),
            request(prompt(35, 2), 30, temperature=0.0, speculate="prompt"),
        )
    )
    world.run()
    assert [str(ticket.error) for ticket in (longest, shorter)] == ["out of luck"] * 2
    assert results(world, other) == alone(other.request, world.device)


# ---- tokens that are taken back


def text_of(ids: list[int]) -> str:
    return "".join(map(char, ids))


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("invariant_rows", DEVICES)
@pytest.mark.parametrize("length", [100, 127, 128, 129])
def test_taking_back_the_first_token_writes_to_no_page_of_others(
    length: int, invariant_rows: int, runs_ahead: bool
) -> None:
    """The last rows of the prompt run again, but its pages are shared by then. The device checks who writes."""
    world = World(FakeDevice(16, invariant_rows=invariant_rows, runs_ahead=runs_ahead))
    plain = request(prompt(length), 12, num_choices=3)
    banned = tuple(text_of(found[0][:2]) for found in alone(plain, world.device))
    tickets = run_all(world, [plain, replace(plain, make_sink=lambda: CharSink(banned=banned))])
    assert all(sequence.rewinds for sequence in tickets[1].sequences)


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_who_reuses_inexactly_and_takes_its_first_token_back_leaves_others_alone(invariant_rows: int) -> None:
    world = World(FakeDevice(16, invariant_rows=invariant_rows))
    first = request(prompt(100), 60)
    (ticket,) = run_all(world, [first])
    again = request(prompt(100) + ticket.answers[0].token_ids, 12, reuse_prefix=True)
    run_all(world, [request(prompt(130, 3), 4)])
    found = World(FakeDevice(16, invariant_rows=invariant_rows))
    run_all(found, [first])
    plain = found.submit(again)
    found.run()
    banned = (text_of(plain.answers[0].token_ids[:2]),)
    tickets = [world.submit(replace(again, make_sink=make)) for make in (CharSink, lambda: CharSink(banned=banned))]
    world.run()
    assert tickets[1].sequences[0].rewinds
    assert tickets[0].answers[0].token_ids == plain.answers[0].token_ids


def test_a_page_that_others_found_is_not_written_when_its_tokens_are_taken_back() -> None:
    """A is paused with a full page, of which its answer is the end; B, whose prompt is A's text, shares that page; then
    A takes tokens of that page back and draws others."""
    world = World(FakeDevice(16))
    plain = alone(request(prompt(60), 20), world.device)[0][0]
    banned = text_of(plain[3:6])
    a = world.submit(request(prompt(60), 20, make_sink=lambda: CharSink(banned=(banned,))))
    (sequence,) = a.sequences
    while len(sequence.ids) < PAGE_SIZE + 1:
        world.scheduler.step()
    assert not sequence.rewinds
    world.scheduler.lineup.pause(sequence)
    b = world.submit(request([*sequence.ids[:PAGE_SIZE], 5], 40))
    c = request([*sequence.ids[:PAGE_SIZE], 6], 8)
    while not b.sequences[0].pages:
        world.scheduler.step()
    assert b.answers[0].num_reused == PAGE_SIZE
    world.run()
    assert sequence.rewinds
    for ticket in (a, b):
        assert results(world, ticket) == alone(ticket.request, world.device)
    run_all(world, [c])


# ---- failures


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_row_of_no_numbers_fails_alone_and_leaves_no_trace(runs_ahead: bool) -> None:
    world = World(FakeDevice(8, runs_ahead=runs_ahead))
    bad, good = world.submit(request(prompt(70), 30)), world.submit(request(prompt(60, 1), 30))
    for _ in range(4):
        world.scheduler.step()
    world.device.nan_row = 0
    world.run()
    assert isinstance(bad.error, ExlError)
    assert "nan" in str(bad.error)
    assert results(world, good) == alone(good.request, world.device)
    assert world.device.zeroed
    assert not any(map(world.device.is_poisoned, range(8)))
    run_all(world, [request(prompt(70), 30), request(prompt(190, 4), 30)])


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_prompt_of_no_numbers_is_not_remembered(runs_ahead: bool) -> None:
    world = World(FakeDevice(12, runs_ahead=runs_ahead))
    world.device.nan_row = 3
    bad = world.submit(request(prompt(150), 30, num_choices=3))
    follower = world.submit(request([*prompt(150), 1], 30))
    world.run()
    assert "nan" in str(bad.error)
    assert not any(map(world.device.is_poisoned, range(12)))
    assert results(world, follower) == alone(follower.request, world.device)
    run_all(world, [bad.request])


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("culprit", ["sink", "finish", "matcher", "progress", "make_sink"])
def test_what_a_request_brings_fails_alone(culprit: str, num_choices: int, runs_ahead: bool) -> None:
    def progress(_: PromptProgress) -> None:
        raise ZeroDivisionError("progress")

    def broken() -> CharSink:
        raise ZeroDivisionError("make_sink")

    options = {
        "sink": {"make_sink": lambda: CharSink(fails_at=3)},
        "finish": {"make_sink": lambda: CharSink(fails_at=-1)},
        "make_sink": {"make_sink": broken},
        "matcher": {"make_matcher": lambda: StepMatcher(fails_at=3)},
        "progress": {"prompt_progress": progress},
    }[culprit]
    world = World(FakeDevice(12, runs_ahead=runs_ahead))
    good = [request(prompt(60), 12), request(prompt(30, 2), 12)]
    tickets = [world.submit(good[0])]
    for _ in range(2):
        world.scheduler.step()
    bad = world.submit(request(prompt(70, 1), 6, num_choices=num_choices, **options))
    tickets.append(world.submit(good[1]))
    world.run()
    assert isinstance(bad.error, ZeroDivisionError) or "matcher" in str(bad.error)
    for ticket, one in zip(tickets, good, strict=True):
        assert results(world, ticket) == alone(one, world.device)
    assert world.pool.num_free == 12


def test_a_sink_that_fails_when_its_request_is_given_up_fails_alone() -> None:
    world = World(FakeDevice(12))
    bad = world.submit(request(prompt(70, 1), 6, make_sink=lambda: CharSink(fails_at=-1), num_choices=2))
    good = world.submit(request(prompt(60), 12))
    for _ in range(2):
        world.scheduler.step()
    world.scheduler.cancel(bad)
    assert bad.ended
    world.run()
    assert results(world, good) == alone(good.request, world.device)


def test_a_sink_of_a_full_context_that_fails() -> None:
    world = World(FakeDevice(12))
    bad = world.submit(request(prompt(4 * PAGE_SIZE), 6, make_sink=lambda: CharSink(fails_at=-1), num_choices=2))
    assert isinstance(bad.error, ZeroDivisionError)
    assert not world.scheduler.live


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_layer_that_cannot_be_read_is_read_once_more(runs_ahead: bool) -> None:
    world = World(FakeDevice(12, runs_ahead=runs_ahead))
    requests = [request(prompt(60 + i, i), 12, num_choices=2) for i in range(2)]
    tickets = [world.submit(one) for one in requests]
    for after_rows in (0, 1, 40, 1, 0):
        world.device.faults = Faults(CheckpointError("once"), after_rows)
        world.scheduler.step()
    world.device.faults = None
    world.run()
    for ticket, one in zip(tickets, requests, strict=True):
        assert results(world, ticket) == alone(one, world.device)


@pytest.mark.parametrize(("error", "times"), [(CheckpointError("twice"), 2), (RuntimeError("once"), 1)])
def test_a_step_that_fails_ends_those_who_took_part(error: Exception, times: int) -> None:
    world = World(FakeDevice(12, max_sequences=2))
    tickets = [world.submit(request(prompt(60 + i, i), 12)) for i in range(3)]
    for _ in range(3):
        world.scheduler.step()
    world.device.faults = Faults(error, 1, times)
    world.run()
    assert [ticket.error for ticket in tickets] == [error, error, None]
    assert results(world, tickets[2]) == alone(tickets[2].request, world.device)


def test_pages_that_were_to_be_zeroed_when_an_interrupt_came_are_not_lost() -> None:
    world = World(FakeDevice(4))
    ticket = world.submit(request(prompt(70), 30))
    for _ in range(3):
        world.scheduler.step()
    world.device.nan_row = 0
    zero = world.device.zero_pages

    def interrupted(pages: list[int]) -> None:
        world.device.zero_pages = zero
        raise KeyboardInterrupt

    world.device.zero_pages = interrupted
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.scheduler.drop_all([ticket])
    world.check()
    assert world.pool.num_free == 4


# ---- readers


def test_who_reads_slowly_waits_and_goes_on() -> None:
    world = World(FakeDevice(12))
    slow, other = world.submit(request(prompt(60), 20), most_unread=3), world.submit(request(prompt(30, 1), 20))
    while world.scheduler.step():
        pass
    assert slow.lags
    assert slow.num_put - slow.num_taken == 3
    assert other.ended
    assert slow.sequences[0].pages
    while not slow.ended:
        world.take(slow)
        assert world.scheduler.step()
    world.take(slow)
    world.take(other)
    for ticket in (slow, other):
        assert results(world, ticket) == alone(ticket.request, world.device)


def test_who_reads_slowly_makes_room_for_others() -> None:
    world = World(FakeDevice(4, max_sequences=1))
    slow = world.submit(request(prompt(60), 20), most_unread=3)
    while world.scheduler.step():
        pass
    other = world.submit(replace(slow.request, num_choices=2))
    while world.scheduler.step():
        pass
    assert other.ended
    assert slow.sequences[0].state is State.WAITING
    world.run()
    for ticket in (slow, other):
        assert results(world, ticket) == alone(ticket.request, world.device)
