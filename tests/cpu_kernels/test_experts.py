"""How experts are chosen and which rows they compute, against plain Python; exl's and torch's way agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exl.cpu_kernels.choose_experts import ChooseExperts
from exl.cpu_kernels.expert_rows import AddGatedRows, AddPairs, GatherPairs
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.plan_experts import PlanExperts
from exl.errors import UnsupportedModelError
from exl.layout.cpu_steps import Pairs
from exl.ops.base import RouteSpec
from exl.ops.torch_experts import choose_experts
from tests.cpu_kernels.guards import guarded_array

SPECS = [
    RouteSpec(2, normalize=True),
    RouteSpec(8, normalize=False),
    RouteSpec(4, "sigmoid", True, 1e-20, 2.5, 4, 2),
    RouteSpec(3, "sigmoid", False, scaling=0.5),
    RouteSpec(4, "chosen"),
    RouteSpec(1, "chosen"),
]


def chosen(
    logits: NDArray[np.float32], bias: NDArray[np.float32] | None, spec: RouteSpec
) -> tuple[list[list[int]], NDArray[np.float64]]:
    """Ids, and weights in float64, by the description alone. Scores are compared in f32, as they are."""
    ids, weights = [], []
    for row in logits.astype(np.float64):
        scores = {
            "softmax": lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum(),
            "sigmoid": lambda row: 1 / (1 + np.exp(-row)),
            "chosen": lambda row: row,
        }[spec.score](row)
        choice = scores.astype(np.float32) + (0 if bias is None else bias)
        size = len(row) // spec.groups
        best = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(spec.groups)]
        groups = sorted(range(spec.groups), key=lambda g: (-best[g], g))[: spec.top_groups]
        open_ = [e for e in range(len(row)) if e // size in groups]
        found = sorted(sorted(open_, key=lambda e: (-choice[e], e))[: spec.per_token])
        some = scores[found]
        if spec.score == "chosen":
            some = np.exp(some - some.max()) / np.exp(some - some.max()).sum()
        elif spec.normalize:
            some = some / (some.sum() + spec.eps)
        ids.append(found)
        weights.append(some * spec.scaling)
    return ids, np.array(weights)


def by_kernel(library: Library, logits, bias, spec: RouteSpec, cached=None):
    T, E = logits.shape
    ids = guarded_array(np.full((T, spec.per_token), 99, np.int32))
    weights = guarded_array(np.full((T, spec.per_token), np.nan, np.float32))
    cached = guarded_array(np.zeros(T, np.int32) if cached is None else cached)
    logits, bias = guarded_array(logits), None if bias is None else guarded_array(bias)
    numbers = float(spec.eps), float(spec.scaling), spec.groups, spec.top_groups
    args = slots(logits, bias, ids, weights, E, spec.per_token, *numbers, cached)
    library.call(ChooseExperts(spec.score, spec.normalize, spec.groups > 1), args, T)
    return ids, weights


@pytest.mark.parametrize("num_experts", [8, 60, 128])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_best_are_chosen(library: Library, spec: RouteSpec, num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    logits = (3 * rng.standard_normal((9, num_experts))).astype(np.float32)
    bias = rng.standard_normal(num_experts).astype(np.float32) if spec.score == "sigmoid" else None
    expected, exact = chosen(logits, bias, spec)
    ids, weights = by_kernel(library, logits, bias, spec)
    assert ids.tolist() == expected
    np.testing.assert_allclose(weights, exact, rtol=2e-6)
    other_ids, other = torch.empty(9, spec.per_token, dtype=torch.int32), torch.empty(9, spec.per_token)
    choose_experts(torch.from_numpy(logits), None if bias is None else torch.from_numpy(bias), spec, other_ids, other)
    assert other_ids.tolist() == expected
    np.testing.assert_allclose(other.numpy(), exact, rtol=2e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_of_equal_ones_the_first(library: Library, spec: RouteSpec) -> None:
    """Logits of three values only, of groups of equal sums, too."""
    logits = np.random.default_rng(3).choice(np.array([-1, 0, 2], np.float32), (40, 16))
    expected, _ = chosen(logits, None, spec)
    assert by_kernel(library, logits, None, spec)[0].tolist() == expected
    other_ids, other = torch.empty(40, spec.per_token, dtype=torch.int32), torch.empty(40, spec.per_token)
    choose_experts(torch.from_numpy(logits), None, spec, other_ids, other)
    assert other_ids.tolist() == expected


def test_rows_that_are_not_cached_get_none_and_nan_stays_in_its_row(library: Library) -> None:
    logits = np.random.default_rng(4).standard_normal((4, 32)).astype(np.float32)
    plain = by_kernel(library, logits, None, SPECS[0])
    logits[1, 5] = np.nan
    ids, weights = by_kernel(library, logits, None, SPECS[0], np.array([3, 4, -1, 0], np.int32))
    assert ids[2].tolist() == [-1, -1]
    assert weights[2].tolist() == [0, 0]
    assert np.isnan(weights[1]).all()
    assert ((ids[1] >= 0) & (ids[1] < 32)).all()
    for row in (0, 3):
        assert ids[row].tolist() == plain[0][row].tolist()
        assert weights[row].tolist() == plain[1][row].tolist()


def test_other_scores_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="router: found 'tanh'"):
        choose_experts(torch.zeros(1, 4), None, RouteSpec(1, "tanh"), torch.zeros(1, 1), torch.zeros(1, 1))


def random_ids(rng: np.random.Generator, T: int, k: int, E: int) -> NDArray[np.int32]:
    """Rising, some experts far more often; some rows without any."""
    likely = rng.dirichlet(np.full(E, 0.3))
    ids = np.stack(
        [np.sort(rng.choice(E, k, replace=False, p=(likely + 1e-3) / (likely + 1e-3).sum())) for _ in range(T)]
    )
    ids[rng.random(T) < 0.2] = -1
    return ids.astype(np.int32)


def tables(library: Library, ids: NDArray[np.int32], pairs: Pairs):
    items = guarded_array(np.full((pairs.waves, pairs.items, 4), 77, np.int32))
    entries = guarded_array(np.full((pairs.total, 4), 77, np.int32))
    places, ids = guarded_array(np.full(ids.shape, 77, np.int32)), guarded_array(ids)
    args = slots(
        ids, items, entries, places, pairs.total, ids.shape[1], pairs.experts, pairs.item_rows,
        pairs.at_once, pairs.items, pairs.waves,
    )  # fmt: skip
    library.call(PlanExperts(), args)
    return items, entries, places


@pytest.mark.parametrize("seed", range(12))
def test_each_pair_is_in_one_item(library: Library, seed: int) -> None:
    """Of any sizes: items are what plain loops over sorted pairs give, in waves that end anywhere."""
    rng = np.random.default_rng(seed)
    T, E = int(rng.integers(1, 60)), int(rng.integers(2, 40))
    k = int(rng.integers(1, min(E, 8) + 1))
    total, item_rows = T * k, int(rng.choice([1, 3, 8, 32]))
    pairs = Pairs(total, int(rng.integers(1, total + 1)), E, item_rows)
    ids = random_ids(rng, T, k, E)
    items, entries, places = tables(library, ids, pairs)
    order = sorted((int(e), row, j) for row, some in enumerate(ids) for j, e in enumerate(some) if e >= 0)
    expected: list[list[list[int]]] = [[] for _ in range(pairs.waves)]
    for p, (expert, row, j) in enumerate(order):
        wave, within = divmod(p, pairs.at_once)
        last = expected[wave][-1] if expected[wave] else None
        if last is None or last[0] != expert or last[2] == item_rows:
            expected[wave].append([expert, within, 0])
        expected[wave][-1][2] += 1
        assert entries[p, :3].tolist() == [row, len(expected[wave]) - 1, expert]
        assert places[row, j] == p
    for wave, some in enumerate(expected):
        assert len(some) <= pairs.items
        assert items[wave, : len(some), :3].tolist() == some
        assert (items[wave, len(some) :, 2] == 0).all()
    assert (entries[len(order) :, 0] == -1).all()
    assert (places[ids < 0] == -1).all()


def test_rows_go_to_their_experts_and_back(library: Library) -> None:
    """Gathered, taken as they are for what experts give, and added with their weights in two waves: as in NumPy with
    one rounding for each product and sum."""
    rng = np.random.default_rng(5)
    T, C, k, E = 7, 70, 3, 9
    ids = random_ids(rng, T, k, E)
    pairs = Pairs(T * k, 11, E, 8)
    _, entries, places = tables(library, ids, pairs)
    x, h = (guarded_array(rng.standard_normal((T, C)).astype(np.float32)) for _ in range(2))
    weights = guarded_array(rng.random((T, k)).astype(np.float32))
    out = guarded_array(h.copy())
    for wave in range(2):
        first = wave * pairs.at_once
        count = min(pairs.at_once, pairs.total - first)
        y = guarded_array(np.zeros((count, C), np.float32))
        library.call(GatherPairs(), slots(x, C, entries[first:], y, C), count)
        there = entries[first : first + count, 0]
        np.testing.assert_array_equal(y[there >= 0], x[there[there >= 0]])
        args = slots(y, places, weights, out, C, out, C, C, k, first, first + count, 32, 3)
        library.call(AddPairs(), args, 3 * T)
    expected = h.astype(np.float64)
    for row, some in enumerate(ids):
        for j, expert in enumerate(some):
            if expert >= 0:
                added = expected[row] + weights[row, j].astype(np.float64) * x[row]
                expected[row] = added.astype(np.float32)
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_a_gate_of_each_row(library: Library) -> None:
    rng = np.random.default_rng(6)
    y, h = (guarded_array(rng.standard_normal((5, 40)).astype(np.float32)) for _ in range(2))
    gate, out = guarded_array(np.array([-200, -1, 0, 2, 90], np.float32)), guarded_array(np.empty((5, 40), np.float32))
    library.call(AddGatedRows(), slots(y, gate, h, 40, out, 40, 40, 16, 3), 15)
    exact = h + y / (1 + np.exp(-gate.astype(np.float64)))[:, None]
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-6)
