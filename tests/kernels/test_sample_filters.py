"""The filters of ``sample.cu`` against their definitions in f64, on random logits: ids, and where each filter cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl.batch import SamplingBatch
from exl.engine.draws import Adjustments, DrawRow, sampling_batch
from exl.kernels.launch import Backend
from exl.sampling import sample as cpu_sample
from tests.device_draws import INF, draw, joined, one_row
from tests.host.shim import HostShim, ShimBackend

ALMOST_ONE = 1 - 2**-53


def adjustments(rng: np.random.Generator, V: int, count: int, banned: int = 0) -> Adjustments:
    ids = np.sort(rng.permutation(V)[:count]).astype(np.int32)
    subtract = rng.choice([0.0, 0.5, 2.0], count).astype(np.float32)
    subtract[rng.permutation(count)[:banned]] = INF
    bias, factor = rng.normal(0, 2, count).astype(np.float32), rng.uniform(0.7, 1.6, count).astype(np.float32)
    return Adjustments(ids, bias, factor, subtract)


def some_mask(rng: np.random.Generator, V: int, share: float) -> np.ndarray:
    bits = rng.random(-(-V // 32) * 32) < share  # bits of tokens beyond the vocabulary are never looked at
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


# Each makes the draw of one row of V logits.
FILTERS = {
    "top-n-sigma": lambda rng, V: {"top_n_sigma": 1.0},
    "a narrow top-n-sigma": lambda rng, V: {"top_n_sigma": 0.2, "temperature": 2.0},
    "a wide top-n-sigma": lambda rng, V: {"top_n_sigma": 3.0, "temperature": 1.5},
    "top-n-sigma first": lambda rng, V: {"top_n_sigma": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    "top-n-sigma of the allowed": lambda rng, V: {"top_n_sigma": 1.0, "mask": some_mask(rng, V, 0.3)},
    "mirostat": lambda rng, V: {"mirostat_mu": 3.0},
    "mirostat, wide": lambda rng, V: {"mirostat_mu": 12.5, "temperature": 1.5},
    "mirostat, nobody": lambda rng, V: {"mirostat_mu": -0.5},
    "mirostat, everybody": lambda rng, V: {"mirostat_mu": 90.0},
    "mirostat instead": lambda rng, V: {"mirostat_mu": 6.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9},
    "mirostat after top-n-sigma": lambda rng, V: {"mirostat_mu": 4.0, "top_n_sigma": 2.0, "temperature": 2.0},
    "XTC": lambda rng, V: {"xtc_threshold": 0.1, "temperature": 0.8},
    "XTC, low": lambda rng, V: {"xtc_threshold": 0.001, "temperature": 1.5},
    "XTC, at its most": lambda rng, V: {"xtc_threshold": 0.5},
    "XTC, everybody": lambda rng, V: {"xtc_threshold": 0.0, "top_k": 20},
    "XTC after filters": lambda rng, V: {"xtc_threshold": 0.05, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "XTC after mirostat": lambda rng, V: {"xtc_threshold": 0.02, "mirostat_mu": 7.0},
    "adjusted": lambda rng, V: {"adjustments": adjustments(rng, V, min(V // 2, 300), 20)},
    "all adjusted": lambda rng, V: {"adjustments": adjustments(rng, V, min(V, 4096)), "top_k": 40},
    "adjusted, greedy": lambda rng, V: {"adjustments": adjustments(rng, V, V // 3 % 4096), "temperature": 0.0},
    "masked": lambda rng, V: {"mask": some_mask(rng, V, 0.2)},
    "masked, greedy": lambda rng, V: {"mask": some_mask(rng, V, 0.1), "temperature": 0.0},
    "together": lambda rng, V: {
        **{"mask": some_mask(rng, V, 0.5), "adjustments": adjustments(rng, V, 60, 10), "top_n_sigma": 2.5},
        **{"temperature": 1.3, "top_k": 50, "top_p": 0.97, "min_p": 0.01, "xtc_threshold": 0.03},
    },
}


def draw_of(name: str, rng: np.random.Generator, V: int) -> DrawRow:
    return DrawRow(**{"row": 0, "temperature": 1.0, "uniform": rng.random(), **FILTERS[name](rng, V)})


# ---- the definitions ------------------------------------------------------------------------------------------------


def adjusted(logits: np.ndarray, row: DrawRow) -> np.ndarray:
    """In f32, as each operation of ``SamplingBatch`` is said."""
    logits = logits.astype(np.float32).copy()
    if row.adjustments is not None:
        ids, bias, factor, subtract = row.adjustments
        value = logits[ids] + bias
        logits[ids] = np.where(value < 0, value * factor, value / factor) - subtract
    if row.mask is not None:
        allowed = (row.mask[np.arange(len(logits)) // 32] >> (np.arange(len(logits)) % 32)) & 1
        logits[allowed == 0] = -INF
    return logits


def distribution(logits: np.ndarray, row: DrawRow) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, in the order of drawing, and their probabilities: f64, sorted, nothing else."""
    values = adjusted(logits, row).astype(np.float64)
    order = np.lexsort((np.arange(len(values)), -values))
    order = order[np.isfinite(values[order])]
    sorted_logits = values[order]
    if row.temperature == 0.0:
        return order[:1], np.ones(1)
    kept = np.ones(len(order), np.bool_)
    if row.top_n_sigma > 0:  # Tang et al., arXiv 2411.07641: M - n sigma
        kept &= sorted_logits >= sorted_logits[0] - np.float32(row.top_n_sigma) * sorted_logits.std()
    x = (sorted_logits - sorted_logits[0]) / np.float32(row.temperature)
    weights = np.exp(x)
    if row.mirostat_mu < INF:  # Basu et al., arXiv 2007.14966, algorithm 2: surprise at most mu
        kept &= -np.log2(weights / weights[kept].sum()) <= row.mirostat_mu
        kept |= x == 0.0
    else:
        if 0 < row.top_k < len(x):
            kept &= x >= x[row.top_k - 1]
        before = np.cumsum(weights) - weights
        if row.top_p < 1:  # the fewest whose probabilities reach it
            kept &= before < np.float32(row.top_p) * weights[kept].sum()
        if row.min_p > 0:  # Nguyen et al., arXiv 2407.01082
            kept &= weights >= np.float32(row.min_p)
    if row.xtc_threshold <= 0.5:  # exclude top choices: all that reach the threshold but the least likely
        group = np.nonzero(kept & (weights >= np.float32(row.xtc_threshold) * weights[kept].sum()))[0]
        kept[group[:-1]] = False
    order, weights = order[kept], weights[kept]
    return order, weights / weights.sum()


def bound_of(p: np.ndarray, V: int) -> float:
    """How far a border of the cumulated distribution may be off on the device: see ``tests/kernels/test_sample.py``."""
    return V * (2 * 2.0**-44 * p.max() + 2 * 2.0**-53)


def expected(logits: np.ndarray, row: DrawRow) -> tuple[int, float]:
    """The id, and how far the draw is from the next border, in units of ``bound_of``."""
    order, p = distribution(logits, row)
    borders = np.cumsum(p)[:-1]
    distance = np.abs(borders - row.uniform).min(initial=INF)
    return int(order[np.searchsorted(borders, row.uniform, side="right")]), distance / bound_of(p, len(logits))


# ---- ids ------------------------------------------------------------------------------------------------------------


def random_logits(rng: np.random.Generator, num_rows: int, V: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, rng.uniform(1, 4), (num_rows, V)).astype(np.float32))


@pytest.mark.parametrize("V", [77, 4097, 32_001])
def test_draws_follow_the_definitions(backend: Backend, V: int) -> None:
    """All filters in one launch; a second draw of each has another uniform and the same row of logits. The CPU too."""
    rng = np.random.default_rng(V)
    logits = random_logits(rng, 5, V)
    rows = [draw_of(name, rng, V)._replace(row=i % 5) for i, name in enumerate(FILTERS)]
    rows += [row._replace(uniform=rng.random()) for row in rows]
    wanted = [expected(logits[row.row].numpy(), row) for row in rows]
    batch = sampling_batch(rows, V)
    far = [distance > 1 for _, distance in wanted]
    assert far.count(False) <= 1
    tokens = [token for token, _ in wanted]
    for found in (draw(backend, logits, batch), cpu_sample(logits, batch).ids):
        assert [a for a, is_far in zip(found, far, strict=True) if is_far] == [
            a for a, is_far in zip(tokens, far, strict=True) if is_far
        ]


@pytest.mark.parametrize("name", FILTERS)
def test_borders_lie_where_the_definitions_say(backend: Backend, name: str) -> None:
    """Just below a border of the cumulated distribution, the token that ends there is drawn; just above it, the next.
    The first and the last token show what a filter keeps."""
    rng, V = np.random.default_rng(list(FILTERS).index(name)), 77
    logits, row = random_logits(rng, 1, V), draw_of(name, rng, V)
    order, p = distribution(logits[0].numpy(), row)
    bound, borders = 2 * bound_of(p, V), np.cumsum(p)
    wide = np.nonzero(np.minimum(p[:-1], p[1:]) > 2 * bound)[0][:20]
    draws = [(0.0, order[0])]
    if p[-1] > 2 * bound:
        draws.append((ALMOST_ONE, order[-1]))
    for j in wide:
        draws += [(borders[j] - bound, order[j]), (borders[j] + bound, order[j + 1])]
    batch = sampling_batch([row._replace(uniform=u) for u, _ in draws], V)
    assert draw(backend, logits, batch) == [token for _, token in draws]


def test_equal_logits_are_cut_by_id(backend: Backend) -> None:
    """Crowds of equals are parted by top-p and by XTC, and by nothing else."""
    logits = torch.zeros(1, 1800)
    logits[0, 900:] = -3.0
    share = np.log2(900 * (1 + np.exp(-3.0)))  # bits of surprise of a token of the first half
    rows = [
        DrawRow(row=0, temperature=1.0, xtc_threshold=0.0, top_k=900),
        DrawRow(row=0, temperature=1.0, xtc_threshold=0.0, top_k=900, top_p=0.5),
        DrawRow(row=0, temperature=1.0, mirostat_mu=share + 1e-10),
        DrawRow(row=0, temperature=1.0, mirostat_mu=share - 1e-10),
        DrawRow(row=0, temperature=1.0, mirostat_mu=share + 3 / np.log(2) - 1e-10),
        DrawRow(row=0, temperature=1.0, mirostat_mu=share + 3 / np.log(2) + 1e-10),
        DrawRow(row=0, temperature=1.0, top_n_sigma=1.0),
    ]
    first = draw(backend, logits, sampling_batch(rows, 1800))
    last = draw(backend, logits, sampling_batch([row._replace(uniform=ALMOST_ONE) for row in rows], 1800))
    assert first == [899, 449, 0, 0, 0, 0, 0]
    assert last == [899, 449, 899, 899, 899, 1799, 899]


def test_a_standard_deviation_of_large_and_of_close_logits(backend: Backend) -> None:
    """The cut to 2^-14 either side: for rows that are shifted by 200, of little spread, with forbidden tokens."""
    rng = np.random.default_rng(5)
    for scale, shift in ((3.0, 0.0), (3.0, 200.0), (3.0, -250.0), (0.05, 10.0)):
        logits = rng.normal(shift, scale, 5001).astype(np.float32)
        logits[::7] = -INF
        top = np.sort(logits)[::-1].astype(np.float64)
        std = logits[np.isfinite(logits)].astype(np.float64).std()
        j = int(np.argmax(top[5:40] - top[6:41])) + 5  # a wide gap: the cut falls on either side of top[j]
        rows = [
            DrawRow(row=0, temperature=100.0, uniform=ALMOST_ONE, top_n_sigma=(top[0] - top[j] + aside) / std)
            for aside in (2.0**-14, -(2.0**-14))
        ]
        ids = draw(backend, torch.from_numpy(logits)[None], sampling_batch(rows, 5001))
        assert [float(logits[i]) for i in ids] == [top[j], top[j - 1]]


def test_what_is_forbidden_takes_no_part(backend: Backend) -> None:
    """NaN and inf behind a mask do not matter; with all allowed tokens banned the row has no distribution."""
    logits = torch.tensor([[1.0, float("nan"), INF, 2.0, -1.0]])
    mask = np.array([0b11001], np.uint32)
    banned = Adjustments(np.array([0, 3, 4], np.int32), *(np.zeros(3, np.float32) + x for x in (0, 1, INF)))
    for temperature in (0.0, 1.0):
        rows = [
            DrawRow(row=0, temperature=temperature, mask=mask, uniform=0.1),
            DrawRow(row=0, temperature=temperature),
            DrawRow(row=0, temperature=temperature, mask=mask & 0b00001),
            DrawRow(row=0, temperature=temperature, mask=mask, adjustments=banned),
            DrawRow(row=0, temperature=temperature, mask=mask & 0),
            DrawRow(row=0, temperature=temperature, mask=mask | 0b00100),
        ]
        assert draw(backend, logits, sampling_batch(rows, 5)) == [3, -1, 0, -3, -3, -2]


# ---- one draw, one token --------------------------------------------------------------------------------------------


def alone(batch: SamplingBatch, i: int) -> SamplingBatch:
    return one_row(batch, i, row=batch.row[i])


def test_a_draw_alone_gives_the_token_it_gives_in_company(backend: Backend) -> None:
    """In any order, beside any others, from any row (rows of 5,001 start at every offset from 16-byte alignment)."""
    rng, V = np.random.default_rng(11), 5001
    logits = random_logits(rng, 4, V)
    rows = [draw_of(name, rng, V)._replace(row=i % 4) for i, name in enumerate(FILTERS)]
    batch = sampling_batch(rows, V)
    together = draw(backend, logits, batch)
    for i in range(0, len(rows), 3):
        assert draw(backend, logits, alone(batch, i)) == together[i : i + 1]
        own = logits[rows[i].row : rows[i].row + 1].contiguous()
        assert draw(backend, own, one_row(batch, i)) == together[i : i + 1]
    order = rng.permutation(len(rows))
    assert draw(backend, logits, sampling_batch([rows[i] for i in order], V)) == [together[i] for i in order]


def test_the_order_of_blocks_does_not_show() -> None:
    rng, V = np.random.default_rng(12), 13_001
    logits = random_logits(rng, len(FILTERS), V)
    batch = joined([sampling_batch([draw_of(name, rng, V)._replace(mask=None)], V) for name in FILTERS])
    ids = [draw(ShimBackend(HostShim("race", seed)), logits, batch) for seed in (1, 2)]
    assert ids[0] == ids[1]
