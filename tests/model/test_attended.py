"""Attention on the CPU as families want it, against float64: norms of whole rows, sinks. Each, taken out, is seen."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from exl.cache.kv import KVCache
from exl.errors import UnsupportedModelError
from exl.layout.cpu_steps import compiled_sizes
from exl.layout.kv import DeviceKVLayout, KVLayout
from exl.layout.layers import layer_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, Target
from exl.layout.steps import StepLimits
from exl.ops import torch_attention
from exl.ops.base import Norm, Ops
from exl.ops.torch_ops import TorchOps
from tests.model.attended import CONTEXT, HEAD_DIM, HEADS, KV_HEADS, QKV_WIDTH, WIDTH, attend, row_norms, sinks, spec_of
from tests.model.cpu_targets import with_both

ROWS = 16
# f32 sums over 24 channels and 9 tokens; quantized caches keep scales of f16 and codes of 8 bits: half a step of 1/127
# of a group's largest value, in K and V.
LIMITS = {"f32": 2e-5, "f16": 0.02, "q8": 0.15}


def make_ops(target: Target, kv_kind: str, stack: ExitStack) -> Ops:
    limits = StepLimits(ROWS, ROWS, 1, 64, 8, QKV_WIDTH, WIDTH, 8, 8, HEAD_DIM, max_sequences=ROWS)
    if not target.compiled:
        return TorchOps(target, KVLayout(kv_kind, 2, KV_HEADS, HEAD_DIM), limits)
    from exl.cpu_kernels.library import shared_library
    from exl.cpu_kernels.pool import Pool
    from exl.ops.compiled_ops import CompiledOps

    head = layer_layout(BlobSpec((), (("head", (LinearSpec((MatrixSpec("head", 8, 8, 32, "f32"),)),)),)), target)
    sizes, layout = compiled_sizes([], limits, "f32", head), DeviceKVLayout(kv_kind, 2, KV_HEADS, HEAD_DIM)
    ops = CompiledOps(Pool(shared_library(), 2), target, layout, limits, sizes, "f32")
    stack.callback(ops.close)
    return ops


@pytest.fixture
def made(cpu):
    """A function: type of the cache -> operations, their cache, a source of numbers, the same in each test."""
    with ExitStack() as stack:

        def make(kind: str = "f32") -> tuple[Ops, KVCache, np.random.Generator]:
            ops = make_ops(cpu, kind, stack)
            return ops, KVCache(ops.kv_layout, 2, ops.device), np.random.default_rng(4)

        yield make


@with_both
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"softcap": 5.0}], ids=str)
def test_a_sink_takes_its_part_of_the_weights(made, cpu, kind, changes):
    ops, kv, rng = made(kind)
    spec = spec_of(sinks=sinks(rng, ops.device), **changes)
    found = attend(ops, kv, rng, spec)
    assert found.largest_error(spec) < LIMITS[kind]
    assert found.largest_error(replace(spec, sinks=None)) > 5 * LIMITS[kind]


@pytest.mark.parametrize("changes", [{"window": 4}, {"softcap": 5.0}], ids=str)
def test_scores_of_a_long_prompt_are_computed_some_rows_at_a_time(changes, monkeypatch):
    """Those of 128 rows of a large model over a long context would take gigabytes."""
    rng, most, sizes, softmax = np.random.default_rng(4), 2 * HEADS * CONTEXT, [], torch.softmax
    monkeypatch.setattr(torch_attention, "SCORES", most)
    monkeypatch.setattr(torch, "softmax", lambda x, **options: sizes.append(x.numel()) or softmax(x, **options))
    with ExitStack() as stack:
        ops = make_ops(Target("cpu"), "f32", stack)
        spec = spec_of(sinks=sinks(rng, ops.device), **changes)
        found = attend(ops, KVCache(ops.kv_layout, 2, ops.device), rng, spec)
    assert found.largest_error(spec) < LIMITS["f32"]
    assert most / 2 < max(sizes) <= most + 2 * HEADS  # with the sinks
    assert len(sizes) == 2 * (CONTEXT - 1) // 2 + 2


@with_both
@pytest.mark.parametrize("kind", LIMITS)
def test_q_and_k_are_normalised_over_all_heads(made, cpu, kind):
    ops, kv, rng = made(kind)
    spec = spec_of(**row_norms(rng, ops.device))
    found = attend(ops, kv, rng, spec)
    assert found.largest_error(spec) < LIMITS[kind]
    assert found.largest_error(spec_of()) > 5 * LIMITS[kind]
    by_heads = {name: Norm(getattr(spec, name).weight[:HEAD_DIM].contiguous(), 1e-5) for name in ("q_norm", "k_norm")}
    rng = np.random.default_rng(4)
    row_norms(rng, ops.device)  # so that the same q, k and v are drawn
    assert np.abs(attend(ops, kv, rng, spec_of(**by_heads)).out - found.out).max() > 5 * LIMITS[kind]


@with_both
def test_one_of_both_may_have_a_norm_of_rows(made, cpu):
    ops, kv, rng = made()
    both = row_norms(rng, ops.device)
    ones = {"q_norm": Norm(torch.ones(WIDTH), 1e-5), "k_norm": Norm(torch.ones(KV_HEADS * HEAD_DIM), 1e-5)}
    for name in ones:
        found = attend(ops, kv, np.random.default_rng(5), spec_of(**both | {name: None}))
        other = attend(ops, kv, np.random.default_rng(5), spec_of(**both | {name: ones[name]}))
        assert np.abs(found.out - other.out).max() > 0.01
    nothing = attend(ops, kv, np.random.default_rng(5), spec_of(norm_rows=True))
    assert nothing.largest_error(spec_of()) < LIMITS["f32"]


@with_both
def test_layer_norm_of_heads_is_computed_or_named(made, cpu):
    ops, kv, rng = made()
    spec = spec_of(q_norm=Norm(torch.ones(HEAD_DIM), 1e-5, "layer"))
    if cpu.compiled:
        with pytest.raises(UnsupportedModelError, match="found LayerNorm, the CPU's kernels have RMSNorm"):
            attend(ops, kv, rng, spec)
        return
    found = attend(ops, kv, rng, spec)
    q = found.qkv[..., :WIDTH].reshape(2, -1, WIDTH // HEAD_DIM, HEAD_DIM)
    q -= q.mean(-1, keepdims=True)
    q /= np.sqrt((q**2).mean(-1, keepdims=True) + 1e-5)
    assert found.largest_error(spec_of()) < LIMITS["f32"]
