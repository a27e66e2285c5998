"""The input of one forward pass: plain integers, built on the host, the same for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 64  # tokens per page of the KV cache
MAX_STEP_TOKENS = 8  # new tokens of a sequence in a step: its last one, and drafts

I32 = NDArray[np.int32]


class LoraRun(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of a batch, which all have this adapter."""

    start: int
    stop: int
    adapter: int


@dataclass(frozen=True)
class ForwardBatch:
    """The new tokens of B sequences, T rows in all, ordered by sequence.

    Rows ``[0, num_decode_rows)`` run on row-invariant kernels: a row's result is bit for bit independent of the rest of
    the batch. They hold whole sequences. Padding rows have slot -1 and are neither cached nor attended.

    Example: one sequence with 70 cached tokens on pages 5 and 9, one new token::

        positions=[70]  slots=[9 * 64 + 6]  query_start=[0, 1]  context_len=[71]  page_table=[[5, 9]]
    """

    token_ids: I32  # [T]; -1-i: sample i of the previous step, which is still on the device
    positions: I32  # [T]; independent of slots, for context shift and draft trees
    slots: I32  # [T]; page * 64 + offset
    query_start: I32  # [B+1]; rows of sequence b are query_start[b]:query_start[b+1]
    context_len: I32  # [B]; new tokens included
    rope_len: I32  # [B]; length for length-dependent RoPE: in every chunk of a prompt, the whole prompt's
    page_table: I32  # [B, P]; a snapshot
    logit_rows: I32  # [R]; rows whose logits are wanted
    num_decode_rows: int
    # The same for layers that have a window and pages of their own, where others have none; None: there are none.
    window_slots: I32 | None = None
    window_table: I32 | None = None  # [B, P']
    lora_idx: I32 | None = None  # [B]; the number of a sequence's adapter, -1: none; None: none of any

    def places(self, windowed: bool) -> tuple[I32, I32]:
        """``slots`` and ``page_table`` of layers that keep all tokens, or of those with pages of their own."""
        if not windowed:
            return self.slots, self.page_table
        if self.window_slots is None or self.window_table is None:
            raise ValueError("a batch without pages for layers that have a window")
        return self.window_slots, self.window_table

    @cached_property
    def lora_runs(self) -> tuple[LoraRun, ...]:
        """Neighbouring rows with one adapter, in order; rows without one are in none."""
        runs: list[LoraRun] = []
        if self.lora_idx is None:
            return ()
        starts = self.query_start.tolist()
        for adapter, start, stop in zip(self.lora_idx.tolist(), starts, starts[1:], strict=False):
            if adapter < 0 or start == stop:
                continue
            if runs and runs[-1].stop == start and runs[-1].adapter == adapter:
                runs[-1] = LoraRun(runs[-1].start, stop, adapter)
            else:
                runs.append(LoraRun(start, stop, adapter))
        return tuple(runs)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)


def is_step(batch: ForwardBatch) -> bool:
    """Whether all are decode rows that want their logits, 1 to 8 of each sequence: the batches for which graphs are
    captured. A sequence's rows are its last token and the drafts that are to be verified after it."""
    num_new = np.diff(batch.query_start)
    return (
        batch.num_decode_rows == batch.num_rows == batch.query_start[-1] == len(batch.logit_rows)
        and int(num_new.min(initial=1)) > 0
        and int(num_new.max(initial=1)) <= MAX_STEP_TOKENS
        and bool((batch.logit_rows == np.arange(batch.num_rows)).all())
    )


def step_bucket(batch: ForwardBatch, max_rows: int, max_sequences: int, fewest_rows: int = 8) -> ForwardBatch:
    """The step in one of few shapes, so that few graphs serve all: rows and sequences padded to powers of two, or to
    what the buffers are made for. With drafts to ``fewest_rows``, as many as cost no more than one, or more.

    Rows of the padded step come first and have the same bits; its logits are those of all rows.
    """
    rows, sequences = (1 << (count - 1).bit_length() for count in (batch.num_rows, batch.num_sequences))
    if batch.num_rows == batch.num_sequences:
        rows = sequences = min(rows, max_rows, max_sequences)
    else:
        rows, sequences = min(max(rows, fewest_rows), max_rows), min(sequences, max_sequences)
    return padded_step(batch, max(rows, batch.num_rows), max(sequences, batch.num_sequences))


def padded_step(batch: ForwardBatch, num_rows: int, num_sequences: int | None = None) -> ForwardBatch:
    """The step with padding rows up to ``num_rows``, which belong to no sequence and are not cached, and sequences
    without rows up to ``num_sequences`` (None: as many as rows)."""
    more = num_rows - batch.num_rows
    empty = (num_rows if num_sequences is None else num_sequences) - batch.num_sequences
    if more == empty == 0:
        return batch
    rows, sequences = np.zeros(more, np.int32), np.zeros(empty, np.int32)
    return ForwardBatch(
        token_ids=np.concatenate([batch.token_ids, rows]),
        positions=np.concatenate([batch.positions, rows]),
        slots=np.concatenate([batch.slots, rows - 1]),
        window_slots=None if batch.window_slots is None else np.concatenate([batch.window_slots, rows - 1]),
        window_table=None if batch.window_table is None else _with_empty(batch.window_table, empty),
        query_start=np.concatenate([batch.query_start, sequences + batch.num_rows]),
        context_len=np.concatenate([batch.context_len, sequences]),
        rope_len=np.concatenate([batch.rope_len, sequences + 1]),
        page_table=_with_empty(batch.page_table, empty),
        logit_rows=np.arange(num_rows, dtype=np.int32),
        num_decode_rows=num_rows,
        lora_idx=None if batch.lora_idx is None else np.concatenate([batch.lora_idx, sequences - 1]),
    )


def _with_empty(table: I32, count: int) -> I32:
    """With ``count`` rows of zeros more."""
    return np.concatenate([table, np.zeros((count, table.shape[1]), np.int32)])


@dataclass(frozen=True)
class SamplingBatch:
    """How to draw R tokens from rows of logits. Arrays, so that one launch serves requests with different values.

    The order is fixed, and explained in ``exl.sampling_params.SamplingParams``: allowed tokens, bias, penalties,
    top-n-sigma, temperature, top-k, typical, top-p, min-p (or mirostat), XTC, one draw. ``temperature`` 0 takes the
    largest adjusted logit (ties: the lowest id) and ignores the filters.
    """

    row: I32  # [R]; the row of the logits that a draw reads: several draws may read one
    uniform: NDArray[np.float64]  # [R]; one draw from [0, 1), a function only of (seed, step)
    temperature: NDArray[np.float32]  # [R]; 0 is greedy
    dynamic_range: NDArray[np.float32]  # [R]; 0 is off; by entropy, from temperature - range to temperature + range
    dynamic_exponent: NDArray[np.float32]  # [R]
    temperature_last: NDArray[np.bool_]  # [R]; the filters see temperature 1
    top_n_sigma: NDArray[np.float32]  # [R]; 0 is off
    top_k: I32  # [R]; 0 is off
    typical_p: NDArray[np.float32]  # [R]; 1 is off
    top_p: NDArray[np.float32]  # [R]; 1 is off
    min_p: NDArray[np.float32]  # [R]; 0 is off
    mirostat_mu: NDArray[np.float64]  # [R]; bits; inf is off, else it replaces top_k to min_p
    xtc_threshold: NDArray[np.float32]  # [R]; above 0.5 is off: for this draw, whose coin the host has tossed
    adjust_start: I32  # [R+1]; draw r's adjustments are adjust_start[r]:adjust_start[r+1]
    adjust_id: I32  # [S]; of a draw: distinct, rising
    adjust_bias: NDArray[np.float32]  # [S]; l1 = l + bias
    adjust_factor: NDArray[np.float32]  # [S]; l2 = l1 * factor if l1 < 0 else l1 / factor
    adjust_subtract: NDArray[np.float32]  # [S]; l3 = l2 - subtract; inf forbids the token
    mask_idx: I32  # [R]; a row of masks; -1: every token is allowed
    masks: NDArray[np.uint32]  # [m, ceil(V / 32)]; bit i % 32 of word i // 32: whether token i is allowed
    num_logprobs: I32  # [R]; -1: none; n: of the drawn token and of the n likeliest, in the plain row's distribution

    @cached_property
    def takes_largest(self) -> bool:
        """Whether each draw is the largest logit of its row, and nothing else is asked for."""
        changed = len(self.adjust_id) or self.temperature.any() or (self.mask_idx >= 0).any()
        return not changed and not (self.num_logprobs >= 0).any()

    @cached_property
    def rows(self) -> list[int]:
        return self.row.tolist()


# What a drawn "id" says of a row that has no distribution.
NAN_LOGIT, INFINITE_LOGIT, NOTHING_ALLOWED = -1, -2, -3


@dataclass(frozen=True)
class SampleRows:
    """What R draws gave."""

    ids: list[int]  # [R]; NAN_LOGIT, INFINITE_LOGIT or NOTHING_ALLOWED: this row has no distribution
    surprise: list[float]  # [R]; with mirostat: -log2 of the drawn token's probability; else NaN
    # [R]; None where not asked for; (id, natural log-probability) of the drawn token, then of the likeliest
    ranked: list[tuple[tuple[int, float], ...] | None]
