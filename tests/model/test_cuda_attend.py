"""What families ask of a GPU's attention, on the host shim against float64: a RoPE of each layer. Each feature, taken
out, would be seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from exl.cache.kv import KVCache
from exl.checkpoint.rope_config import RopeConfig
from exl.errors import KernelError, UnsupportedModelError
from exl.layout.arena import table_words
from exl.ops.base import AttentionSpec
from tests.host.backends import make_backend
from tests.model.batches import batch_of
from tests.model.cuda_ops import HEAD_DIM, HEADS, KV_HEADS, QKV_WIDTH, WIDTH, Bench, f64
from tests.reference.attention_twin import attention, rotate

ROPES = (RopeConfig(theta=10.0), RopeConfig(theta=1e6))
MODES = [("plain", 61), ("race", 86), ("asan", 86), ("race", 90)]
CONTEXT = 9  # tokens of each sequence


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}-{mode[1]}")
def backend(request):
    return make_backend(*request.param)


@dataclass
class Attended:
    """Two sequences of ``CONTEXT`` tokens in layer 1: q, k and v of each as they were before RoPE, and what attention
    made of them. All but the last token came as a prompt (prefill kernels), the last in a decode step."""

    qkv: np.ndarray  # [2, CONTEXT, W]
    out: np.ndarray  # [2, CONTEXT, A]

    def parts(self) -> tuple[np.ndarray, ...]:
        """q, k, v as [2, CONTEXT, heads, D]."""
        shape = lambda x: x.reshape(*x.shape[:2], -1, HEAD_DIM)  # noqa: E731
        q, k, v = np.split(self.qkv, [WIDTH, WIDTH + KV_HEADS * HEAD_DIM], axis=-1)
        return shape(q), shape(k), shape(v)


def attend(bench: Bench, spec: AttentionSpec) -> Attended:
    ops = bench.ops
    kv = KVCache(bench.kv_layout, 2, bench.backend.device)
    qkv = bench.normal(2, CONTEXT, QKV_WIDTH, scale=2.0).half()
    found = []
    for new, cached in ((slice(0, CONTEXT - 1), 0), (slice(CONTEXT - 1, CONTEXT), CONTEXT - 1)):
        rows = qkv[:, new].reshape(-1, QKV_WIDTH)
        ids = [0] * (len(rows) // 2)
        ops.stage([batch_of([(ids, cached, [1]), (ids, cached, [0])], decode=cached > 0)])
        buffer, out = ops.buffer("qkv")[: len(rows)], ops.buffer("attn")[: len(rows)]
        buffer.copy_(rows)
        ops.attend(buffer, spec, 1, kv, out)
        found.append(f64(out).reshape(2, -1, WIDTH))
    return Attended(f64(qkv), np.concatenate(found, 1))


def expected(a: Attended, spec: AttentionSpec) -> np.ndarray:
    """[2, CONTEXT, A]."""
    places, rows = np.arange(CONTEXT), []
    for q, k, v in zip(*a.parts(), strict=True):
        q, k = (rotate(x, places, spec.rope.theta) for x in (q, k))
        rows.append(attention(q, k, v, places, spec.scale, spec.window, spec.softcap).reshape(CONTEXT, WIDTH))
    return np.stack(rows)


def largest_error(a: Attended, spec: AttentionSpec) -> float:
    return float(np.abs(a.out - expected(a, spec)).max())


# q, k, v, probabilities and the output are rounded to f16: 2^-11 each of values up to about 8, and scores move by the
# rounding of q and k.
LIMIT = 0.03


def spec_of(rope: RopeConfig = ROPES[0], **fields) -> AttentionSpec:
    values = {"scale": HEAD_DIM**-0.5, "window": None, "softcap": None, "q_norm": None, "k_norm": None}
    return AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, rope=rope, **values | fields)


def test_each_layer_has_its_own_rope(backend):
    bench = Bench(backend, rows=16, ropes=ROPES)
    for rope, other in (ROPES, ROPES[::-1]):
        a = attend(bench, spec_of(RopeConfig(theta=rope.theta)))  # equal, and another object
        assert largest_error(a, spec_of(rope)) < LIMIT
        assert largest_error(a, spec_of(other)) > 20 * LIMIT


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
