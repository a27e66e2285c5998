"""Logits -> token ids on the device (``sample.cu``): what ``exl.sampling.sample`` does, without bringing logits to the
host.

A step: ``pack_tables`` on the host, one copy of its bytes, ``tables_at`` once for the buffer that they are copied to,
``sample`` (two launches).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import SamplingBatch
from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.samples import MAX_ROWS, NUM_BINS, PART, ROW, scratch_shapes, table_bytes
from exl.logarithm import natural_log

NUM_THREADS = 512
MAX_VOCAB = 2**19
TOP_BYTES = NUM_THREADS // 32 * 8 + PART // 32 * 4  # kTopBytes
DRAW_BYTES = 2 * 3 * 4 * NUM_BINS + 3 * 8 * NUM_THREADS + NUM_THREADS // 32 * 16 + 72  # kDrawBytes


@dataclass(frozen=True)
class SampleTables:
    """What the rows of a step ask for, on the device: views of one buffer."""

    params: torch.Tensor  # u8 [R, 56]: ROW
    seen_ids: torch.Tensor  # i32 [S]


@dataclass(frozen=True)
class SampleScratch:
    """What blocks hand over: see ``scratch_shapes``."""

    tops: torch.Tensor  # i64
    seen: torch.Tensor  # i32
    bin_counts: torch.Tensor  # i32, zero; the kernel leaves it zero
    bin_weights: torch.Tensor  # i64, zero; likewise
    arrived: torch.Tensor  # i32, zero; likewise


def pack_tables(batch: SamplingBatch, num_rows: int, max_seen: int, vocab_size: int) -> NDArray[np.uint8]:
    """A batch as bytes, for one copy to the start of a buffer of ``table_bytes(num_rows, max_seen)``: what the kernel
    reads of it, often less.

    Rows beyond the batch's are greedy: a graph may have more rows than a step. Earlier tokens of rows without a
    repetition penalty are left out. Raises ``KernelError`` that names the first row and value that is wrong: the device
    believes them.
    """
    count = len(batch.temperature)
    if not 0 <= count <= num_rows:
        raise KernelError(f"sample: a batch of {count} rows: expected {num_rows} or fewer")
    _check_values(batch, count)
    params = np.zeros(num_rows, dtype=ROW)
    params["penalty"] = 1.0
    params["log_min_p"] = -np.inf
    seen_ids, num_seen = [np.empty(0, dtype=np.int32)], 0
    for i in range(count):
        row = params[i]
        temperature, top_p, min_p = float(batch.temperature[i]), float(batch.top_p[i]), float(batch.min_p[i])
        row["uniform"] = int(float(batch.uniform[i]) * 2.0**64)
        row["top_p"] = max(1, math.ceil(top_p * 2.0**64)) if top_p < 1.0 else 0
        row["log_min_p"] = natural_log(min_p) if min_p > 0.0 else -math.inf
        row["temperature"], row["top_k"] = temperature, batch.top_k[i]
        span = slice(batch.adjust_start[i], batch.adjust_start[i + 1])
        seen, factors = batch.adjust_id[span], batch.adjust_factor[span]
        row["penalty"] = factors[0] if len(seen) else 1.0
        if temperature > 0.0:  # where the scale is no f32, what is not equal to the largest logit weighs nothing anyway
            scale = min(math.log2(math.e) / temperature, float(np.finfo(np.float32).max))
            row["scale_hi"] = scale
            row["scale_lo"] = scale - float(row["scale_hi"])
        if len(seen) and (seen.min() < 0 or seen.max() >= vocab_size):
            raise KernelError(f"sample: draw {i}: found an adjusted token id outside 0 to {vocab_size - 1}")
        row["seen_start"], row["seen_stop"] = num_seen, num_seen + len(seen)
        seen_ids.append(seen)
        num_seen += len(seen)
    if num_seen > max_seen:
        raise KernelError(f"sample: {num_seen} seen token ids in all: expected {max_seen} or fewer")
    return np.concatenate([params.view(np.uint8), np.concatenate(seen_ids).astype("<i4").view(np.uint8)])


def _check_values(batch: SamplingBatch, count: int) -> None:
    ranges = (  # as SamplingParams has them: the kernel's arithmetic is proven for these
        ("temperature", lambda x: 0.0 <= x <= 100.0, "0 to 100"),
        ("top_k", lambda x: x >= 0, "0 or more"),
        ("top_p", lambda x: 0.0 <= x <= 1.0, "0 to 1"),  # 0: a number too small for f32
        ("min_p", lambda x: 0.0 <= x <= 1.0, "0 to 1"),
        ("uniform", lambda x: 0.0 <= x < 1.0, "0 to 1, below 1"),
    )
    for name, allowed, expected in ranges:
        values = getattr(batch, name)
        if values.shape != (count,):
            raise KernelError(f"sample: {name} has shape {values.shape}: expected ({count},)")
        for i, value in enumerate(values.tolist()):
            if not allowed(value):
                raise KernelError(f"sample: row {i}: {name} is {value}: expected {expected}")
    for i, factor in enumerate(batch.adjust_factor.tolist()):
        if not 0.0 < factor < math.inf:
            raise KernelError(f"sample: adjustment {i}: factor is {factor}: expected a finite number above 0")
    starts = batch.adjust_start
    rising = starts.shape == (count + 1,) and starts[0] >= 0 and (np.diff(starts) >= 0).all()
    if not rising or starts[-1] > len(batch.adjust_id):
        raise KernelError(
            f"sample: adjust_start is {starts.tolist()}:"
            f" expected {count + 1} rising numbers up to {len(batch.adjust_id)}"
        )


def tables_at(buffer: torch.Tensor, num_rows: int, max_seen: int) -> SampleTables:
    """Views of a u8 tensor of ``table_bytes(num_rows, max_seen)`` bytes, aligned to 8. Raises ``KernelError``."""
    if not isinstance(buffer, torch.Tensor):
        raise KernelError(f"tables: expected a tensor, found {type(buffer).__name__}")
    check_tensor("tables", buffer, (torch.uint8,), (table_bytes(num_rows, max_seen),), buffer.device, 8)
    end = num_rows * ROW.itemsize
    return SampleTables(buffer[:end].view(num_rows, ROW.itemsize), buffer[end : end + 4 * max_seen].view(torch.int32))


def sample(
    backend: Backend,
    logits: torch.Tensor,
    tables: SampleTables,
    samples: torch.Tensor,
    scratch: SampleScratch,
    *,
    dependent: bool = False,
) -> None:
    """samples i32 [R] = a token for each row of logits f32 [R, V], as ``tables`` ask for it. Logits stay as they are.

    R is 1 to 64, V 1 to 2^19; ``tables`` and ``scratch`` may be for more rows. A row without a distribution gets a
    negative code (``exl.batch``), which ``embed`` reads as no token. Two launches, whose geometry
    depends on R and V alone; all else is read on the device. A row's token depends on that row and nothing else.

    It is ``exl.sampling.sample``'s, unless the draw lies within V 2^-43 / m of a border of the cumulated distribution,
    or top-p's share does; m is what the kept tokens weigh in units of the likeliest, 1 or more (V = 128,000: within
    1.5e-8). Among logits that differ, but are equally far from the largest in f64, the larger goes first here and the
    lower id there. Raises ``KernelError``.
    """
    device = backend.device
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise KernelError(f"logits: expected [R, V], found {getattr(logits, 'shape', type(logits))}")
    num_rows, vocab_size = logits.shape
    if not 1 <= num_rows <= MAX_ROWS or not 1 <= vocab_size <= MAX_VOCAB:
        raise KernelError(f"logits has shape {tuple(logits.shape)}: expected 1 to {MAX_ROWS} rows of 1 to {MAX_VOCAB}")
    check_tensor("logits", logits, (torch.float32,), (num_rows, vocab_size), device)
    check_tensor("samples", samples, (torch.int32,), (num_rows,), device)
    check_tensor("tables.seen_ids", tables.seen_ids, (torch.int32,), (tables.seen_ids.numel(),), device)
    rows = len(tables.params) if isinstance(tables.params, torch.Tensor) else 0
    check_tensor("tables.params", tables.params, (torch.uint8,), (max(rows, num_rows), ROW.itemsize), device, 8)
    shapes = scratch_shapes(num_rows, vocab_size)
    for field in fields(scratch):
        tensor = getattr(scratch, field.name)
        kind, least = shapes[field.name]
        dtype = {"i32": torch.int32, "i64": torch.int64}[kind]
        check_tensor(f"scratch.{field.name}", tensor, (dtype,), (tensor.numel(),), device, tensor.element_size())
        if tensor.numel() < least:
            raise KernelError(f"scratch.{field.name} has {tensor.numel()} elements: expected {least} or more")
    grid = (-(-vocab_size // PART), num_rows)
    top, draw = (backend.load(KernelSpec("sample.cu", entry, {}, backend.arch)) for entry in ENTRIES)
    args = [ptr(logits), ptr(tables.params), ptr(tables.seen_ids), ptr(scratch.tops), ptr(scratch.seen)]
    launch(top, grid, (NUM_THREADS,), [*args, i32(vocab_size)], TOP_BYTES, dependent=dependent)
    args = [ptr(logits), ptr(tables.params), ptr(scratch.tops), ptr(scratch.seen), ptr(scratch.bin_counts)]
    args += [ptr(scratch.bin_weights), ptr(scratch.arrived), ptr(samples), i32(vocab_size)]
    launch(draw, grid, (NUM_THREADS,), args, DRAW_BYTES, dependent=dependent)


ENTRIES = ("sample_top", "sample_draw")


def variants(arch: int) -> Iterator[Variant]:
    for entry in ENTRIES:
        yield Variant(KernelSpec("sample.cu", entry, {}, arch))
