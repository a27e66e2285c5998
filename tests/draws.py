"""Batches of draws for tests of samplers, without an engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from exl.batch import SamplingBatch
from exl.engine.draws import draw_row, sampling_batch
from exl.sampling_params import SamplingParams


def draws_of(rows: Sequence[tuple[SamplingParams, int, Collection[int]]], vocab_size: int = 1) -> SamplingBatch:
    """Draw i reads row i: (parameters, step, ids of earlier tokens), which may repeat."""
    draws = [draw_row(params, step, seen)._replace(row=i) for i, (params, step, seen) in enumerate(rows)]
    return sampling_batch(draws, vocab_size)
