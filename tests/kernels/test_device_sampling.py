"""What draws on a device give besides ids: log-probabilities, surprise, codes; draws on the host; several launches."""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from exl.batch import INFINITE_LOGIT, NAN_LOGIT, NOTHING_ALLOWED, SampleRows, SamplingBatch
from exl.engine.draws import Adjustments, DrawRow, sampling_batch
from exl.errors import KernelError
from exl.kernels.launch import Backend
from exl.kernels.program import Programs
from exl.kernels.sample_tables import check_batch, host_rows
from exl.layout.arena import max_draws, sample_rows
from exl.layout.samples import MAX_ADJUSTMENTS, MAX_RANKED, scratch_shapes, table_bytes
from exl.layout.steps import StepLimits
from exl.ops.cuda_sampling import Sampler, needs_host, some_draws
from exl.sampling import sample as cpu_sample
from exl.sampling_params import SamplingParams
from tests.device_draws import DTYPES, INF
from tests.draws import draws_of


class Sampling:
    """A sampler with buffers of its own."""

    def __init__(self, backend: Backend, vocab_size: int, stack: ExitStack, max_sequences: int = 8) -> None:
        sizes = {"hidden_size": 64, "qkv_width": 64, "attn_width": 64, "intermediate_size": 64, "head_dim": 64}
        limits = StepLimits(
            **{"max_rows": 64, "window_rows": 64, "max_logit_rows": 64, "max_context": 64, **sizes},
            **{"vocab_size": vocab_size, "max_sequences": max_sequences},
        )
        self.num_rows, device = sample_rows(limits), backend.device
        shapes = scratch_shapes(self.num_rows, vocab_size)
        self.samples = torch.full((max_draws(limits),), -99, dtype=torch.int32, device=device)
        fields = {f"sampling {name}": torch.zeros(n, dtype=DTYPES[t], device=device) for name, (t, n) in shapes.items()}
        tables = torch.full((table_bytes(self.num_rows, vocab_size),), 255, dtype=torch.uint8, device=device)
        self._sampler = Sampler(
            Programs(backend), limits, {**fields, "samples": self.samples, "sampling tables": tables}, stack
        )
        self._device = device

    def __call__(self, logits: torch.Tensor, batch: SamplingBatch) -> SampleRows:
        rows = self._sampler.sample(logits.to(self._device), batch, dependent=False).read()
        assert self.samples[: len(rows.ids)].tolist() == rows.ids  # what the next step reads
        return rows


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def random_logits(seed: int, num_rows: int, V: int, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (num_rows, V)).astype(np.float32))


def log_softmax(row: torch.Tensor) -> np.ndarray:
    return torch.log_softmax(row.double(), 0).numpy()


def likeliest(log_probs: np.ndarray, count: int) -> list[int]:
    order = np.lexsort((np.arange(len(log_probs)), -log_probs))
    return [int(i) for i in order[:count] if log_probs[i] > -INF]


def banned(*ids: int) -> Adjustments:
    return Adjustments(np.array(ids, np.int32), *(np.full(len(ids), x, np.float32) for x in (0, 1, INF)))


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [77, 4097, 32_001])
def test_log_probabilities_are_the_plain_rows(backend: Backend, V: int, stack: ExitStack) -> None:
    """Of the softmax of plain logits, whatever filters, temperature and adjustments the draw has; ties by lower id."""
    logits = random_logits(V, 4, V)
    logits[2] = logits[2].round()
    logits[3, 5:] = -INF  # fewer tokens than are asked for
    rng = np.random.default_rng(0)
    rows = [
        DrawRow(row=0, temperature=0.5, top_k=3, uniform=0.7, num_logprobs=5),
        DrawRow(row=0, temperature=0.0, adjustments=banned(int(logits[0].argmax())), num_logprobs=2),
        DrawRow(
            row=1, temperature=2.0, uniform=0.9, mask=rng.integers(0, 2**32, -(-V // 32), np.uint32), num_logprobs=0
        ),
        DrawRow(row=2, temperature=1.0, uniform=0.3, num_logprobs=MAX_RANKED),
        DrawRow(row=1, temperature=1.0, uniform=0.3),
        DrawRow(row=3, temperature=1.0, uniform=0.99, num_logprobs=9),
    ]
    found = Sampling(backend, V, stack)(logits, sampling_batch(rows, V))
    for row, token_id, ranked in zip(rows, found.ids, found.ranked, strict=True):
        if row.num_logprobs < 0:
            assert ranked is None
            continue
        exact = log_softmax(logits[row.row])
        assert [i for i, _ in ranked] == [token_id, *likeliest(exact, row.num_logprobs)]
        np.testing.assert_allclose([p for _, p in ranked], exact[[i for i, _ in ranked]], rtol=1e-9, atol=1e-9)


RANKED = {
    "equal": lambda rng, V: np.zeros(V),
    "one far above": lambda rng, V: np.where(np.arange(V) == 7, 90.0, rng.normal(0, 3, V)),
    "one far above equals": lambda rng, V: np.where(np.arange(V) == V - 1, 90.0, -2.5),
    "a few above a crowd": lambda rng, V: np.where(
        np.arange(V) % 300 == 9, rng.normal(9, 3, V), rng.normal(0, 1e-3, V)
    ),
    "far apart": lambda rng, V: rng.permutation(V) * 40.0,
}


@pytest.mark.parametrize("kind", RANKED)
def test_the_likeliest_are_ranked_in_any_row(backend: Backend, kind: str, stack: ExitStack) -> None:
    """Crowds that no list holds, and tokens so unlikely that they have no weight."""
    V = 1500
    logits = torch.from_numpy(RANKED[kind](np.random.default_rng(1), V).astype(np.float32))[None]
    (ranked,) = Sampling(backend, V, stack)(
        logits, sampling_batch([DrawRow(row=0, temperature=1.0, num_logprobs=MAX_RANKED)], V)
    ).ranked
    exact = log_softmax(logits[0])
    assert [i for i, _ in ranked[1:]] == likeliest(exact, MAX_RANKED)
    np.testing.assert_allclose([p for _, p in ranked], exact[[i for i, _ in ranked]], rtol=1e-9, atol=1e-9)


# ---- surprise, codes ------------------------------------------------------------------------------------------------


def test_surprise_is_that_of_the_uncut_distribution(backend: Backend, stack: ExitStack) -> None:
    """As the paper's: -log2 of the token's probability before the cut, at the draw's temperature."""
    V, rng = 500, np.random.default_rng(2)
    logits = random_logits(2, 3, V)
    rows = [
        DrawRow(row=i % 3, temperature=t, uniform=rng.random(), mirostat_mu=mu, xtc_threshold=xtc)
        for i, (t, mu, xtc) in enumerate([(1.0, 4.0, 1.0), (0.7, 8.0, 0.1), (1.5, -1.0, 1.0), (2.0, 6.0, 1.0)])
    ]
    rows += [DrawRow(row=0, temperature=1.0), DrawRow(row=1, temperature=0.0, mirostat_mu=3.0)]
    found = Sampling(backend, V, stack)(logits, sampling_batch(rows, V))
    for row, token_id, surprise in zip(rows[:4], found.ids, found.surprise, strict=False):
        exact = -log_softmax(logits[row.row].double() / row.temperature)[token_id] / math.log(2)
        assert surprise == pytest.approx(exact, rel=1e-9)
    assert all(math.isnan(surprise) for surprise in found.surprise[4:])


def test_a_row_without_a_distribution_fails_alone(backend: Backend, stack: ExitStack) -> None:
    logits = torch.zeros(4, 5000)
    logits[1, 4500], logits[2, 3], logits[3] = float("nan"), INF, -INF
    mask = np.full(157, 2**32 - 1, np.uint32)
    mask[4500 // 32] = 0
    rows = [
        DrawRow(row=i % 4, temperature=float(i > 3), num_logprobs=1 if i < 6 else -1, mirostat_mu=3.0) for i in range(8)
    ]
    rows += [DrawRow(row=1, temperature=1.0, mask=mask, num_logprobs=1)]
    found = Sampling(backend, 5000, stack)(logits, sampling_batch(rows, 5000))
    assert found.ids == [0, NAN_LOGIT, INFINITE_LOGIT, NOTHING_ALLOWED] * 2 + [0]
    assert [ranked is None for ranked in found.ranked] == [False, True, True, True, False, True, True, True, True]
    assert [math.isnan(surprise) for surprise in found.surprise] == [True] * 4 + [False] + [True] * 4


# ---- on the host ----------------------------------------------------------------------------------------------------


def test_what_no_launch_can_do_is_drawn_on_the_host(backend: Backend, stack: ExitStack) -> None:
    """By the CPU's function, beside draws of the device, from shared rows of logits; the next step reads all ids."""
    V, rng = 6000, np.random.default_rng(3)
    logits = random_logits(3, 4, V)
    many = np.arange(MAX_ADJUSTMENTS + 1, dtype=np.int32)
    crowd = Adjustments(many, *(np.full(len(many), x, np.float32) for x in (0.5, 1.2, 0.1)))
    rows = [
        DrawRow(row=1, temperature=1.0, uniform=0.2, num_logprobs=3),
        DrawRow(row=0, temperature=1.0, uniform=0.4, typical_p=0.7),
        DrawRow(row=3, temperature=0.9, uniform=0.6, dynamic_range=0.5, mask=rng.integers(0, 2**32, 188, np.uint32)),
        DrawRow(row=0, temperature=2.0, uniform=0.8, temperature_last=True, min_p=0.1, adjustments=banned(4, 9)),
        DrawRow(row=2, temperature=0.0, num_logprobs=MAX_RANKED + 1),
        DrawRow(row=2, temperature=0.0, adjustments=crowd),
        DrawRow(row=3, temperature=1.0, uniform=0.1, top_k=5),
        DrawRow(row=2, temperature=0.0, typical_p=0.5, dynamic_range=1.0, temperature_last=True),  # greedy: no filters
        DrawRow(row=2, temperature=1.0, typical_p=0.5, mirostat_mu=4.0),  # mirostat is in its place
        DrawRow(row=2, temperature=1.0, temperature_last=True),
    ]
    batch = sampling_batch(rows, V)
    assert np.nonzero(host_rows(check_batch(batch, 4, V)))[0].tolist() == [1, 2, 3, 4, 5]
    found = Sampling(backend, V, stack)(logits, batch)
    wanted = cpu_sample(logits, batch)
    assert found.ids == wanted.ids
    assert [ranked is None for ranked in found.ranked] == [ranked is None for ranked in wanted.ranked]
    assert found.ranked[4] == wanted.ranked[4]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        *({}, {"top_p": 0.5, "xtc_probability": 1.0}, {"typical_p": 0.9}, {"typical_p": 0.9, "mirostat_tau": 3.0}),
        *({"dynamic_range": 0.3}, {"temperature_last": True}, {"temperature_last": True, "dynamic_range": 0.1}),
    ],
    ids=str,
)
def test_it_is_known_beforehand_what_the_host_draws(values: dict, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0, **values)
    (on_host,) = host_rows(check_batch(draws_of([(params, 0, ())]), 1, 10))
    assert needs_host(params) == on_host
    assert needs_host(params, MAX_RANKED) == on_host
    assert needs_host(params, MAX_RANKED + 1)


def test_some_draws_of_a_batch_are_those_draws() -> None:
    V, logits = 50, random_logits(4, 2, 50)
    rows = [
        DrawRow(row=i % 2, temperature=0.0, adjustments=banned(*range(i, 40, 2)) if i % 3 else None) for i in range(9)
    ]
    batch, picked = sampling_batch(rows, V), np.array([7, 0, 4, 5])
    assert cpu_sample(logits, some_draws(batch, picked)).ids == [cpu_sample(logits, batch).ids[i] for i in picked]
    assert cpu_sample(logits, some_draws(batch, picked[:0])).ids == []


# ---- many -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_sequences", [1, 8])
def test_draws_beyond_a_launch_take_another(backend: Backend, max_sequences: int, stack: ExitStack) -> None:
    """64 draws and 20 measured rows, in launches of 16 or 64 rows, some on the host; one by one they are the same."""
    V, rng = 300, np.random.default_rng(6)
    logits = random_logits(6, 7, V)
    sampling = Sampling(backend, V, stack, max_sequences)
    assert sampling.num_rows == min(64, 16 * max_sequences)
    rows = [
        DrawRow(
            **{
                "row": i % 7,
                "temperature": (i % 5) / 2,
                "uniform": rng.random(),
                "top_k": i,
                "num_logprobs": -1 + i % 3 % 2,
            },
            mirostat_mu=5.0 if i % 11 == 3 else INF,
            typical_p=0.8 if i % 13 == 4 else 1.0,
            adjustments=banned(i, i + 1) if i % 4 == 2 else None,
            mask=rng.integers(0, 2**32, 10, np.uint32) if i % 6 == 5 else None,
        )
        for i in range(64)
    ]
    together = sampling(logits, sampling_batch(rows, V))
    for i in range(0, 64, 7):
        alone = sampling(logits, sampling_batch([rows[i]], V))
        assert alone.ids == together.ids[i : i + 1]
        assert alone.ranked == together.ranked[i : i + 1]
        np.testing.assert_array_equal(alone.surprise, together.surprise[i : i + 1])
    wanted = cpu_sample(logits, sampling_batch(rows, V)).ids
    assert sum(a != b for a, b in zip(together.ids, wanted, strict=True)) <= 1
    with pytest.raises(KernelError, match="65 draws: expected 1 to 64"):
        sampling(logits, sampling_batch([*rows, rows[0]], V))
