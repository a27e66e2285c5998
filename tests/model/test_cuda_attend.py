"""What families ask of a GPU's attention, on the host shim against float64: a RoPE of each layer, norms of whole
rows, sinks. Each, taken out, would be seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from exl.cache.kv import KVCache
from exl.checkpoint.rope_config import RopeConfig
from exl.errors import KernelError, UnsupportedModelError
from exl.layout.arena import table_words
from exl.ops.base import AttentionSpec
from tests.host.backends import make_backend
from tests.model import attended
from tests.model.attended import HEAD_DIM, Attended, row_norms, sinks, spec_of
from tests.model.batches import batch_of
from tests.model.cuda_ops import Bench

ROPES = (RopeConfig(theta=10.0), RopeConfig(theta=1e6))
MODES = [("plain", 61), ("race", 86), ("asan", 86), ("race", 90)]


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}-{mode[1]}")
def backend(request):
    return make_backend(*request.param)


# q, k, v, probabilities and the output are rounded to f16: 2^-11 each of values up to about 8, and scores move by the
# rounding of q and k.
LIMIT = 0.02


def attend(bench: Bench, spec: AttentionSpec) -> Attended:
    return attended.attend(bench.ops, KVCache(bench.kv_layout, 2, bench.backend.device), bench.rng, spec)


def test_each_layer_has_its_own_rope(backend):
    bench = Bench(backend, rows=16, ropes=ROPES)
    for rope, other in (ROPES, ROPES[::-1]):
        a = attend(bench, spec_of(RopeConfig(theta=rope.theta)))  # equal, and another object
        assert a.largest_error(spec_of(rope)) < LIMIT
        assert a.largest_error(spec_of(other)) > 20 * LIMIT


def test_angles_have_places_that_were_planned():
    bench = Bench(make_backend("plain", 86), rows=16, ropes=ROPES)
    one = Bench(make_backend("plain", 86), rows=16)
    more = (table_words(bench.limits) - table_words(one.limits)) * 4
    tables = [b.arena.fields["tables"].num_bytes for b in (one, bench)]
    assert tables[1] - tables[0] == more >= 4 * 2 * 32 * HEAD_DIM // 2
    ids = [0] * 16
    bench.ops.stage([batch_of([(ids, 0, [0])]), batch_of([(ids, 16, [0])])])  # as many rows as a window has
    with pytest.raises(KernelError, match="RoPEs: found 1, but the tables of a window are made for 2"):
        type(bench.ops)(bench.backend, bench.target, bench.kv_layout, bench.limits, bench.arena, ROPES[:1], 2)


def test_a_rope_that_the_model_did_not_name_is_refused():
    bench = Bench(make_backend("plain", 86), rows=16, ropes=ROPES)
    with pytest.raises(UnsupportedModelError, match="theta 5, expected one of the model's: default, theta 10; default"):
        attend(bench, spec_of(RopeConfig(theta=5.0)))


def test_q_and_k_are_normalised_over_all_heads(backend):
    bench = Bench(backend, rows=16, ropes=ROPES)
    spec = spec_of(**row_norms(bench.rng, backend.device))
    a = attend(bench, spec)
    assert a.largest_error(spec) < LIMIT
    assert a.largest_error(spec_of()) > 20 * LIMIT


def test_norms_of_another_kind_are_other_launches():
    """With the same weights and epsilons: what was recorded for one kind is not launched for the other."""
    bench = Bench(make_backend("plain", 86), rows=16, ropes=ROPES)
    spec = spec_of(**row_norms(bench.rng, bench.backend.device))
    layer = replace(spec, q_norm=replace(spec.q_norm, kind="layer"), k_norm=replace(spec.k_norm, kind="layer"))
    for each in (spec, layer, spec, layer):
        bench.rng = np.random.default_rng(8)
        found = attend(bench, each)
        assert (found.largest_error(spec) < LIMIT) == (each is spec)


def test_a_sink_takes_its_part_of_the_weights(backend):
    bench = Bench(backend, rows=16, ropes=ROPES)
    spec = spec_of(sinks=sinks(bench.rng, backend.device))
    a = attend(bench, spec)
    assert a.largest_error(spec) < LIMIT
    assert a.largest_error(spec_of()) > 20 * LIMIT
