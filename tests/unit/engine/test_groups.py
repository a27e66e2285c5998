"""Sequences that run together or not at all, over a device without a model: guided texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.engine.guidance import GuidedRow, guide
from exl.engine.request import TokenRequest
from exl.engine.sequence import State
from exl.errors import ConfigError, MemoryBudgetError
from exl.request_options import PromptProgress
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import FakeDevice
from tests.unit.engine.fake_requests import CharSink, StepMatcher, World, alone, results
from tests.unit.engine.test_scheduler import DEVICES, prompt, request, run_all

BANS = tuple(a + b for a in "aceg" for b in "bdfh")


def guided(length: int, negative: int | None, max_tokens: int = 8, scale: float = 2.0, **options) -> TokenRequest:
    ids = None if negative is None else prompt(negative, 5)
    return request(prompt(length), max_tokens, guidance_scale=scale, negative_ids=ids, **options)


def test_the_formula() -> None:
    rng = np.random.RandomState(0)
    rows = rng.standard_normal((5, 1000)).astype(np.float32)
    found = torch.from_numpy(rows.copy())
    guide(found, [GuidedRow(0, 3, 1.5), GuidedRow(4, 1, 0.0)])
    c, n = rows[[0, 4]].astype(np.float64), rows[[3, 1]].astype(np.float64)
    expected = n + np.array([[1.5], [0.0]]) * (c - n)
    assert np.abs(found.numpy()[[0, 4]] - expected).max() < 1e-6
    assert (found.numpy()[1:4] == rows[1:4]).all()


def test_a_step_draws_from_both_branches() -> None:
    """The first token, worked out from the device's rows by hand."""
    world = World(FakeDevice(8))
    ids, negative, scale = prompt(9), prompt(70, 5), 3.0
    ticket = world.submit(request(ids, 1, temperature=0.0, guidance_scale=scale, negative_ids=negative))
    world.run()
    logits = []
    for text in (ids, negative):
        lone = FakeDevice(2)
        lone.ids[: len(text)], lone.bits[: len(text)] = text, 0
        logits.append(lone._row_logits(np.arange(2), len(text), lone.ids, lone.bits).astype(np.float64))
    logits = logits[1] + scale * (logits[0] - logits[1])
    logits[-1] = -math.inf  # the end of the text is not allowed
    assert results(world, ticket)[0][0] == [int(logits.argmax())]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_in_company_with_few_pages(invariant_rows: int, runs_ahead: bool) -> None:
    world = World(FakeDevice(9, runs_ahead=runs_ahead, invariant_rows=invariant_rows, max_sequences=5))
    requests = [guided(60, 70, 90, seed=1), request(prompt(60, 1), 90, seed=2), guided(50, None, 80, 0.5, seed=3)]
    run_all(world, requests)
    assert world.stats.preemptions > 0
    assert world.pool.num_free == 9


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_with_everything_that_a_text_may_ask_for(runs_ahead: bool) -> None:
    options = {
        "num_choices": 2,
        "top_logprobs": 2,
        "repetition_penalty": 1.3,
        "make_sink": lambda: CharSink(("ab",), BANS),
        "make_matcher": StepMatcher,
    }
    for seed in range(6):
        world = World(FakeDevice(16, runs_ahead=runs_ahead))
        run_all(world, [guided(20 + seed, 3 + seed, 40, seed=seed, **options) for seed in (seed, seed + 20)])


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_choices_share_the_pages_of_both_prompts(invariant_rows: int) -> None:
    world = World(FakeDevice(24, invariant_rows=invariant_rows, max_sequences=8))
    ticket = world.submit(guided(150, 80, 6, num_choices=4, reuse_prefix=False))
    while any(sequence.state is not State.RUNNING for sequence in ticket.sequences):
        world.scheduler.step()
    assert [world.pool.num_holders(page) for page in ticket.sequences[0].pages] == [4, 4, 1]
    assert [world.pool.num_holders(page) for page in ticket.sequences[1].pages] == [4, 1]
    world.run()
    assert world.device.rows["prompt"] == 149 + 79
    assert world.stats.prompt_tokens == 150 + 80 + 3 * 2  # the last tokens of each choice's prompts are rows of its own
    assert results(world, ticket) == alone(ticket.request, world.device)


def test_both_prompts_are_reused() -> None:
    world = World(FakeDevice(16))
    run_all(world, [guided(150, 80)])
    again = world.submit(guided(150, 80, seed=4))
    world.run()
    assert world.device.rows["prompt"] == 149 + 79
    assert again.answers[0].num_reused == 149


@pytest.mark.parametrize("invariant_rows", [100, 1])
def test_the_last_token_of_a_prompt_is_not_taken_for_exact(invariant_rows: int) -> None:
    """It ran as a decode row: a longer prompt that begins alike would give it other bits, and the other way round."""
    world = World(FakeDevice(16, invariant_rows=invariant_rows, chunk=32, step_tokens=32))
    for length in (64, 65, 63, 96):
        run_all(world, [guided(length, 33, 40)])
        run_all(world, [request(prompt(130), 3)])
        run_all(world, [guided(length, 64, 40)])


def test_a_branch_of_no_numbers_ends_its_request_alone() -> None:
    world = World(FakeDevice(8))
    ticket, other = world.submit(guided(9, 8, 20)), world.submit(request(prompt(12, 2), 20))
    for _ in range(4):
        world.scheduler.step()
    world.device.nan_row = 1  # of the text, its branch, the other one
    world.run()
    assert "nan" in str(ticket.error)
    assert results(world, other) == alone(other.request, world.device)
    assert world.pool.num_free == 8


@pytest.mark.parametrize("fails", ["sink", "matcher", "cancel"])
def test_what_ends_a_text_ends_its_branch(fails: str) -> None:
    world = World(FakeDevice(8))
    sink = (lambda: CharSink(fails_at=3)) if fails == "sink" else None
    matcher = (lambda: StepMatcher(fails_at=3)) if fails == "matcher" else None
    ticket = world.submit(guided(9, 8, 20, make_sink=sink, make_matcher=matcher))
    other = world.submit(request(prompt(12, 2), 20))
    for _ in range(3):
        world.scheduler.step()
    if fails == "cancel":
        world.scheduler.cancel(ticket)
    world.run()
    assert all(sequence.state is State.DONE for sequence in ticket.sequences)
    assert (ticket.error is None) == (fails == "cancel")
    assert results(world, other) == alone(other.request, world.device)
    assert world.pool.num_free == 8


def test_nothing_is_drawn() -> None:
    world = World(FakeDevice(8))
    ticket = world.submit(guided(9, 8, 0))
    world.run()
    assert ticket.answers[0].outcome.finish_reason == "length"
    assert ticket.ended


def test_progress_is_that_of_the_text() -> None:
    told: list[PromptProgress] = []
    world = World(FakeDevice(8, chunk=32, step_tokens=32))
    world.submit(guided(70, 40, 2, prompt_progress=told.append))
    world.run()
    assert [one.tokens for one in told] == sorted(one.tokens for one in told)
    assert told[-1].tokens == told[-1].total == 69


def test_what_never_fits_is_refused() -> None:
    one = World(FakeDevice(8, max_sequences=1))
    with pytest.raises(ConfigError, match=r"guidance_scale: runs 2 sequences together.*max_sequences=1"):
        one.submit(guided(9, 8))
    few = World(FakeDevice(3), context=3 * PAGE_SIZE)
    few.submit(guided(63, 1, PAGE_SIZE - 1))
    with pytest.raises(MemoryBudgetError, match=r"need 4 pages of 64 .*max_tokens=63 or fewer, or .*cache_tokens=256"):
        few.submit(guided(63, 1, PAGE_SIZE))


@pytest.mark.parametrize("window", [10, 64, 100])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_pauses_where_pages_are_given_back_that_no_window_reaches(invariant_rows: int, window: int) -> None:
    """Also of a search whose leader was far behind the end of the prompt, which the others need again."""
    params = SamplingParams(max_tokens=90, temperature=0.0, seed=0)
    options = {"num_choices": 3, "length_penalty": 3.0, "early_stopping": "never"}
    search = TokenRequest(prompt(126, 8), params, num_beams=3, **options)
    for one in (search, guided(130, 70, 90, seed=3, num_choices=2)):
        device = FakeDevice(16, invariant_rows=invariant_rows, chunk=32, max_sequences=4, window=window)
        world = World(device, passes=True)
        ticket, paused = world.submit(one), 0
        for _ in range(10):
            for _ in range(17):
                world.scheduler.step()
                world.check()
                for member in world.scheduler.running:  # what its next row sees is there
                    assert member.num_passed * PAGE_SIZE <= max(0, member.num_cached + 1 - window)
            first = ticket.sequences[0]
            if first in world.scheduler.running:
                world.scheduler.lineup.pause(first)
                paused += first.num_read > 0
                if paused % 2:
                    world.pool.clear()  # none of its pages is known
        world.run()
        assert results(world, ticket) == alone(one, world.device)
        assert paused > 1
        assert world.pool.num_free == 15
