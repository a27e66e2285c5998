"""Draws through ``sample.cu``, without an engine."""

from __future__ import annotations

import numpy as np
import torch

from exl.batch import SamplingBatch
from exl.kernels.launch import Backend
from exl.kernels.sample import SampleScratch, SampleTables, sample
from exl.kernels.sample_tables import check_batch, launch_rows, pack_tables
from exl.layout.samples import scratch_shapes, table_bytes

DTYPES = {"i32": torch.int32, "i64": torch.int64, "f32": torch.float32}
INF = float("inf")
CPU = torch.device("cpu")

COLUMNS = ("row", "uniform", "temperature", "dynamic_range", "dynamic_exponent", "temperature_last", "top_n_sigma")
COLUMNS += ("top_k", "typical_p", "top_p", "min_p", "mirostat_mu", "xtc_threshold", "mask_idx", "num_logprobs")
ADJUSTMENTS = ("adjust_id", "adjust_bias", "adjust_factor", "adjust_subtract")


def scratch_for(num_rows: int, vocab_size: int, device: torch.device = CPU) -> SampleScratch:
    shapes = scratch_shapes(num_rows, vocab_size)
    return SampleScratch(**{name: torch.zeros(n, dtype=DTYPES[t], device=device) for name, (t, n) in shapes.items()})


def packed(batch: SamplingBatch, num_rows: int, vocab_size: int) -> np.ndarray:
    """Tables of all draws as one launch; bytes that are not written are no zeros."""
    checked = check_batch(batch, int(batch.row.max()) + 1, vocab_size)
    out = np.full(table_bytes(num_rows, vocab_size), 255, np.uint8)
    (rows,) = launch_rows(checked, np.zeros(len(batch.row), np.bool_), num_rows)
    pack_tables(checked, rows, num_rows, vocab_size, out)
    return out


def draw(backend: Backend, logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    """Ids of one launch; no log-probabilities."""
    R, V = len(batch.row), logits.shape[1]
    scratch = scratch_for(R, V, backend.device)
    samples = torch.full((R,), -99, dtype=torch.int32, device=backend.device)
    tables = SampleTables(torch.from_numpy(packed(batch, R, V)).to(backend.device), R)
    sample(backend, logits.to(backend.device), tables, samples, scratch, R)
    for counter in (scratch.bin_counts, scratch.bin_weights, scratch.arrived):
        assert not counter.any()
    return samples.tolist()


def one_row(batch: SamplingBatch, i: int, **changed: float) -> SamplingBatch:
    """Draw i alone, from row 0."""
    values = {name: getattr(batch, name)[i : i + 1].copy() for name in COLUMNS}
    for name, value in {"row": 0, **changed}.items():
        values[name][:] = value
    span = slice(batch.adjust_start[i], batch.adjust_start[i + 1])
    values |= {name: getattr(batch, name)[span] for name in ADJUSTMENTS}
    return SamplingBatch(**values, adjust_start=np.array([0, span.stop - span.start], np.int32), masks=batch.masks)


def joined(rows: list[SamplingBatch]) -> SamplingBatch:
    """Draw i from row i; all with the masks of the first."""
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in (*COLUMNS, *ADJUSTMENTS)}
    arrays["row"] = np.arange(len(rows), dtype=np.int32)
    starts = np.cumsum([0, *(len(row.adjust_id) for row in rows)], dtype=np.int32)
    return SamplingBatch(**arrays, adjust_start=starts, masks=rows[0].masks)
