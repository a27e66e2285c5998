"""Parameters, the counter-based draw, and drawing tokens, against Random123's vectors and transformers' processors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exl.batch import INFINITE_LOGIT, NAN_LOGIT, NOTHING_ALLOWED
from exl.errors import ConfigError, ExlError, KernelError
from exl.philox import uniform
from exl.sampling import no_distribution, probabilities, sample
from exl.sampling_params import SamplingParams
from tests.draws import draws_of

# Parameters


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature: found -0.1, expected a number from 0 to 100"),
        ({"temperature": 101}, "temperature: found 101"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"temperature": 10**400}, "temperature: found 1000"),
        ({"temperature": True}, r"temperature: found True \(bool\)"),
        ({"temperature": "1"}, r"temperature: found '1' \(str\)"),
        ({"temperature": None}, r"temperature: found None \(NoneType\)"),
        ({"temperature": Decimal("0.5")}, "Decimal"),
        ({"top_p": 0}, "top_p: found 0, expected a number above 0, to 1"),
        ({"top_p": 1.01}, "top_p: found 1.01"),
        ({"top_p": float("nan")}, "top_p: found nan"),
        ({"min_p": -0.01}, "min_p: found -0.01, expected a number from 0 to 1"),
        ({"min_p": 1.5}, "min_p: found 1.5"),
        ({"top_k": -1}, "top_k: found -1, expected an integer from 0 to 2147483647"),
        ({"top_k": 1.0}, r"top_k: found 1.0 \(float\)"),
        ({"top_k": True}, r"top_k: found True \(bool\)"),
        ({"top_k": 2**31}, "top_k: found 2147483648"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0, expected a number from 0.01 to 100"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: found -1.0"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**64}, "seed: found 18446744073709551616"),
        ({"seed": 1.5}, r"seed: found 1.5 \(float\)"),
        ({"max_tokens": -1}, "max_tokens: found -1"),
        ({"max_tokens": None}, r"max_tokens: found None \(NoneType\)"),
        ({"max_tokens": False}, r"max_tokens: found False \(bool\)"),
        ({"stop": 5}, r"stop: found 5 \(int\), expected a text or a list of texts"),
        ({"stop": b"abc"}, r"stop: found b'abc' \(bytes\), expected a text or a list of texts"),
        ({"stop": ("a", "")}, "stop: found a string of 0 characters, expected from 1 to 1024"),
        ({"stop": ("a" * 1025,)}, "stop: found a string of 1025 characters"),
        ({"stop": ("a", b"b")}, r"stop: found b'b' \(bytes\)"),
        ({"stop": ("a",) * 65}, "stop: found 65 strings, expected at most 64"),
    ],
)
def test_bad_parameters_are_refused_by_name(values, said):
    with pytest.raises(ConfigError, match=said):
        SamplingParams(**values)


def test_parameters_at_their_borders_are_taken_and_normalized():
    params = SamplingParams(
        temperature=0, top_p=1, min_p=1, top_k=np.int64(3), seed=2**64 - 1, max_tokens=0, stop=["a", "a" * 1024]
    )
    assert params.stop == ("a", "a" * 1024)
    assert SamplingParams(stop="abc").stop == ("abc",)
    assert SamplingParams(stop=None).stop == ()
    assert isinstance(params.temperature, float)
    assert type(params.top_k) is int
    assert hash(params) == hash(replace(params))
    with pytest.raises(AttributeError):
        params.top_k = 5


def test_parameters_do_not_need_torch():
    code = "import sys; import exl.sampling_params as it; it.SamplingParams(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The draw


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds as the paper gives them."""
    mask = 2**64 - 1
    for _ in range(10):
        product0 = 0xD2E7470EE14C6C93 * counter[0]
        product1 = 0xCA5A826395121157 * counter[2]
        counter = [
            (product1 >> 64) ^ counter[1] ^ key[0],
            product1 & mask,
            (product0 >> 64) ^ counter[3] ^ key[1],
            product0 & mask,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def test_the_reference_philox_has_random123s_known_answers():
    words = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert philox4x64([0] * 4, [0] * 2) == [int(word, 16) for word in words.split()]
    words = "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"
    assert philox4x64([2**64 - 1] * 4, [2**64 - 1] * 2) == [int(word, 16) for word in words.split()]


@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_uniform_is_philox_of_seed_and_step(seed, step):
    assert uniform(seed, step) == (philox4x64([step, 0, 0, 0], [seed, 0])[0] >> 11) / 2**53


def test_uniform_at_the_first_step_and_outside_its_range():
    assert uniform(0, 0) == (0x16554D9ECA36314C >> 11) / 2**53
    for seed, step in [(-1, 0), (0, -1), (2**64, 0)]:
        with pytest.raises(ConfigError, match="expected both from 0"):
            uniform(seed, step)


# Batches


def test_a_batch_holds_each_draws_values_and_adjustments():
    rows = [
        (SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=5, repetition_penalty=2.0), 3, [4, 1, 4]),
        (SamplingParams(temperature=0.0), 0, [1, 2]),
        (SamplingParams(seed=6, repetition_penalty=1.5), 9, (8,)),
    ]
    batch = draws_of(rows)
    assert batch.row.tolist() == [0, 1, 2]
    assert batch.adjust_start.tolist() == [0, 2, 2, 3]
    assert batch.adjust_id.tolist() == [1, 4, 8]
    assert batch.adjust_factor.tolist() == [2.0, 2.0, 1.5]
    assert batch.uniform.tolist() == [uniform(5, 3), 0.0, uniform(6, 9)]
    assert batch.temperature.tolist() == [0.5, 0.0, 1.0]
    assert batch.top_k.tolist() == [7, 0, 0]
    assert batch.top_p.tolist() == [np.float32(0.9), 1.0, 1.0]
    assert batch.min_p.tolist() == [np.float32(0.1), 0.0, 0.0]
    assert {batch.top_k.dtype, batch.adjust_start.dtype, batch.adjust_id.dtype} == {np.dtype(np.int32)}


def test_an_empty_batch_draws_nothing():
    assert sample(torch.empty(0, 5), draws_of([])).ids == []


def test_without_a_seed_draws_differ():
    batch = draws_of([(SamplingParams(), 0, ())] * 8)
    assert len(set(batch.uniform)) == 8
    assert all(0 <= draw < 1 for draw in batch.uniform)


# Distributions against transformers


def reference_probabilities(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """transformers' processors in exl's order: [V] f32 -> [V] f64. Parameters as the batch's f32 holds them."""
    scores = logits[None]
    if params.repetition_penalty != 1.0:
        penalty = RepetitionPenaltyLogitsProcessor(float(np.float32(params.repetition_penalty)))
        scores = penalty(torch.tensor([seen]), scores)
    processors = [TemperatureLogitsWarper(float(np.float32(params.temperature)))]
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(np.float32(params.top_p))))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(float(np.float32(params.min_p))))
    scores = scores.double()
    for processor in processors:
        scores = processor(None, scores)
    return scores.softmax(-1)[0]


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0, "top_p": 0.5},
    {"top_k": 5},
    {"top_k": 10_000_000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_k": 20},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.99},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.001},
]


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [11, 4000])
def test_probabilities_match_transformers(values, vocab_size):
    rng = np.random.default_rng(7)
    logits = torch.from_numpy(rng.normal(0, 4, (6, vocab_size)).astype(np.float32))
    params = SamplingParams(seed=1, **values)
    seen = [rng.integers(0, vocab_size, 9).tolist() for _ in logits]
    ours = probabilities(logits, draws_of([(params, 0, ids) for ids in seen]))
    for i in range(len(logits)):
        expected = reference_probabilities(logits[i], params, seen[i])
        assert torch.equal(ours[i] > 0, expected > 0)
        # Both are f64 sums of at most 4000 terms in different orders.
        assert torch.allclose(ours[i], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_a_draw_inverts_the_cumulated_distribution(values):
    """A flat row of 20,000 tokens, so that draws also fall beyond the tokens that are sorted at first."""
    rng = np.random.default_rng(11)
    logits = torch.from_numpy(rng.normal(0, 1, (1, 20_000)).astype(np.float32))
    params = SamplingParams(seed=3, **values)
    seen = rng.integers(0, 20_000, 50).tolist()
    expected = reference_probabilities(logits[0], params, seen).numpy()
    order = np.lexsort((np.arange(len(expected)), -expected))
    cumulated = np.cumsum(expected[order])
    batch = draws_of([(params, step, seen) for step in range(30)])
    drawn = sample(logits.expand(30, -1), batch).ids
    checked = 0
    for draw, token_id in zip(batch.uniform, drawn, strict=True):
        if np.abs(cumulated - draw).min() > 1e-12:  # nearer than that, rounding decides
            assert token_id == order[np.searchsorted(cumulated, draw, side="right")]
            checked += 1
    assert checked >= 29


def test_the_ends_of_the_unit_interval_stay_inside_the_kept_tokens():
    logits = torch.tensor([[1.0, 3.0, -float("inf"), 2.0, 0.5]]).expand(4, -1)
    batch = draws_of([(SamplingParams(seed=0, top_k=k), 0, ()) for k in (0, 0, 3, 3)])
    batch.uniform[:] = [0.0, 1 - 2**-53, 0.0, 1 - 2**-53]
    assert sample(logits, batch).ids == [1, 4, 1, 0]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("temperature", "fits"), [(1.0, True), (1.2, False)])
def test_draws_follow_the_distribution(temperature, fits):
    """Eight tokens, 4000 steps of one seed. The bound is chi-square's 99.9 % point for 7 degrees of freedom."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, 0.9, -0.4, 1.6])
    params = SamplingParams(temperature=temperature, seed=42)
    drawn = sample(logits.expand(4000, -1), draws_of([(params, step, ()) for step in range(4000)]))
    counts = np.bincount(drawn.ids, minlength=8)
    statistic = chi_square(counts, 4000 * logits.double().softmax(0).numpy())
    assert (statistic < 24.322) == fits


def test_draws_of_neighbouring_seeds_follow_the_distribution():
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, 0.9, -0.4, 1.6])
    rows = [(SamplingParams(seed=seed), 0, ()) for seed in range(4000)]
    counts = np.bincount(sample(logits.expand(4000, -1), draws_of(rows)).ids, minlength=8)
    assert chi_square(counts, 4000 * logits.double().softmax(0).numpy()) < 24.322


def test_a_row_alone_gives_the_bits_it_gives_in_a_batch():
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(0, 2, (len(FILTERS), 5000)).astype(np.float32))
    rows = [
        (SamplingParams(seed=i, **values), i, rng.integers(0, 5000, 20).tolist()) for i, values in enumerate(FILTERS)
    ]
    together = sample(logits, draws_of(rows))
    together_probabilities = probabilities(logits, draws_of(rows))
    for i, row in enumerate(rows):
        alone = draws_of([row])
        assert sample(logits[i : i + 1], alone).ids == together.ids[i : i + 1]
        assert torch.equal(probabilities(logits[i : i + 1], alone)[0], together_probabilities[i])
    assert sample(logits.flip(0), draws_of(rows[::-1])).ids == together.ids[::-1]


# Ties and edges


def test_greedy_takes_the_lowest_of_the_largest_ids_and_ignores_filters():
    logits = torch.tensor([[1.0, 5.0, 5.0, -2.0], [7.0, 7.0, 7.0, 7.0], [5.0, 4.0, 3.0, -1.0]])
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    penalized = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    batch = draws_of([(params, 0, ()), (params, 0, ()), (penalized, 0, [0, 3])])
    assert sample(logits, batch).ids == [1, 0, 1]  # 5.0 / 2 falls below 4.0
    assert probabilities(logits, batch).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_greedy_takes_the_lowest_of_equals_in_a_large_vocabulary():
    logits = torch.zeros(1, 100_000)
    logits[0, [99_999, 70_001, 33_333]] = 4.0
    assert sample(logits, draws_of([(SamplingParams(temperature=0.0), 0, ())])).ids == [33_333]


def test_equals_of_the_kth_token_are_all_kept_as_transformers_keeps_them():
    logits = torch.tensor([[2.0, 1.0, 1.0, 3.0, 1.0, 0.0]])
    params = SamplingParams(seed=0, top_k=3)
    ours = probabilities(logits, draws_of([(params, 0, ())]))[0]
    assert torch.equal(ours > 0, torch.tensor([True, True, True, True, True, False]))
    assert torch.allclose(ours, reference_probabilities(logits[0], params, []), rtol=1e-14)


def test_equals_are_drawn_in_the_order_of_their_ids():
    logits = torch.zeros(8, 8)
    batch = draws_of([(SamplingParams(seed=0), 0, ())] * 8)
    batch.uniform[:] = np.arange(8) / 8 + 1 / 16
    assert sample(logits, batch).ids == list(range(8))
    batch.uniform[:] = np.arange(8) / 8  # a token's share begins where the one before it ends
    assert sample(logits, batch).ids == list(range(8))


def test_a_tie_across_the_border_of_the_first_sorted_tokens_is_never_parted():
    logits = torch.zeros(4, 3000)
    batch = draws_of([(SamplingParams(seed=0), 0, ())] * 4)
    batch.uniform[:] = (np.array([0, 1023, 1024, 2999]) + 0.5) / 3000
    assert sample(logits, batch).ids == [0, 1023, 1024, 2999]


def test_top_p_keeps_the_lowest_ids_of_equals_and_at_least_one_token():
    logits = torch.zeros(2, 4)
    batch = draws_of([(SamplingParams(seed=0, top_p=0.5), 0, ()), (SamplingParams(seed=0, top_p=1e-30), 0, ())])
    assert probabilities(logits, batch).tolist() == [[0.5, 0.5, 0, 0], [1, 0, 0, 0]]


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((200, 5000), -float("inf"))
    logits[:, [17, 4000]] = torch.tensor([0.0, 1.0])
    batch = draws_of([(SamplingParams(seed=step, top_k=50, top_p=0.999), step, ()) for step in range(200)])
    assert set(sample(logits, batch).ids) == {17, 4000}


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 2.9e38]])
    assert sample(logits, draws_of([(SamplingParams(temperature=1e-30, seed=1), 0, ())])).ids == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        ([float("inf"), float("nan"), 1.0], NAN_LOGIT, "found a logit of nan"),
        ([0.0, float("inf"), 1.0], INFINITE_LOGIT, "found a logit of inf"),
        ([-float("inf")] * 3, NOTHING_ALLOWED, r"found no allowed token \(all logits are -inf\)"),
    ],
)
def test_a_row_without_a_distribution_fails_alone(temperature, bad, code, said):
    batch = draws_of([(SamplingParams(temperature=temperature, seed=0, top_k=1), 0, ())] * 3)
    assert sample(torch.tensor([[0.0, 1.0, 2.0], bad, [5.0, 1.0, 2.0]]), batch).ids == [2, code, 0]
    with pytest.raises(ExlError, match=said):
        raise no_distribution(code)


def test_logits_of_another_shape_or_type_are_an_error():
    batch = draws_of([(SamplingParams(seed=0), 0, ())])
    for logits in (torch.zeros(3), torch.zeros(1, 3, dtype=torch.float16)):
        with pytest.raises(KernelError, match=r"expected torch.float32 \[rows, vocabulary\]"):
            sample(logits, batch)
    batch = draws_of([(SamplingParams(seed=0, repetition_penalty=1.1), 0, [3])])
    with pytest.raises(KernelError, match="an adjusted token id outside 0 to 2"):
        sample(torch.zeros(1, 3), batch)
