"""Sampling on the device against ``exl.sampling``: the same ids, and the same distribution at every border."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import backend_or_skip

from exl.batch import SamplingBatch
from exl.errors import KernelError
from exl.kernels.embed import embed
from exl.kernels.launch import Backend
from exl.kernels.sample import MAX_VOCAB, SampleTables, sample
from exl.kernels.sample_tables import LaunchRows, check_batch, pack_tables
from exl.layout.samples import table_bytes
from exl.sampling import probabilities
from exl.sampling import sample as cpu_sample
from exl.sampling_params import SamplingParams
from tests.device_draws import INF, draw, joined, one_row, packed, scratch_for
from tests.draws import draws_of
from tests.host.shim import HostShim, ShimBackend

ALMOST_ONE = 1 - 2**-53

FILTERS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {},
    {"temperature": 0.3},
    {"temperature": 3.0, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000_000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 1e-50},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 3, "min_p": 0.001},
    {"top_k": 20, "min_p": 0.3},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_k": 20},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 700, "top_p": 0.99},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.001},
]


def cumulated(logits: torch.Tensor, batch: SamplingBatch, i: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Row i's kept tokens in the order of drawing, the upper borders of their shares of [0, 1), and the largest error
    of a border on the device.

    A weight is off by less than 2^-44 of the likeliest token's weight (cuda/include/exl/logit_row.cuh), so a sum of
    weights and the total mass are each off by V 2^-44; a border is their quotient. The CPU's own f64 sums of V terms
    are off by V 2^-53 each.
    """
    p = probabilities(logits[i : i + 1], one_row(batch, i))[0].numpy()
    order = np.lexsort((np.arange(len(p)), -p))[: np.count_nonzero(p)]
    return order, np.cumsum(p[order]), len(p) * (2 * 2.0**-44 * p.max() + 2 * 2.0**-53)


def mixed(rng: np.random.Generator, num_rows: int, V: int) -> tuple[torch.Tensor, SamplingBatch]:
    """Random rows of all kinds (smooth, full of ties, with forbidden tokens), with each filter in turn."""
    logits = rng.normal(0, 4, (num_rows, V)).astype(np.float32)
    logits[1::3] = np.round(logits[1::3])
    logits[2::3][rng.random(logits[2::3].shape) < 0.2] = -INF
    logits[2::3, V // 2] = 1.5
    rows = []
    for i in range(num_rows):
        seen = rng.integers(0, V, min(V, 50)).tolist()
        rows.append((SamplingParams(seed=i, **FILTERS[i % len(FILTERS)]), int(rng.integers(1000)), seen))
    return torch.from_numpy(logits), draws_of(rows)


def assert_same_ids(found: list[int], logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Exempts only draws so near to a border that rounding decides, of which there is one in thousands."""
    expected = cpu_sample(logits, batch).ids
    for i in np.nonzero(np.array(found) != np.array(expected))[0]:
        _, borders, bound = cumulated(logits, batch, i)
        distance = np.abs(borders - batch.uniform[i]).min()
        assert distance <= bound, f"row {i}: token {found[i]}, the CPU's {expected[i]}, {distance} from a border"
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


# ---- the CPU's ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("V", "num_rows"), [(1, 17), (5, 51), (31, 51), (32, 51), (33, 51), (1000, 51), (32_000, 17)])
def test_rows_of_all_kinds_in_one_launch(backend: Backend, V: int, num_rows: int) -> None:
    logits, batch = mixed(np.random.default_rng(V), num_rows, V)
    before = logits.clone()
    assert_same_ids(draw(backend, logits, batch), logits, batch)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("V", [128_001, 135_169])  # the second has 34 blocks per row
def test_large_vocabularies(backend: Backend, V: int) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (2, V)).astype(np.float32))
    logits[0, 5], logits[1, V - 1] = 20.0, 30.0  # in the first and in the last part
    params = [SamplingParams(seed=5, temperature=1.5), SamplingParams(temperature=0.0)]
    batch = draws_of([(p, 3, ()) for p in params])
    assert_same_ids(draw(backend, logits, batch), logits, batch)


# ---- the distribution, border by border -----------------------------------------------------------------------------


def assert_borders(backend: Backend, logits: torch.Tensor, row: SamplingBatch, rng: np.random.Generator) -> None:
    """Just below a border of the cumulated distribution, the token that ends there is drawn; just above it, the next.
    A token's share is one interval, so this covers all uniforms between. Borders: as many as 32 pairs of rows."""
    order, borders, bound = cumulated(logits, row, 0)
    shares = np.diff(borders, prepend=0)
    wide = np.minimum(shares[:-1], shares[1:]) > 4 * bound  # shares wide enough that the next border does not interfere
    chosen = rng.permutation(np.nonzero(wide)[0])[:31]
    assert len(order) == 1 or len(chosen) >= min(8, len(order) - 1)
    draws = [(0.0, order[0])]
    for j in chosen:
        draws += [(borders[j] - 2 * bound, order[j]), (borders[j] + 2 * bound, order[j + 1])]
    if shares[-1] > 4 * bound:
        draws.append((ALMOST_ONE, order[-1]))
    batch = joined([one_row(row, 0, uniform=u) for u, _ in draws])
    assert draw(backend, logits.expand(len(draws), -1).contiguous(), batch) == [token for _, token in draws]


@pytest.mark.parametrize("values", FILTERS[2:], ids=str)
def test_every_filters_distribution(backend: Backend, values: dict) -> None:
    rng = np.random.default_rng(7)
    V = 33 if backend.device.type == "cpu" else 4000
    logits = torch.from_numpy(rng.normal(0, 2, (1, V)).astype(np.float32))
    row = draws_of([(SamplingParams(seed=0, **values), 0, rng.integers(0, V, 12).tolist())])
    assert_borders(backend, logits, row, rng)


def test_weights_to_the_unit(backend: Backend) -> None:
    """With two tokens the only border gives the second one's weight: off by less than 2^-44, at 32 distances and
    temperatures. A token of less weight than that is never drawn."""
    rng = np.random.default_rng(8)
    temperatures = rng.uniform(0.1, 5, 32).astype(np.float32)
    logits = np.stack([rng.uniform(-20, 20, 32), np.zeros(32)], 1)
    logits[:, 1] = logits[:, 0] - rng.uniform(0, 24, 32) * temperatures
    logits = torch.from_numpy(logits.astype(np.float32)).repeat(2, 1)
    batch = draws_of([(SamplingParams(seed=0, temperature=t), 0, ()) for t in [*temperatures, *temperatures]])
    for i in range(64):
        order, borders, bound = cumulated(logits, batch, i)
        assert order.tolist() == [0, 1]
        batch.uniform[i] = borders[0] + (bound if i < 32 else -bound)
    assert draw(backend, logits, batch) == [1] * 32 + [0] * 32
    far = torch.tensor([[45.001, 0.0], [44.9, 0.0]]) * float(np.log(2))
    assert draw(backend, far, joined([one_row(batch, 0, temperature=1, uniform=ALMOST_ONE)] * 2)) == [0, 1]


CROWDS = {  # more tokens than a list holds in one bin of a sixteenth of an octave
    "equal": lambda rng, V: np.zeros(V),
    "nearly equal": lambda rng, V: 5 + rng.uniform(0, 0.02, V),
    "two values": lambda rng, V: np.where(rng.random(V) < 0.5, 1.0, 3.0),
    "around zero": lambda rng, V: rng.normal(0, 1e-30, V),
    "a crowd below a few": lambda rng, V: np.where(rng.random(V) < 0.01, rng.normal(4, 1, V), rng.normal(0, 0.01, V)),
}


@pytest.mark.parametrize("values", [{}, {"top_k": 900, "min_p": 0.01, "top_p": 0.7}], ids=["plain", "filters"])
@pytest.mark.parametrize("crowd", CROWDS)
def test_crowded_bins(backend: Backend, crowd: str, values: dict) -> None:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(CROWDS[crowd](rng, 1800).astype(np.float32))[None]
    rows = [(SamplingParams(seed=i, **values), i, ()) for i in range(7)]
    assert_same_ids(
        draw(backend, logits.expand(7, -1).contiguous(), draws_of(rows)),
        logits.expand(7, -1),
        draws_of(rows),
    )
    if backend.device.type != "cpu" or (crowd in ("equal", "a crowd below a few") and not values):
        assert_borders(backend, logits, draws_of(rows[:1]), rng)


def last_kept(backend: Backend, logits: torch.Tensor, params: list[SamplingParams], seen: tuple[int, ...] = ()) -> None:
    """The last kept token in the order of drawing, which shows where a filter cuts."""
    rows = joined([one_row(draws_of([(p, 0, seen)]), 0, uniform=ALMOST_ONE) for p in params])
    logits = logits.expand(len(params), -1).contiguous()
    assert draw(backend, logits, rows) == cpu_sample(logits, rows).ids


def test_top_k_cuts_where_the_cpu_cuts(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    tied = torch.from_numpy(rng.integers(-4, 5, 31).astype(np.float32))[None]
    tied[0, 3] = -INF
    last_kept(backend, tied, [SamplingParams(seed=0, top_k=k) for k in range(1, 33)])
    # Different logits whose distance from the largest is equal in f64: ties with the second, as on the CPU.
    merged = torch.tensor([[20.0, 2e-16, 1e-16, -3.0]])
    assert probabilities(merged, draws_of([(SamplingParams(seed=0, top_k=2), 0, ())])).count_nonzero() == 3
    last_kept(backend, merged, [SamplingParams(seed=0, top_k=k) for k in range(5)])


def test_min_p_and_top_p_cut_where_the_cpu_cuts(backend: Backend) -> None:
    """The f32 numbers next to the decisive probability: 2^-24 of it apart, much more than the error of sums."""
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 2, (1, 33)).astype(np.float32))
    _, borders, _ = cumulated(logits, draws_of([(SamplingParams(seed=0), 0, ())]), 0)
    shares = np.diff(borders, prepend=0) / borders[0]
    beside = [np.nextafter(np.float32(x), np.float32(to)) for x in shares[1:16] for to in (0, 1)]
    last_kept(backend, logits, [SamplingParams(seed=0, min_p=x) for x in beside])
    beside = [np.nextafter(np.float32(x), np.float32(to)) for x in borders[:16] for to in (0, 1)]
    last_kept(backend, logits, [SamplingParams(seed=0, top_p=x) for x in beside])
    last_kept(backend, logits, [SamplingParams(seed=0, top_p=x, top_k=12) for x in beside])
    last_kept(backend, logits, [SamplingParams(seed=0, top_p=x, min_p=0.05) for x in beside])


def test_weights_that_are_exact_are_drawn_exactly(backend: Backend) -> None:
    """With equal weights all sums are integers, on the device and on the CPU, so shares adjoin exactly."""
    batch = draws_of([(SamplingParams(seed=0), 0, ())] * 8 + [(SamplingParams(seed=0, top_p=0.5), 0, ())] * 8)
    batch.uniform[:] = np.arange(16) % 8 / 8
    assert draw(backend, torch.zeros(16, 8), batch) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1, 1, 2, 2, 3, 3]


def test_extreme_temperatures_and_logits(backend: Backend) -> None:
    logits = torch.tensor([[3e38, -3e38, 2.9e38, 3e38]] * 4 + [[1e-44, 0.0, -0.0, -1e-44]] * 2 + [[-3.4e38] * 4] * 2)
    temperatures = [1e-30, 1e-42, 100.0, 1.0, 1e-3, 100.0, 1e-30, 1.0]
    batch = draws_of([(SamplingParams(seed=i, temperature=t), i, ()) for i, t in enumerate(temperatures)])
    assert draw(backend, logits, batch) == cpu_sample(logits, batch).ids


# ---- one row, one token ---------------------------------------------------------------------------------------------


def test_a_row_alone_gives_the_token_it_gives_in_a_batch(backend: Backend) -> None:
    """Rows of 1,001 logits start at every possible offset from 16-byte alignment."""
    logits, batch = mixed(np.random.default_rng(4), 17, 1001)
    together = draw(backend, logits, batch)
    for i in (2, 5, 12, 14, 15):
        assert draw(backend, logits[i : i + 1].contiguous(), one_row(batch, i)) == [together[i]]
    backwards = joined([one_row(batch, i) for i in reversed(range(17))])
    assert draw(backend, logits.flip(0), backwards) == together[::-1]


def test_the_number_of_multiprocessors_does_not_show() -> None:
    logits, batch = mixed(np.random.default_rng(5), 17, 9001)
    backends = [ShimBackend(HostShim("race"), num_multiprocessors=n) for n in (1, 3, 132)]
    ids = [draw(backend, logits, batch) for backend in backends]
    assert ids[0] == ids[1] == ids[2]
    assert_same_ids(ids[0], logits, batch)


def test_buffers_serve_one_step_after_another(backend: Backend) -> None:
    """The same buffers, made for four rows, serve steps of different parameters and numbers of draws."""
    V, device = 9001, backend.device
    scratch, samples = scratch_for(4, V, device), torch.zeros(4, dtype=torch.int32, device=device)
    tables = SampleTables(torch.zeros(table_bytes(4, V), dtype=torch.uint8, device=device), 4)
    for step in range(3):
        logits, batch = mixed(np.random.default_rng(step), 20, V)
        logits, batch = logits[14:18], joined([one_row(batch, i) for i in (14, 15 + step)])
        tables.buffer.copy_(torch.from_numpy(packed(batch, 4, V)))
        sample(backend, logits.to(device).contiguous(), tables, samples, scratch, 2)
        assert_same_ids(samples[:2].tolist(), logits[:2], batch)
        both = samples[:2].tolist()
        sample(backend, logits.to(device).contiguous(), tables, samples, scratch, 1)
        assert samples[:2].tolist() == both


def test_the_next_step_reads_the_samples(backend: Backend) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, float("nan"), 1.0]])
    batch = draws_of([(SamplingParams(temperature=0.0), 0, ())] * 2)
    device = backend.device
    samples = torch.tensor(draw(backend, logits, batch), dtype=torch.int32, device=device)
    table = torch.arange(24, device=device).reshape(3, 8).half()
    h, sumsq = torch.full((2, 8), 9.0, device=device), torch.zeros(2, 1, device=device)
    embed(backend, table, torch.tensor([-1, -2], dtype=torch.int32, device=device), h, sumsq, samples=samples)
    assert torch.equal(h[0], table[1].float())
    assert not h[1].any()


@pytest.mark.parametrize("arch", [61, 75, 90])
def test_other_architectures(arch: int) -> None:
    logits, batch = mixed(np.random.default_rng(6), 17, 600)
    assert_same_ids(draw(backend_or_skip("race", arch), logits, batch), logits, batch)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), INF, -float("nan"), None])
def test_rows_without_a_distribution(backend: Backend, bad: float | None, temperature: float) -> None:
    """The bad logit may be in any part of the row; a repetition penalty may overflow. Codes are those of the CPU."""
    logits = torch.zeros(3, 4100)
    if bad is None:
        logits[1] = -INF
    else:
        logits[1, 4098] = bad
        logits[1, 5] = INF  # NaN is reported before infinity
    batch = draws_of([(SamplingParams(temperature=temperature, seed=0), 0, ())] * 3)
    ids = draw(backend, logits, batch)
    assert ids[0] >= 0
    assert ids[2] >= 0
    assert ids == cpu_sample(logits, batch).ids


def test_a_penalty_that_overflows(backend: Backend) -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0]] * 3)
    rows = [(0.01, [0]), (100.0, [1]), (0.01, [1])]
    batch = draws_of([(SamplingParams(seed=0, repetition_penalty=p), 0, seen) for p, seen in rows])
    assert draw(backend, logits, batch) == [-2, 0, 0]


def test_a_batch_is_checked_on_the_host() -> None:
    params = SamplingParams(seed=0, repetition_penalty=1.5)
    batch = draws_of([(params, 0, [3, 5]), (params, 0, [4])], 6)
    checked = check_batch(batch, 2, 6)
    bad_values = {
        "temperature": [-1.0, 101.0, float("nan")],
        "top_k": [-1],
        "top_p": [-0.5, 1.5],
        "min_p": [-0.1, 2.0],
        "uniform": [1.0, -0.5],
        "top_n_sigma": [-1.0, INF],
        "mirostat_mu": [float("nan")],
        "xtc_threshold": [-0.1],
        "num_logprobs": [-2],
    }
    cases = []
    for name, values in bad_values.items():
        for bad in values:
            array = getattr(batch, name).copy()
            array[1] = bad
            cases.append((f"draw 1: {name} is .* expected", replace(batch, **{name: array})))
    for name, bad in (("adjust_bias", INF), ("adjust_factor", 0.0), ("adjust_factor", INF), ("adjust_subtract", -INF)):
        array = getattr(batch, name).copy()
        array[2] = bad
        cases.append((f"draw 1: found an {name} that", replace(batch, **{name: array})))
    ids, mask = np.array([5, 3, 4], np.int32), np.full((1, 1), 7, np.uint32)
    cases += [
        ("draw 0: found adjusted token ids that do not rise", replace(batch, adjust_id=ids)),
        (r"top_k has shape \(1,\): expected \(2,\)", replace(batch, top_k=batch.top_k[:1])),
        ("adjust_start is .* 3 rising numbers up to 3", replace(batch, adjust_start=batch.adjust_start + 1)),
        (r"draws from rows \[0, 2\]: expected 0 to 1", replace(batch, row=np.array([0, 2], np.int32))),
        (r"mask_idx is \[0, 1\]: expected -1 to 0", replace(batch, masks=mask, mask_idx=np.array([0, 1], np.int32))),
        (r"masks are uint32 \(1, 2\): expected uint32 \[masks, 1\]", replace(batch, masks=np.ones((1, 2), np.uint32))),
    ]
    for words, bad_batch in cases:
        with pytest.raises(KernelError, match=words):
            check_batch(bad_batch, 2, 6)
    with pytest.raises(KernelError, match="draw 0: found an adjusted token id outside 0 to 4"):
        check_batch(batch, 2, 5)
    both = LaunchRows(np.arange(2), np.zeros(2, np.bool_))
    with pytest.raises(KernelError, match="a launch of 2 rows: expected 1 to 1"):
        pack_tables(checked, both, 1, 6, np.zeros(table_bytes(1, 6), np.uint8))


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86

    def load(self, spec: object) -> None:
        raise AssertionError("a kernel was asked for")


def test_bad_arguments_are_refused_before_a_launch() -> None:
    nobody, logits, samples = NeverLaunches(), torch.zeros(2, 100), torch.zeros(2, dtype=torch.int32)
    tables, scratch = SampleTables(torch.zeros(table_bytes(2, 100), dtype=torch.uint8), 2), scratch_for(2, 100)
    odd = SampleTables(torch.zeros(len(tables.buffer) + 1, dtype=torch.uint8)[1:], 2)
    small = scratch_for(1, 100)
    cases = [
        (r"logits: expected \[L, V\]", lambda: sample(nobody, logits[0], tables, samples, scratch, 2)),
        ("logits is torch.float16", lambda: sample(nobody, logits.half(), tables, samples, scratch, 2)),
        (
            "expected a contiguous tensor",
            lambda: sample(nobody, torch.zeros(2, 200)[:, :100], tables, samples, scratch, 2),
        ),
        ("launch of 3 rows: expected 1 to 2", lambda: sample(nobody, logits, tables, samples, scratch, 3)),
        (f"1 to {MAX_VOCAB}", lambda: sample(nobody, torch.zeros(2, 0), tables, samples, scratch, 1)),
        (f"1 to {MAX_VOCAB}", lambda: sample(nobody, torch.zeros(1, MAX_VOCAB + 1), tables, samples, scratch, 1)),
        ("samples is torch.int64", lambda: sample(nobody, logits, tables, samples.long(), scratch, 2)),
        (r"tables has shape", lambda: sample(nobody, torch.zeros(2, 101), tables, samples, scratch, 2)),
        ("starts at address", lambda: sample(nobody, logits, odd, samples, scratch, 2)),
        ("scratch.parts has 5 elements: expected 10", lambda: sample(nobody, logits, tables, samples, small, 2)),
        (
            "scratch.bin_weights is torch.int32",
            lambda: sample(nobody, logits, tables, samples, replace(scratch, bin_weights=scratch.bin_counts), 2),
        ),
    ]
    for words, call in cases:
        with pytest.raises(KernelError, match=words):
            call()
