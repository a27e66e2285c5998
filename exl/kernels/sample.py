"""Logits -> token ids on the device (``sample.cu``): what ``exl.sampling.sample`` does, without bringing logits to the
host.

A step: for each launch ``sample_tables.pack_tables`` on the host, one copy of its bytes, and ``sample`` (two kernels);
then a copy back of the ids and, where it is asked for, of what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from exl.errors import KernelError
from exl.kernels.args import i32, ptr
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.samples import MAX_ROWS, NUM_BINS, PART, params_bytes, scratch_shapes, table_bytes

NUM_THREADS = 512
NUM_WARPS = NUM_THREADS // 32
MAX_VOCAB = 2**19
TOP_BYTES = 5 * 8 * NUM_WARPS + PART // 32 * 8  # kTopBytes
DRAW_BYTES = 2 * 3 * 4 * NUM_BINS + 3 * 8 * NUM_THREADS + NUM_WARPS * 16 + 104  # kDrawBytes
_DTYPES = {"i32": torch.int32, "i64": torch.int64, "f32": torch.float32}


@dataclass(frozen=True)
class SampleTables:
    """What the rows of a launch ask for, on the device: as ``pack_tables`` writes it."""

    buffer: torch.Tensor  # u8 [table_bytes(num_rows, V)]
    num_rows: int  # of the largest launch


@dataclass(frozen=True)
class SampleScratch:
    """What blocks hand over, and what they tell besides ids: see ``scratch_shapes``."""

    parts: torch.Tensor  # i64
    words: torch.Tensor  # i64
    values: torch.Tensor  # f32
    bin_counts: torch.Tensor  # i32, zero; the kernel leaves it zero
    bin_weights: torch.Tensor  # i64, zero; likewise
    arrived: torch.Tensor  # i32, zero; likewise
    results: torch.Tensor  # i64: RESULT for each row of the launch
    ranked: torch.Tensor  # i64: MAX_RANKED times RANKED for each row


def sample(
    backend: Backend,
    logits: torch.Tensor,
    tables: SampleTables,
    samples: torch.Tensor,
    scratch: SampleScratch,
    num_rows: int,
    *,
    dependent: bool = False,
) -> None:
    """What the ``num_rows`` rows of a launch ask for in ``tables``: draws from rows of logits f32 [L, V], whose tokens
    go to samples i32, and rows of logits that are measured. Logits stay as they are.

    1 to 64 rows, V 1 to 2^19; ``tables`` and ``scratch`` may be for more rows. A row without a distribution gets a
    negative code (``exl.batch``), which ``embed`` reads as no token. Two kernels, whose geometry depends on the number
    of rows and V alone; all else is read on the device. A token depends on its draw and that row of logits alone.

    It is ``exl.sampling.sample``'s, unless the draw lies within V 2^-43 / m of a border of the cumulated distribution,
    or the share of a filter does; m is what the kept tokens weigh in units of the likeliest, 1 or more (V = 128,000:
    within 1.5e-8). Among logits that differ, but are equally far from the largest in f64, the larger goes first here
    and the lower id there. Top-n-sigma's standard deviation is within 2^-16 of the exact one for logits within +-256,
    and of logits clamped to +-8192. Raises ``KernelError``.
    """
    device = backend.device
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise KernelError(f"logits: expected [L, V], found {getattr(logits, 'shape', type(logits))}")
    vocab_size = logits.shape[1]
    if len(logits) == 0 or not 1 <= vocab_size <= MAX_VOCAB:
        raise KernelError(f"logits has shape {tuple(logits.shape)}: expected rows of 1 to {MAX_VOCAB}")
    if not 1 <= num_rows <= min(MAX_ROWS, tables.num_rows):
        raise KernelError(f"a launch of {num_rows} rows: expected 1 to {min(MAX_ROWS, tables.num_rows)}")
    check_tensor("logits", logits, (torch.float32,), tuple(logits.shape), device)
    check_tensor("samples", samples, (torch.int32,), (samples.numel(),), device)
    size = table_bytes(tables.num_rows, vocab_size)
    check_tensor("tables", tables.buffer, (torch.uint8,), (size,), device, 16)
    for name, (dtype, least) in scratch_shapes(num_rows, vocab_size).items():
        tensor = getattr(scratch, name)
        check_tensor(f"scratch.{name}", tensor, (_DTYPES[dtype],), (tensor.numel(),), device, tensor.element_size())
        if tensor.numel() < least:
            raise KernelError(f"scratch.{name} has {tensor.numel()} elements: expected {least} or more")
    grid = (-(-vocab_size // PART), num_rows)
    top, draw = (backend.load(KernelSpec("sample.cu", entry, {}, backend.arch)) for entry in ENTRIES)
    params, adjustments = ptr(tables.buffer), ptr(tables.buffer[params_bytes(tables.num_rows) :])
    masks, handed = ptr(tables.buffer), {field.name: ptr(getattr(scratch, field.name)) for field in fields(scratch)}
    between = [handed[name] for name in ("parts", "words", "values")]
    args = [ptr(logits), params, adjustments, masks, *between, i32(vocab_size)]
    launch(top, grid, (NUM_THREADS,), args, TOP_BYTES, dependent=dependent)
    counters = [handed[name] for name in ("bin_counts", "bin_weights", "arrived")]
    args = [ptr(logits), params, masks, *between, *counters, ptr(samples), handed["results"], handed["ranked"]]
    launch(draw, grid, (NUM_THREADS,), [*args, i32(vocab_size)], DRAW_BYTES, dependent=dependent)


ENTRIES = ("sample_top", "sample_draw")


def variants(arch: int) -> Iterator[Variant]:
    for entry in ENTRIES:
        yield Variant(KernelSpec("sample.cu", entry, {}, arch))
