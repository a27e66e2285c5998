"""The state of a sequence's draws: what its tokens mean for the next one, and what is taken back leaves no trace."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl.engine.draws import DrawRow, DrawState, sampling_batch
from exl.engine.repetition import DryPenalties, Repetitions, suffix_matches
from exl.errors import ConfigError
from exl.philox import child_seed, uniform, words
from exl.sampling_params import SamplingParams
from tests.unit.sampler_reference import dry_lengths, dry_penalty

V = 12
EOS = frozenset({1})
TOKENS = st.integers(0, V - 1)
# llama.cpp's own tests of DRY (tests/test-sampling.cpp) use such texts; see also text-generation-webui's pull request.
TEXTS = st.lists(st.integers(0, 3), max_size=40)


def expected_adjustments(params: SamplingParams, prompt: list[int], generated: list[int], breakers=(), blocked=()):
    """By counting everything anew: {id: (bias, factor, subtract)}."""
    window = params.penalty_window
    everything = [(i, False) for i in prompt] + [(i, True) for i in generated]
    inside = everything[-window:] if window else everything
    times = Counter(i for i, is_new in inside if is_new)
    seen = set(times) | ({i for i, _ in inside} if params.penalize_prompt else set())
    banned = set(params.banned_tokens) | (set(EOS) if params.ignore_eos else set()) | set(blocked)
    if len(generated) < params.min_tokens:
        banned |= EOS | set(params.stop_token_ids)
    dry = {}
    if params.dry_multiplier:
        lengths = dry_lengths(prompt + generated, params.dry_window, params.dry_allowed_length, breakers)
        shape = params.dry_multiplier, params.dry_base, params.dry_allowed_length
        dry = {i: dry_penalty(length, *shape) for i, length in lengths.items()}
    found = {}
    for i in range(V):
        bias = np.float32(dict(params.logit_bias).get(i, 0.0))
        factor = np.float32(params.repetition_penalty if i in seen else 1.0)
        counted = np.float32(params.frequency_penalty * times[i] + params.presence_penalty * (times[i] > 0))
        subtract = np.float32(math.inf) if i in banned else counted + np.float32(dry.get(i, 0.0))
        if (bias, factor, subtract) != (0, 1, 0):
            found[i] = (bias, factor, subtract)
    return found


def adjustments_of(row: DrawRow) -> dict[int, tuple]:
    if row.adjustments is None:
        return {}
    ids, *columns = row.adjustments
    assert (np.diff(ids) > 0).all()
    assert [ids.dtype, *(c.dtype for c in columns)] == [np.int32, *[np.float32] * 3]
    table = zip(ids, *columns, strict=True)
    return {int(i): tuple(values) for i, *values in table if values != [0, 1, 0]}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for i, values in found.items():
        np.testing.assert_allclose(values, expected[i], rtol=3e-7, err_msg=str(i))


@st.composite
def parameters(draw) -> SamplingParams:
    pick = {
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.3]),
        "presence_penalty": st.sampled_from([0.0, -0.7]),
        "penalty_window": st.sampled_from([0, 1, 3, 10]),
        "penalize_prompt": st.booleans(),
        "dry_multiplier": st.sampled_from([0.0, 0.8]),
        "dry_base": st.sampled_from([1.0, 1.75]),
        "dry_allowed_length": st.sampled_from([1, 2, 3]),
        "dry_window": st.sampled_from([0, 2, 7]),
        "logit_bias": st.sampled_from([{}, {2: 1.5, 9: -100.0}]),
        "banned_tokens": st.sampled_from([(), (0, 9)]),
        "stop_token_ids": st.sampled_from([(), (4,)]),
        "ignore_eos": st.booleans(),
        "min_tokens": st.sampled_from([0, 2, 5]),
        "mirostat_tau": st.sampled_from([0.0, 3.0]),
        "xtc_probability": st.sampled_from([0.0, 0.5]),
    }
    return SamplingParams(seed=draw(st.integers(0, 9)), **{name: draw(values) for name, values in pick.items()})


def assert_same_row(found: DrawRow, expected: DrawRow) -> None:
    assert adjustments_of(found) == adjustments_of(expected)
    assert found._replace(adjustments=None) == expected._replace(adjustments=None)


@settings(max_examples=150, deadline=None)
@given(parameters(), TEXTS, st.lists(st.one_of(TOKENS, st.tuples(st.just("back"), st.integers(0, 9)))), TEXTS)
def test_what_is_taken_back_leaves_no_trace(params, prompt, steps, drafted):
    breakers = frozenset({3})
    state = DrawState(params, prompt, EOS, V, breakers)
    generated: list[int] = []
    surprises: list[float] = []
    for step in steps:
        if isinstance(step, tuple):
            keep = max(0, len(generated) - step[1])
            state.truncate(keep)
            del generated[keep:], surprises[keep:]
        else:
            surprises.append(float(len(generated) + step))
            generated.append(step)
            state.accept(step, surprises[-1])
        assert state.num_generated == len(generated)
        assert_close(adjustments_of(state.row(0)), expected_adjustments(params, prompt, generated, breakers))
    fresh = DrawState(params, prompt, EOS, V, breakers)
    for token_id, surprise in zip(generated, surprises, strict=True):
        fresh.accept(token_id, surprise)
    assert_same_row(state.row(2), fresh.row(2))
    # Drafts are as if they were accepted, but for mirostat, which needs their surprises; and nothing of them is kept.
    ahead = state.row(2, drafted=drafted, num_logprobs=4)
    assert ahead.num_logprobs == 4
    assert_same_row(state.row(2), fresh.row(2))
    copied = fresh.copy(params.seed)
    for token_id in drafted:
        copied.accept(token_id)
    assert_same_row(ahead._replace(num_logprobs=-1), copied.row(2))
    assert_same_row(state.row(2), fresh.row(2))


# The random numbers of a step


def test_words_are_numpys_philox():
    for seed, counter in [(0, 0), (5, 7), (2**64 - 1, 2**64 - 1), (3, 2**63 + 1)]:
        generator = np.random.Philox(key=seed, counter=(counter - 1) % 2**256)  # which counts before it makes a block
        assert list(words(seed, counter)) == generator.random_raw(4).tolist()


def test_children_have_seeds_of_their_own():
    assert child_seed(5, 0) == 5
    assert child_seed(5, 3) == words(5, 2**63 + 3)[0]
    assert len({child_seed(seed, i) for seed in range(50) for i in range(20)}) == 1000


def test_draws_and_coins_are_functions_of_seed_and_step():
    state = DrawState(SamplingParams(seed=9, xtc_probability=0.3, xtc_threshold=0.2), [], EOS, V)
    rows = [state.row(0, drafted=[0] * step) for step in range(2000)]
    assert [row.uniform for row in rows] == [uniform(9, step) for step in range(2000)]
    tossed = [row.xtc_threshold == 0.2 for row in rows]
    assert tossed == [(words(9, step)[1] >> 11) * 2.0**-53 < 0.3 for step in range(2000)]
    assert abs(sum(tossed) - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)
    assert {row.xtc_threshold for row in rows} == {0.2, 1.0}
    assert np.corrcoef([row.uniform for row in rows], tossed)[0, 1] < 0.1
    assert state.copy(10).row(0).uniform == uniform(10, 0)


def test_without_a_seed_each_state_has_its_own():
    states = [DrawState(SamplingParams(), [], EOS, V) for _ in range(8)]
    draws = [state.row(0).uniform for state in states]
    assert len(set(draws)) == 8
    assert draws == [state.row(0).uniform for state in states]


def test_a_greedy_draw_asks_for_nothing():
    params = SamplingParams(temperature=0.0, mirostat_tau=5.0, xtc_probability=1.0, top_k=3)
    row = DrawState(params, [1, 2, 3], EOS, V).row(4)
    assert row == DrawRow(4)
    assert sampling_batch([row], V).adjust_id.size == 0


# Mirostat, blocked tokens, ends


def test_mu_follows_the_surprise():
    """Basu et al., 2020: mu begins at 2 tau; mu -= eta (surprise - tau)."""
    state = DrawState(SamplingParams(seed=1, mirostat_tau=3.0, mirostat_eta=0.25), [], EOS, V)
    assert state.row(0).mirostat_mu == 6.0
    state.accept(5, 1.0)
    assert state.row(0).mirostat_mu == 6.5
    state.accept(5, 7.0)
    assert state.row(0).mirostat_mu == 5.5
    assert state.copy(2).row(0).mirostat_mu == 5.5
    state.truncate(1)
    assert state.row(0).mirostat_mu == 6.5
    assert DrawState(SamplingParams(seed=1), [], EOS, V).row(0).mirostat_mu == math.inf


def test_a_blocked_token_stays_blocked_while_the_text_before_it_stays():
    state = DrawState(SamplingParams(seed=1), [], EOS, V)
    state.accept(4)
    state.block(7)
    state.block(2)
    assert adjustments_of(state.row(0)) == {2: (0, 1, math.inf), 7: (0, 1, math.inf)}
    assert adjustments_of(state.row(0, drafted=[3])) == {}
    state.accept(3)
    assert adjustments_of(state.row(0)) == {}
    state.block(5)
    state.truncate(1)
    assert adjustments_of(state.row(0)).keys() == {2, 7}
    state.accept(3)
    assert adjustments_of(state.row(0)) == {}  # the text before may be another
    state.truncate(0)
    state.accept(9)
    assert adjustments_of(state.row(0)) == {}
    with pytest.raises(ValueError, match="truncate: 2 of 1 tokens"):
        state.truncate(2)


def test_ends_are_kept_back_until_there_are_enough_tokens():
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[7])
    state = DrawState(params, [3], frozenset({1, 2}), V)
    for _ in range(2):
        assert adjustments_of(state.row(0)).keys() == {1, 2, 7}
        state.accept(5)
    assert adjustments_of(state.row(0)) == {}
    assert adjustments_of(DrawState(SamplingParams(ignore_eos=True), [], frozenset({1, 2}), V).row(0)).keys() == {1, 2}


@pytest.mark.parametrize("name", ["logit_bias", "banned_tokens", "stop_token_ids"])
def test_ids_beyond_the_vocabulary_are_refused_by_name(name):
    value = {3: 1.0, V: 1.0} if name == "logit_bias" else [3, V]
    with pytest.raises(ConfigError, match=f"^{name}: found token id {V}, expected 0 to {V - 1}"):
        DrawState(SamplingParams(**{name: value}), [], EOS, V)


# DRY


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 12), st.integers(1, 5), st.sets(st.integers(0, 3), max_size=2))
def test_repetitions_are_those_of_comparing_everything(prompt, more, window, least, breakers):
    found = Repetitions(prompt, breakers)
    for length in range(len(more) + 1):
        text = prompt + more[:length]
        assert found.continued(window, least) == dry_lengths(text, window, least, breakers)
        if length < len(more):
            found.append(more[length])
    for length in reversed(range(len(more))):
        found.pop()
        assert found.continued(window, least) == dry_lengths(prompt + more[:length], window, least, breakers)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_suffix_matches_are_those_of_comparing_everything(ids):
    for place, length in enumerate(suffix_matches(ids)):
        expected = next(
            (n for n in range(place + 1) if ids[place - n] != ids[len(ids) - 1 - n]), place + 1
        ) if place < len(ids) - 1 else 0  # fmt: skip
        assert length == expected


def test_repetitions_of_a_long_loop_and_far_back():
    """Steps taken back beyond those that are remembered are computed anew."""
    ids = [0, 1, 2] * 200
    found = Repetitions(ids, ())
    assert found.continued(0, 2) == {0: 597}
    for token_id in [3, 0, 1, 2] * 50:
        found.append(token_id)
    assert found.continued(0, 2) == {3: 199, 0: 3}  # 49 of the groups, and "0 1 2" before them
    for _ in range(200):
        found.pop()
    assert found.continued(0, 2) == {0: 597}


def test_a_penalty_is_finite():
    """In f32: a token is unlikely, not forbidden. Below base 1.000001 llama.cpp does not clamp either."""
    for multiplier, base, allowed_length in [(0.8, 1.75, 2), (100.0, 100.0, 1), (5.0, 1.0, 3), (2.0, 1.0000001, 1)]:
        dry = DryPenalties(multiplier, base, allowed_length)
        for length in (allowed_length, allowed_length + 1, 40, 400, 5000):
            expected = dry_penalty(length, multiplier, base, allowed_length)
            assert dry.of(length) == pytest.approx(expected, rel=1e-11)
            assert math.isfinite(np.float32(dry.of(length)))


def test_llama_cpps_example():
    """The text that its source explains: after "a b c c b c y a b c", each of c, b and y would repeat something."""
    a, b, c, y = range(4)
    text = [a, b, c, c, b, c, y, a, b, c]
    assert Repetitions(text, ()).continued(0, 1) == {c: 3, b: 1, y: 2}
    assert Repetitions(text, ()).continued(0, 2) == {c: 3, y: 2}
    assert Repetitions(text, {y}).continued(0, 1) == {c: 3, b: 1}
    assert Repetitions(text, {a}).continued(0, 1) == {c: 2, b: 1, y: 2}
