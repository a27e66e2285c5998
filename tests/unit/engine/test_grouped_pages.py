"""Sequences with two lists of pages: the layers that have a window keep what it reaches, the others all."""

from __future__ import annotations

import pytest

from exl.batch import PAGE_SIZE
from exl.engine.request import TokenRequest
from exl.engine.ticket import Ticket
from exl.errors import MemoryBudgetError
from exl.layout.window import window_pages
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import FakeDevice
from tests.unit.engine.fake_requests import World, alone, results
from tests.unit.engine.test_scheduler import DEVICES, prompt, request

CONTEXT = 10 * PAGE_SIZE


def grouped(num_pages: int, num_windows: int, reach: int = 66, **options) -> World:
    """``num_windows``: besides the null page."""
    options = {"chunk": 32, "step_tokens": 32} | options
    return World(FakeDevice(num_pages, num_windows=num_windows + 1, reach=reach, **options), CONTEXT)


def run_all(world: World, requests: list[TokenRequest]) -> list[Ticket]:
    tickets = [world.submit(one) for one in requests]
    world.run()
    for ticket, one in zip(tickets, requests, strict=True):
        assert ticket.error is None, ticket.error
        assert results(world, ticket) == alone(one, world.device, CONTEXT)
    return tickets


def at_rest(world: World) -> None:
    world.check()
    for pool in (world.pool, world.pool.windows):
        assert pool.num_free == pool.num_usable


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_one_sequence_has_room_where_one_is_meant_to(invariant_rows: int) -> None:
    """The fewest pages that there may be: more are never held."""
    world = grouped(10, window_pages(66, 32), invariant_rows=invariant_rows)
    run_all(world, [request(prompt(500), 100)])
    at_rest(world)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_who_is_paused_for_lack_of_window_pages_goes_on_as_if_nothing_had_been(
    invariant_rows: int, runs_ahead: bool
) -> None:
    world = grouped(30, 5, runs_ahead=runs_ahead, invariant_rows=invariant_rows)
    run_all(world, [request(prompt(length, i), 160, seed=i) for i, length in enumerate((60, 70, 50))])
    assert world.stats.preemptions > 0
    assert world.pool.num_free == 30
    at_rest(world)


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_a_paused_sequence_takes_the_pages_of_both_kinds_back(invariant_rows: int) -> None:
    world = grouped(10, 8, invariant_rows=invariant_rows)
    ticket = world.submit(request(prompt(200), 60))
    (sequence,) = ticket.sequences
    while sequence.num_read < 30:
        world.scheduler.step()
    held = list(sequence.pages), list(sequence.window_pages)
    assert sequence.num_passed == 1
    world.scheduler.lineup.pause(sequence)
    assert (sequence.pages, sequence.window_pages) == ([], [])
    world.scheduler.step()
    count = min(len(sequence.pages), len(held[0]))
    assert sequence.pages[:count] == held[0][:count]
    assert sequence.window_pages[:count] == held[1][:count]
    world.run()
    assert world.stats.recomputed_tokens == 0
    assert results(world, ticket) == alone(ticket.request, world.device, CONTEXT)


def test_a_paused_sequence_whose_window_pages_went_to_others_is_computed_again() -> None:
    world = grouped(10, 8)
    ticket = world.submit(request(prompt(200), 60))
    (sequence,) = ticket.sequences
    while sequence.num_read < 30:
        world.scheduler.step()
    world.scheduler.lineup.pause(sequence)
    windows = world.pool.windows
    windows.release(windows.allocate(windows.num_free))
    world.run()
    assert world.stats.recomputed_tokens == 229
    assert results(world, ticket) == alone(ticket.request, world.device, CONTEXT)


def test_what_a_text_is_gone_on_with_behind_its_last_whole_page_is_held() -> None:
    """A row at the end of a page sees less than one at its beginning."""
    world = grouped(10, 8)
    (sequence,) = world.submit(request(prompt(250), 100)).sequences
    while sequence.num_cached < 4 * PAGE_SIZE + 60:
        world.scheduler.step()
    windows = world.pool.windows
    windows.release(windows.allocate(windows.num_free))  # what is kept is another one's
    world.scheduler.pages.remember(sequence)
    assert sequence.num_passed == 2  # at the end no row sees the third page any more
    assert world.pool.find(sequence.ids[:320]).num_tokens == 4 * PAGE_SIZE


def test_prompts_that_begin_alike_share_pages_of_both_kinds() -> None:
    world = grouped(20, 20)
    first, second = prompt(300), prompt(270) + prompt(20, 5)
    run_all(world, [request(first, 4)])
    (ticket,) = run_all(world, [request(second, 4)])
    assert ticket.answers[0].num_reused == 256
    assert world.device.rows["prompt"] == 300 + 290 - 256


@pytest.mark.parametrize("kind", ["beams", "guided", "choices"])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_groups_get_to_their_end_wherever_they_are_let_in(kind: str, invariant_rows: int) -> None:
    """With ever fewer window pages, until the request is refused; also if they are paused on their way."""
    params = SamplingParams(max_tokens=90, seed=3, temperature=0.0 if kind == "beams" else 1.0, ignore_eos=True)
    options = {
        "beams": {"num_beams": 3, "num_choices": 2},
        "guided": {"guidance_scale": 2.0, "negative_ids": prompt(380, 4), "num_choices": 2},
        "choices": {"num_choices": 4},
    }[kind]
    asked = TokenRequest(prompt(400), params, **options)
    device = FakeDevice(40, invariant_rows=invariant_rows, chunk=32, step_tokens=32)
    expected, least = alone(asked, device, CONTEXT), {"beams": 4 + 3 * 3, "guided": 2 * 4, "choices": 0}[kind]
    for num_windows in (24, 13, 12, 8, 7) if kind != "choices" else (10, 4):
        world = grouped(40, num_windows, invariant_rows=invariant_rows, max_sequences=5, step_tokens=256)
        if num_windows < least:
            with pytest.raises(MemoryBudgetError, match=r"^(num_beams: 3|guidance_scale: 2) sequences need more pages"):
                world.submit(asked)
            continue
        ticket = world.submit(asked)
        for count in range(200):
            world.scheduler.step()
            world.check()
            if count % 50 == 49 and world.scheduler.running:
                world.scheduler.lineup.pause(world.scheduler.running[0])
        world.run()
        assert ticket.error is None
        assert results(world, ticket) == expected
        at_rest(world)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_pages_of_a_prompt_that_never_drew_are_zeroed_for_another_text(num_steps: int) -> None:
    """In both slabs. Its rows may be no numbers, which nobody has seen: it was cancelled, or a window has passed them.
    Of texts that have drawn nothing is zeroed."""
    world = grouped(9, 6, chunk=64, step_tokens=64)
    run_all(world, [request(prompt(250, 5), 4)])
    assert (world.device.zeroed, world.device.zeroed_windows) == ([], [])
    world.device.nan_row = 60
    first = world.submit(request(prompt(250), 4))
    world.scheduler.step()
    world.device.nan_row, (page, *_) = None, first.sequences[0].window_pages
    for _ in range(num_steps - 1):
        world.scheduler.step()
    world.scheduler.cancel(first)
    world.device.zeroed_windows.clear()  # what it was given itself may have been another's that it had passed
    for pool, zeroed in ((world.pool, world.device.zeroed), (world.pool.windows, world.device.zeroed_windows)):
        pool.release(pool.allocate(pool.num_free))  # for another text
        assert zeroed
    assert page in world.device.zeroed_windows
    run_all(world, [request(prompt(200, salt), 20, seed=salt) for salt in (1, 2, 3)])


def test_a_row_of_no_numbers_ends_its_request_alone() -> None:
    world = grouped(12, 12)
    first, second = world.submit(request(prompt(70), 20)), world.submit(request(prompt(90, 3), 60))
    while not second.sequences[0].num_read:
        world.scheduler.step()
    world.device.nan_row = 0
    world.run()
    assert "nan" in str(first.error)
    assert results(world, second) == alone(second.request, world.device, CONTEXT)
    at_rest(world)


def test_after_an_interrupt_that_tore_the_books_all_pages_are_free() -> None:
    world = grouped(10, 8)
    ticket = world.submit(request(prompt(200), 60))
    for _ in range(9):
        world.scheduler.step()
    ticket.sequences[0].window_pages.pop()  # on its way
    world.scheduler.drop_all([ticket])
    at_rest(world)
    assert world.pool.known_pages() == []
    run_all(world, [request(prompt(200), 60)])
