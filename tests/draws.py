"""Batches of draws for tests of samplers, without an engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from exl.batch import SamplingBatch
from exl.engine.draws import DrawRow, DrawState, sampling_batch
from exl.philox import uniform
from exl.sampling_params import SamplingParams


def draw_of(params: SamplingParams, step: int = 0, seen: Collection[int] = (), row: int = 0) -> DrawRow:
    """The draw of step ``step`` after a prompt of the tokens ``seen``. XTC's coin is that of step 0."""
    draw = DrawState(params, list(seen), frozenset(), 2**31).row(row)
    return (
        draw if params.temperature == 0.0 or params.seed is None else draw._replace(uniform=uniform(params.seed, step))
    )


def draws_of(rows: Sequence[tuple[SamplingParams, int, Collection[int]]], vocab_size: int = 1) -> SamplingBatch:
    """Draw i reads row i: (parameters, step, ids of earlier tokens), which may repeat."""
    return sampling_batch([draw_of(*asked, row=i) for i, asked in enumerate(rows)], vocab_size)
