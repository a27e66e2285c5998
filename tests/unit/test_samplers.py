"""Each sampler against its definition (``sampler_reference``), alone and together, and where rows end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TypicalLogitsWarper

from exl.batch import NOTHING_ALLOWED
from exl.engine.draws import Adjustments, DrawRow, sampling_batch
from exl.errors import KernelError
from exl.sampling import probabilities, sample
from tests.unit.sampler_reference import distribution

INF = math.inf
SIZES = (1, 2, 33, 1025, 5003)

ALONE = {
    "plain": {},
    "greedy": {"temperature": 0.0, "top_k": 1, "xtc_threshold": 0.1},
    "sigma": {"top_n_sigma": 1.0},
    "wide_sigma": {"top_n_sigma": 2.5},
    "no_sigma": {"top_n_sigma": 1e-6},
    "dynamic": {"temperature": 0.8, "dynamic_range": 0.5},
    "dynamic_from_0": {"temperature": 0.5, "dynamic_range": 1.0, "dynamic_exponent": 0.4},
    "dynamic_flat": {"temperature": 1.0, "dynamic_range": 0.5, "dynamic_exponent": 0.0},
    "typical": {"typical_p": 0.5},
    "typical_few": {"typical_p": 0.02},
    "typical_most": {"typical_p": 0.995},
    "mirostat": {"mirostat_mu": 6.0},
    "mirostat_low": {"mirostat_mu": 0.5},
    "mirostat_negative": {"mirostat_mu": -3.0},
    "mirostat_high": {"mirostat_mu": 40.0, "top_k": 2, "min_p": 0.9},  # which it replaces
    "xtc": {"xtc_threshold": 0.1},
    "xtc_fine": {"xtc_threshold": 0.001},
    "xtc_finest": {"xtc_threshold": 3e-5},  # more good tokens than are sorted at first
    "xtc_edge": {"xtc_threshold": 0.5},
    "xtc_off": {"xtc_threshold": 0.50001},
    "last": {"temperature": 1.7, "temperature_last": True},
}
TOGETHER = {
    "sigma_and_hot": {"top_n_sigma": 1.5, "temperature": 3.0},
    "cut_then_typical": {"top_k": 50, "typical_p": 0.7},
    "typical_then_cut": {"typical_p": 0.6, "top_p": 0.5, "min_p": 0.2},
    "xtc_after_top_p": {"top_p": 0.9, "xtc_threshold": 0.05},
    "xtc_after_min_p": {"min_p": 0.05, "xtc_threshold": 0.02},
    "xtc_after_mirostat": {"mirostat_mu": 5.0, "xtc_threshold": 0.05},
    "last_and_filters": {"temperature": 2.0, "temperature_last": True, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    "last_and_xtc": {"temperature": 0.6, "temperature_last": True, "top_p": 0.95, "xtc_threshold": 0.05},
    "last_and_dynamic": {"temperature": 1.0, "dynamic_range": 0.7, "temperature_last": True, "min_p": 0.02},
    "last_and_mirostat": {"temperature": 1.4, "temperature_last": True, "mirostat_mu": 4.0},
    "dynamic_and_sigma": {"temperature": 1.0, "dynamic_range": 0.9, "dynamic_exponent": 2.0, "top_n_sigma": 2.0},
    "all": {
        "temperature": 1.3, "dynamic_range": 0.4, "top_n_sigma": 3.0, "top_k": 200, "typical_p": 0.95, "top_p": 0.9,
        "min_p": 0.01, "xtc_threshold": 0.04,
    },
}  # fmt: skip


def random_logits(rng: np.random.Generator, num_rows: int, size: int) -> np.ndarray:
    """Smooth, full of ties, with forbidden tokens, nearly certain."""
    logits = rng.normal(0, 2, (num_rows, size)).astype(np.float32)
    logits[1::4] = np.round(logits[1::4])
    logits[2::4][rng.random(logits[2::4].shape) < 0.3] = -INF
    logits[2::4, size // 2] = 1.5
    logits[3::4, size // 3] += 14
    return logits


def random_adjustments(rng: np.random.Generator, size: int) -> Adjustments:
    ids = np.sort(rng.choice(size, min(size, 40), replace=False)).astype(np.int32)
    factor = rng.choice([1.0, 1.3, 0.7], len(ids)).astype(np.float32)
    subtract = rng.choice([0.0, 0.4, INF], len(ids), p=[0.5, 0.4, 0.1]).astype(np.float32)
    return Adjustments(ids, rng.normal(0, 1, len(ids)).astype(np.float32), factor, subtract)


def random_mask(rng: np.random.Generator, size: int) -> np.ndarray:
    allowed = rng.random(-(-size // 32) * 32) < 0.7
    allowed[rng.integers(size)] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def assert_same_distributions(logits: np.ndarray, draws: list[DrawRow]) -> None:
    found = probabilities(torch.from_numpy(logits), sampling_batch(draws, logits.shape[1])).numpy()
    for draw, row in zip(draws, found, strict=True):
        expected = distribution(logits[draw.row], draw)
        # Sums of at most 5,003 terms in other orders, and logarithms.
        np.testing.assert_allclose(row, expected, rtol=1e-10, atol=1e-290)


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_a_filter_keeps_what_its_definition_keeps(name):
    rng = np.random.default_rng(3)
    values = {"temperature": 1.0} | (ALONE | TOGETHER)[name]
    for size in SIZES:
        logits = random_logits(rng, 8, size)
        assert_same_distributions(logits, [DrawRow(i, **values) for i in range(8)])


@pytest.mark.parametrize("name", TOGETHER)
def test_masks_and_adjustments_come_first(name):
    rng = np.random.default_rng(4)
    for size in SIZES[1:]:
        logits = random_logits(rng, 6, size)
        draws = [
            DrawRow(
                i,
                **({"temperature": 1.0} | TOGETHER[name]),
                adjustments=random_adjustments(rng, size) if i % 3 else None,
                mask=random_mask(rng, size) if i % 2 else None,
            )
            for i in range(6)
        ]
        alive = [draw for draw in draws if sample(torch.from_numpy(logits), sampling_batch([draw], size)).ids[0] >= 0]
        assert len(alive) >= 3
        assert_same_distributions(logits, alive)


def test_typical_is_transformers():
    rng = np.random.default_rng(5)
    logits = random_logits(rng, 8, 1025)
    draws = [DrawRow(i, temperature=1.0, typical_p=0.4) for i in range(8)]
    found = probabilities(torch.from_numpy(logits), sampling_batch(draws, 1025))
    warped = TypicalLogitsWarper(float(np.float32(0.4)))(None, torch.from_numpy(logits).double())
    torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-11, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_values_together(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = data.draw(st.sampled_from([1, 2, 7, 64, 1500]))
    numbers = {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.5, 30.0]),
        "dynamic_range": st.sampled_from([0.0, 0.3, 2.0]),
        "dynamic_exponent": st.sampled_from([1.0, 0.5, 3.0]),
        "temperature_last": st.booleans(),
        "top_n_sigma": st.sampled_from([0.0, 0.5, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 30, 4000]),
        "typical_p": st.sampled_from([1.0, 0.9, 0.3]),
        "top_p": st.sampled_from([1.0, 0.95, 0.4, 1e-9]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "mirostat_mu": st.sampled_from([INF, INF, 3.0, 9.0]),
        "xtc_threshold": st.sampled_from([1.0, 0.2, 0.01]),
    }
    draws = [DrawRow(i, **{name: data.draw(values) for name, values in numbers.items()}) for i in range(4)]
    assert_same_distributions(random_logits(rng, 4, size), draws)


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_draws_invert_the_distribution(name):
    """Of 20,000 tokens, so that draws also fall beyond the tokens that are sorted at first."""
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.normal(0, 1, (1, 20_000)).astype(np.float32))
    values = {"temperature": 1.0} | (ALONE | TOGETHER)[name]
    draws = [DrawRow(0, uniform=u, **values) for u in (0.0, *rng.random(20), 1 - 2**-53)]
    batch = sampling_batch(draws, 20_000)
    p = probabilities(logits, sampling_batch(draws[:1], 20_000))[0].numpy()
    order = np.lexsort((np.arange(len(p)), -p))
    borders = np.cumsum(p[order])
    last = order[np.count_nonzero(p) - 1]
    for draw, token_id in zip(draws, sample(logits, batch).ids, strict=True):
        assert p[token_id] > 0
        if draw.uniform == 1 - 2**-53:
            assert token_id == last or p[token_id] < 1e-8
        elif np.abs(borders - draw.uniform).min() > 1e-10:  # nearer than that, rounding decides
            assert token_id == order[np.searchsorted(borders, draw.uniform, side="right")]


@pytest.mark.parametrize("name", ["all", "xtc", "typical", "last_and_mirostat", "dynamic"])
def test_draws_follow_the_distribution(name):
    """Twelve tokens, 4000 draws. Chi-square's 99.9 % point for 11 degrees of freedom is 31.26."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 1.1, 0.0, 0.9, -0.4, 1.6, 0.2, 0.1, 1.0, -0.2]])
    values = {"temperature": 1.0} | (ALONE | TOGETHER)[name]
    draws = [DrawRow(0, uniform=u, **values) for u in np.random.default_rng(7).random(4000)]
    expected = 4000 * probabilities(logits, sampling_batch(draws[:1], 12))[0].numpy()
    counts = np.bincount(sample(logits, sampling_batch(draws, 12)).ids, minlength=12)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 31.26


def test_a_draw_does_not_depend_on_its_company():
    rng = np.random.default_rng(8)
    values = list((ALONE | TOGETHER).values())
    logits = torch.from_numpy(random_logits(rng, 6, 3001))
    draws = [
        DrawRow(int(rng.integers(6)), uniform=float(rng.random()), **({"temperature": 1.0} | v), num_logprobs=3)
        for v in values
    ]
    draws = [
        draw._replace(mask=random_mask(rng, 3001) if i % 5 == 1 else None, adjustments=random_adjustments(rng, 3001))
        for i, draw in enumerate(draws)
    ]
    together = sample(logits, sampling_batch(draws, 3001))
    for i, draw in enumerate(draws):
        alone = sample(logits[draw.row : draw.row + 1], sampling_batch([draw._replace(row=0)], 3001))
        assert (alone.ids[0], alone.ranked[0]) == (together.ids[i], together.ranked[i])
        assert alone.surprise[0] == together.surprise[i] or math.isnan(together.surprise[i])


# What a draw says


def test_surprise_is_of_the_distribution_before_mirostats_cut():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = (logits[0].double() / 0.5).softmax(0)
    for mu, uniform, token_id in ((1.0, 0.9, 0), (5.0, 0.95, 1)):
        batch = sampling_batch([DrawRow(0, uniform, 0.5, mirostat_mu=mu), DrawRow(0, uniform, 0.5)], 4)
        found = sample(logits, batch)
        assert found.ids[0] == token_id
        assert found.surprise[0] == pytest.approx(-math.log2(p[token_id]), rel=1e-14)
        assert math.isnan(found.surprise[1])


def test_log_probabilities_are_those_of_the_plain_logits():
    rng = np.random.default_rng(9)
    logits = torch.from_numpy(rng.normal(0, 3, (2, 999)).astype(np.float32))
    expected = logits.double().log_softmax(-1)
    banned = Adjustments(*(np.array([v], t) for v, t in ((7, "i4"), (0, "f4"), (1, "f4"), (INF, "f4"))))
    draws = [
        DrawRow(1, num_logprobs=5),
        DrawRow(0, 0.9, 3.0, num_logprobs=0, adjustments=banned),
        DrawRow(1, 0.2, 1.0),
        DrawRow(0, 0.5, 0.01, num_logprobs=2000),
    ]
    found = sample(logits, sampling_batch(draws, 999))
    assert found.ranked[2] is None
    for draw, token_id, ranked in zip(draws, found.ids, found.ranked, strict=True):
        if draw.num_logprobs < 0:
            continue
        row = expected[draw.row]
        likeliest = row.argsort(descending=True, stable=True)[: draw.num_logprobs].tolist()
        assert [i for i, _ in ranked] == [token_id, *likeliest]
        np.testing.assert_allclose([p for _, p in ranked], row[[token_id, *likeliest]], rtol=1e-13)


# What ends a row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_take_no_part(temperature):
    """Not even with a logit of NaN or inf; without any token left the row has a code."""
    logits = torch.tensor([[math.nan, 1.0, INF, 0.5]])
    only = np.array([0b1010], np.uint32)
    row = DrawRow(0, 0.5, temperature, mask=only, num_logprobs=2)
    found = sample(logits, sampling_batch([row, row._replace(mask=np.array([0], np.uint32))], 4))
    assert found.ids == [1, NOTHING_ALLOWED]
    assert found.ranked == [None, None]  # the plain row has no distribution
    everything = Adjustments(*(np.array([v] * 4, "f4") for v in (0, 0, 1, INF)))._replace(ids=np.arange(4, dtype="i4"))
    banned = DrawRow(0, 0.5, temperature, adjustments=everything)
    assert sample(torch.ones(1, 4), sampling_batch([banned], 4)).ids == [NOTHING_ALLOWED]


def test_a_bias_cannot_allow_what_the_model_forbids():
    more = Adjustments(*(np.array([v], "f4") for v in (0, 100, 1, 0)))._replace(ids=np.array([0], "i4"))
    logits = torch.tensor([[-INF, 0.0, 1.0]])
    draws = [DrawRow(0, u, 1.0, adjustments=more) for u in (0.0, 0.5, 0.99)]
    assert set(sample(logits, sampling_batch(draws, 3)).ids) == {1, 2}


def test_a_batch_that_does_not_fit_its_logits_is_refused():
    logits = torch.zeros(2, 40)
    one = Adjustments(np.array([40], np.int32), *(np.ones(1, np.float32) for _ in range(3)))
    cases = [
        ("draws from rows", DrawRow(2)),
        ("draws from rows", DrawRow(-1)),
        ("an adjusted token id outside 0 to 39", DrawRow(0, adjustments=one)),
        ("masks .* of 2 words", DrawRow(0, mask=np.ones(1, np.uint32))),
    ]
    for words, draw in cases:
        with pytest.raises(KernelError, match=words):
            sample(logits, sampling_batch([draw], 40))
