"""Lengths against a search through all of them; and how they follow what drafts are worth."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.engine.draft_length import FIRST_PROBE, LAST_PROBE, PROBE_LENGTH, Ask, DraftLength, StepCosts, share_rows

CHEAP = StepCosts(rows=lambda rows: 1 + 0.05 * rows)
STEEP = StepCosts(rows=lambda rows: float(rows))  # nothing to gain


def expected_rate(asks, lengths, costs) -> float:
    """Tokens a second, where every drafter finds what is asked for (Leviathan et al., 2023, equation 1, summed)."""
    tokens = sum(sum(ask.acceptance**j for j in range(k + 1)) for ask, k in zip(asks, lengths, strict=True))
    sync = costs.sync if any(lengths) else 0.0
    return tokens / (costs.rows(len(asks) + sum(lengths)) + costs.draft(max(lengths)) + sync)


costs = st.builds(
    lambda slope, tile, draft, sync: StepCosts(lambda rows: 1 + slope * -(-rows // tile), lambda k: draft * k, sync),
    st.floats(0, 1),
    st.integers(1, 8),
    st.floats(0, 0.3),
    st.floats(0, 0.5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.builds(Ask, st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=3), costs, st.integers(1, 12))
def test_no_other_lengths_are_expected_to_be_faster_of_those_that_give_as_many(asks, costs, max_rows):
    """Rows go where they give most, and their number is the best one. A cost of the longest draft may still make
    other places better, so the search is over equal costs of drafts."""
    costs = StepCosts(costs.rows, sync=costs.sync)
    lengths = share_rows(asks, costs, max_rows)
    assert all(0 <= k <= ask.most for k, ask in zip(lengths, asks, strict=True))
    assert sum(lengths) <= max(0, max_rows - len(asks))
    best = max(
        expected_rate(asks, other, costs)
        for other in itertools.product(*(range(ask.most + 1) for ask in asks))
        if sum(other) <= max(0, max_rows - len(asks))
    )
    assert expected_rate(asks, lengths, costs) == pytest.approx(best, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.builds(Ask, st.integers(0, 9), st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=20
    ),
    costs,
    st.integers(0, 64),
    st.integers(0, 40),
)
def test_rows_stay_within_their_budget(asks, costs, max_rows, others):
    lengths = share_rows(asks, costs, max_rows, len(asks) + others)
    assert sum(lengths) <= max(0, max_rows - len(asks) - others)
    assert all(0 <= k <= ask.most for k, ask in zip(lengths, asks, strict=True))
    assert all(k <= PROBE_LENGTH for k, ask in zip(lengths, asks, strict=True) if ask.probe)


def test_a_small_budget_goes_to_those_whose_drafts_are_kept():
    asks = [Ask(7, 0.3), Ask(7, 0.95), Ask(7, 0.6)]
    assert share_rows(asks, CHEAP, max_rows=8) == [0, 5, 0]
    assert share_rows(asks, CHEAP, max_rows=12) == [0, 7, 2]
    assert share_rows(asks, CHEAP, max_rows=3) == [0, 0, 0]
    assert share_rows([], STEEP, max_rows=3) == []


def test_company_makes_drafts_dearer():
    """Where a pass costs what its rows cost, one sequence alone may gain what a full batch does not."""
    tile = StepCosts(rows=lambda rows: float(max(8, rows)))
    assert share_rows([Ask(7, 0.9)], tile, 64) == [7]
    assert share_rows([Ask(7, 0.9)], tile, 64, num_rows=16) == [0]


def test_waiting_for_tokens_must_pay_too():
    asks = [Ask(4, 0.8, found=0.02)]
    assert share_rows(asks, CHEAP, 8) == [4]
    assert share_rows(asks, StepCosts(CHEAP.rows, sync=0.1), 8) == [0]
    assert share_rows([Ask(4, 0.8)], StepCosts(CHEAP.rows, sync=0.1), 8) == [4]


def test_the_draft_model_must_pay_too():
    assert share_rows([Ask(7, 0.8)], StepCosts(CHEAP.rows, draft=lambda k: 0.5 * k), 8) < [7]
    assert share_rows([Ask(7, 0.8)], StepCosts(CHEAP.rows, draft=lambda k: 1.0 * k), 8) == [0]


def run(length: DraftLength, costs: StepCosts, keeps, tokens: int) -> list[int]:
    """Lengths of the steps until ``tokens`` tokens have come. ``keeps()``: whether the next draft is kept."""
    lengths = []
    while tokens > 0:
        (granted,) = share_rows([length.ask(7)], costs, 8)
        kept = 0
        while kept < granted and keeps():
            kept += 1
        length.advance(granted, granted, kept)
        lengths.append(granted)
        tokens -= kept + 1
    return lengths


def test_it_turns_itself_off_and_comes_back():
    length = DraftLength()
    off = run(length, CHEAP, lambda: False, 600)
    assert sum(off[:20]) > 0
    used = [i for i, k in enumerate(off) if k and i > 40]
    assert [b - a for a, b in itertools.pairwise(used)][-1] == LAST_PROBE + 1
    gaps = [b - a - 1 for a, b in itertools.pairwise(i for i, k in enumerate(off) if k) if b > a + 1]
    assert gaps == sorted(gaps)
    assert gaps[0] == FIRST_PROBE
    assert sum(off) < 0.15 * 600
    on = run(length, CHEAP, lambda: True, 1000)
    first = next(i for i, k in enumerate(on) if k)
    assert first <= LAST_PROBE
    assert set(on[-20:]) == {7}


def test_a_probe_that_was_kept_is_not_the_last():
    """Where one probe is not enough to believe in drafts, others follow it closely."""
    dear, length = StepCosts(rows=lambda rows: 1 + 2.0 * rows), DraftLength()
    run(length, dear, lambda: False, 300)
    on = run(length, dear, lambda: True, 1000)
    first = next(i for i, k in enumerate(on) if k)
    assert on[first : first + 3] == [PROBE_LENGTH, 0, PROBE_LENGTH]
    assert set(on[-20:]) == {7}


def test_a_probe_that_could_never_pay_is_not_made():
    assert run(DraftLength(), STEEP, lambda: True, 600) == [0] * 600


def test_a_probe_waits_some_steps_for_a_draft_to_be_found():
    length = DraftLength()
    run(length, CHEAP, lambda: False, 60)
    while not length.probes:
        length.advance(0, 0, 0)
    steps = 0
    while length.probes:
        (granted,) = share_rows([length.ask(7)], CHEAP, 8)
        assert granted == PROBE_LENGTH
        length.advance(granted, 0, 0)
        steps += 1
    assert 1 < steps < 16
    assert length.ask(7).found < 0.9


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.9])
def test_the_estimate_is_near_the_truth(acceptance):
    rng, length, seen = random.Random(2), DraftLength(), []
    for _ in range(2000):
        kept = 0
        while kept < 4 and rng.random() < acceptance:
            kept += 1
        length.advance(4, 4, kept)
        seen.append(length.acceptance)
    assert sum(seen[100:]) / len(seen[100:]) == pytest.approx(acceptance, abs=0.06)


def test_nothing_can_be_taken_at_the_end_of_the_context():
    length = DraftLength()
    for _ in range(FIRST_PROBE):
        length.advance(0, 0, 0)
    assert share_rows([length.ask(0)], CHEAP, 8) == [0]
