"""What sampling draws by, against exact sums, and draws against those of torch's functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.sampling_weights import CompiledMath, Exponentials, Mass, PrefixSums
from exl.engine.draws import DrawRow, sampling_batch
from exl.sampling import probabilities, sample
from exl.sampling_params import SamplingParams
from tests.cpu_kernels.guards import guarded_array
from tests.draws import draws_of

SIZES = [1, 7, 8, 31, 32, 33, 1000]
FILTERS = [
    {},
    {"temperature": 0.7, "top_k": 40},
    {"top_p": 0.9},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.5, "repetition_penalty": 1.3, "min_p": 0.001},
]


def numbers(size: int) -> NDArray[np.float64]:
    """Shifted logits, the largest 0, some forbidden."""
    x = -np.random.default_rng(size).exponential(8, size)
    x[size // 2] = 0
    x[size // 3] = -np.inf if size > 3 else x[size // 3]
    return x


@pytest.mark.parametrize("size", SIZES)
def test_exponentials_and_their_sums(library: Library, size):
    x, out, total = guarded_array(numbers(size)), guarded_array(np.zeros(size)), np.zeros(1)
    library.call(Exponentials(), slots(x, out, size))
    np.testing.assert_allclose(out, np.exp(x), rtol=3e-16)
    for cut in (-np.inf, -3.0, float(np.median(x)), 0.0, 1.0):
        library.call(Mass(), slots(x, total, size, int(np.float64(cut).view(np.int64))))
        assert total[0] == pytest.approx(math.fsum(np.exp(x[x >= cut])), rel=2e-15)
    weights = out.copy()
    library.call(PrefixSums(), slots(weights, out, size))
    exact = [math.fsum(weights[: i + 1]) for i in range(size)]
    np.testing.assert_allclose(out, exact, rtol=1e-13)


@pytest.mark.parametrize("values", FILTERS)
def test_draws_are_those_of_torchs_functions(library: Library, values):
    """Bits of weights may differ in the last place, which these draws do not meet."""
    own = CompiledMath(library)
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(5)) * 4
    logits[:, 17] = -torch.inf
    rows = [(SamplingParams(seed=i, **({"temperature": 1.0} | values)), i, [3, 40, 41]) for i in range(8)]
    batch = draws_of(rows)
    torch.testing.assert_close(
        probabilities(logits, batch, own), probabilities(logits, batch), rtol=1e-13, atol=0, check_dtype=True
    )
    assert sample(logits, batch, own).ids == sample(logits, batch).ids


def test_filters_that_need_sums_are_those_of_torchs_functions(library: Library, libraries: list[Library]):
    """Deviations, entropies and their powers; and with the same bits whatever the instructions."""
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(6)) * 3
    logits[1, ::3] = -torch.inf
    values = [
        {"top_n_sigma": 1.2},
        {"typical_p": 0.7},
        {"temperature": 0.9, "dynamic_range": 0.5, "dynamic_exponent": 0.7},
        {"mirostat_mu": 5.0},
        {"temperature": 1.4, "temperature_last": True, "top_p": 0.9, "xtc_threshold": 0.02},
    ]
    draws = [
        DrawRow(i % 2, 0.37 * i % 1, **({"temperature": 1.0} | asked), num_logprobs=4)
        for i, asked in enumerate([*values, *values[::-1]])
    ]
    batch, own = sampling_batch(draws, 3000), CompiledMath(library)
    torch.testing.assert_close(probabilities(logits, batch, own), probabilities(logits, batch), rtol=1e-11, atol=0)
    assert sample(logits, batch, own).ids == sample(logits, batch).ids
    found = [sample(logits, batch, CompiledMath(each)) for each in libraries]
    assert all(repr(each) == repr(found[0]) for each in found)


def test_views_are_read_as_they_lie(library: Library):
    own = CompiledMath(library)
    x = -torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(own.weights(x[:, 1]), x[:, 1].exp(), rtol=3e-16, atol=0)
    assert own.mass(x[:, 2], -0.5) == pytest.approx(float(x[:, 2][x[:, 2] >= -0.5].exp().sum()), rel=1e-14)
    torch.testing.assert_close(own.cumulated(x[:, 0]), x[:, 0].cumsum(0), rtol=1e-14, atol=0)


def test_bits_do_not_depend_on_the_instructions(libraries: list[Library]):
    x = torch.from_numpy(numbers(1000))
    found = set()
    for library in libraries:
        own = CompiledMath(library)
        weights = own.weights(x)
        sums = torch.tensor([own.mass(x, -math.inf), own.mass(x, -2.0)], dtype=torch.float64)
        found.add(torch.cat([weights, own.cumulated(weights), sums]).numpy().tobytes())
    assert len(found) == 1
