"""Rounding a dense head: every weight is within half a step of the file's, and the model changes little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import exl
from exl.formats.matrix import DenseMatrix
from exl.formats.rounding import round_to_nearest, rounding_group

STORIES = Path(__file__).parents[2] / "data" / "stories2M"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_off_by_more_than_half_a_step(bits, dtype):
    rng = np.random.default_rng(bits)
    rows = (rng.standard_normal((70, 256)) * 0.1).astype(np.float32)
    rows[0, :128] = 0  # a group of zeros
    rows[1] = np.abs(rows[1]) + 1  # all positive
    stored = {"f32": rows, "f16": rows.astype(np.float16), "bf16": (rows.view(np.uint32) >> 16).astype(np.uint16)}[
        dtype
    ]
    exact = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else stored.astype(np.float32)
    matrix = round_to_nearest(DenseMatrix(dtype, 256, 70, None, None, lambda a, b: stored[a:b]), bits, 128)
    scales = np.repeat(matrix.scales.astype(np.float64), 128, axis=0)
    zeros = np.repeat(matrix.zeros.astype(np.float64), 128, axis=0)
    codes = np.concatenate([matrix.codes(0, 33), matrix.codes(33, 70)], axis=1)
    assert codes.max() <= 2**bits - 1
    weights = scales * (codes - zeros)
    # Zero is rounded to a code as well, which shifts the range by up to half a step: the last code may be that far off.
    assert (np.abs(weights - exact.T) <= scales * 1.001).all()
    assert (np.abs(weights - exact.T) <= scales * 0.501).mean() > 0.99
    assert (weights[:128, 0] == 0).all()


@pytest.mark.parametrize(("K", "group"), [(256, 128), (192, 64), (96, 32), (40, 40)])
def test_groups(K, group):
    assert rounding_group(K) == group


@pytest.mark.parametrize(("head", "limit"), [(8, 1e-4), (4, 2e-2)])
def test_a_rounded_head_costs_little(head, limit):
    """Mean KL over a text of the next-token distributions. In the file the embedding is also the head; as embedding it
    stays unrounded."""
    with exl.load(STORIES, kv_cache="f32") as llm:
        ids = llm.encode("Once upon a time, there was a little dog who lived in a big red house.")
        exact = torch.log_softmax(llm.logits(ids).double(), -1)
        full = llm.plan.num_bytes
    with exl.load(STORIES, kv_cache="f32", head=head) as llm:
        other = torch.log_softmax(llm.logits(ids).double(), -1)
        assert llm.plan.num_bytes != full
    divergence = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert 0 < divergence < limit


def test_heads_that_nobody_has():
    for head in (3, "8", True, None):
        with pytest.raises(exl.ConfigError, match="head: found"):
            exl.load(STORIES, head=head)
