"""Decode attention over pages against torch's ``scaled_dot_product_attention``: part of ``benchmarks/kernels.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.machine import Machine, share
from benchmarks.report import Measurement, Section
from benchmarks.timing import Timer
from exl.batch import PAGE_SIZE
from exl.kernels.attention_decode import (
    DecodeScratch,
    DecodeTables,
    attention_decode,
    first_parts,
    num_items,
    scratch_shapes,
)
from exl.kernels.attention_io import AttentionParams, QkvRows
from exl.kernels.launch import Backend
from exl.layout.pages import KINDS, PageLayout


@dataclass(frozen=True)
class Shape:
    """Shape of one layer's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = (Shape("7B", 32, 32, 128), Shape("8B", 32, 8, 128))
DEPTHS = (1024, 4096, 32768)  # tokens of a sequence, the new one included
BATCHES = (1, 4, 16)
REPEATS = 9  # few, because the longest reads take milliseconds


@dataclass(frozen=True)
class Step:
    """A decode step's inputs: one new token per sequence of ``depth`` tokens; random pages in random order."""

    shape: Shape
    layout: PageLayout
    depth: int
    rows: QkvRows  # f16 [B, (H + 2 Hkv) * D]
    tables: DecodeTables
    pages: torch.Tensor  # u8 [pages, Hkv, bytes]
    out: torch.Tensor  # f16 [B, H * D]
    scratch: DecodeScratch

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that the launch must read."""
        return self.pages.numel()

    def run(self, backend: Backend) -> None:
        attention_decode(
            backend, self.layout, self.rows, self.tables, self.pages, self.out, self.scratch,
            AttentionParams(self.shape.head_dim**-0.5),
        )  # fmt: skip


def make_step(shape: Shape, kind: str, depth: int, batch: int, device: torch.device) -> Step:
    H, Hkv, D = shape.num_heads, shape.num_kv_heads, shape.head_dim
    layout, pages_each = PageLayout(kind, D), -(-depth // PAGE_SIZE)
    table = torch.randperm(batch * pages_each, device=device).to(torch.int32).reshape(batch, pages_each)
    last = depth - 1
    lengths = np.full(batch, depth, np.int32)
    tables = DecodeTables(
        torch.arange(batch + 1, dtype=torch.int32, device=device),
        torch.from_numpy(lengths).to(device),
        table,
        table[:, last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE,
        torch.from_numpy(first_parts(lengths, batch)).to(device),
        most_items=batch * num_items(depth),
        max_context=depth,
    )
    pages = torch.empty(batch * pages_each, Hkv, layout.num_bytes, dtype=torch.uint8, device=device)
    pages.random_(0, 0x3C)  # as halves below 1
    angles = torch.full((batch, D // 2), 0.5**0.5, device=device)  # cosine and sine alike
    sizes = scratch_shapes(batch, tables.most_items, H, Hkv, D)
    return Step(
        shape, layout, depth,
        QkvRows(torch.randn(batch, (H + 2 * Hkv) * D, device=device).half(), angles, angles),
        tables, pages,
        torch.empty(batch, H * D, dtype=torch.float16, device=device),
        DecodeScratch(
            torch.empty(sizes["partial"][1], device=device),
            torch.zeros(sizes["arrived"][1], dtype=torch.int32, device=device),
        ),
    )  # fmt: skip


def exl_us(backend: Backend, timer: Timer, shape: Shape, kind: str, depth: int, batch: int) -> tuple[float, int] | None:
    """Time of a launch and the bytes of its pages; None if this GPU has no room for them."""
    try:
        step = make_step(shape, kind, depth, batch, backend.device)
        return timer.median_us(lambda: step.run(backend), REPEATS), step.page_bytes
    except torch.cuda.OutOfMemoryError:
        return None


def torch_us(timer: Timer, shape: Shape, depth: int, batch: int, device: torch.device) -> float | None:
    """Time of torch's attention of one token over a contiguous f16 cache; None if there is no room for it."""
    try:
        q = torch.randn(batch, shape.num_heads, 1, shape.head_dim, dtype=torch.float16, device=device)
        size = (batch, shape.num_kv_heads, depth, shape.head_dim)
        k, v = (torch.randn(size, dtype=torch.float16, device=device) for _ in range(2))
        grouped = shape.num_heads != shape.num_kv_heads
        attend = torch.nn.functional.scaled_dot_product_attention
        return timer.median_us(lambda: attend(q, k, v, enable_gqa=grouped), REPEATS)
    except torch.cuda.OutOfMemoryError:
        return None


def attention_row(machine: Machine, shape: Shape, kind: str, depth: int, batch: int) -> str:
    head = f"| {shape.name} {shape.num_heads} / {shape.num_kv_heads} | {depth} | {batch} | {kind} |"
    timer = machine.timer()
    found = exl_us(machine.backend, timer, shape, kind, depth, batch)
    if found is None:
        return f"{head} no room | - | - |"
    us, num_bytes = found
    peer = torch_us(timer, shape, depth, batch, machine.device)
    ratio = "-" if peer is None else f"{peer / us:.2f}"
    return f"{head} {us:.1f} | {share(num_bytes, us / 1e6, machine.read_roof())} | {ratio} |"


def attention_section(
    machine: Machine,
    shapes: Sequence[Shape] = SHAPES,
    depths: Sequence[int] = DEPTHS,
    batches: Sequence[int] = BATCHES,
    seconds: float = 200,
) -> Section:
    return Section(
        "Decode attention",
        (
            "One new token a sequence, appended in the same launch. Share: bytes of pages by the time, against the",
            "roof. Ratio to `scaled_dot_product_attention`, contiguous f16: above 1, exl is faster.",
            "",
            "| heads / kv heads | depth | batch | cache | us | share of the roof | vs torch, f16 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ),
        seconds,
        tuple(
            Measurement(
                f"{shape.name} {kind}, depth {depth}, batch {batch}",
                partial(attention_row, machine, shape, kind, depth, batch),
            )
            for shape in shapes
            for depth in depths
            for batch in batches
            for kind in KINDS
        ),
    )
