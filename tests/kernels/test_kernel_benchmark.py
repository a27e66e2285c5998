"""The parts of ``benchmarks/kernels.py`` that need no GPU: its kernels, its weights, its word where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from benchmarks import kernels as benchmark
from exl.kernels.args import ptr, u64
from exl.kernels.attention_decode import check_tables
from exl.kernels.launch import launch
from exl.kernels.linear import check_weight
from exl.kernels.page_layout import KINDS, PageLayout
from exl.kernels.spec import KernelSpec
from exl.kernels.tile_layout import TileLayout
from tests.host.backends import make_backend

SOURCES = Path(benchmark.__file__).resolve().parent / "cuda"


def test_the_roofs_kernels_stay_in_bounds() -> None:
    backend = make_backend("race", 90, SOURCES)
    src, word = torch.arange(4 * 2500, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    read_all = backend.load(KernelSpec("bandwidth.cu", "read_all", {}, 90))
    launch(read_all, (2,), (512,), [ptr(src), ptr(word), u64(2500)])
    assert word.item() == 0
    touch = backend.load(KernelSpec("bandwidth.cu", "touch", {}, 90))
    for _ in range(3):
        launch(touch, (1,), (32,), [ptr(word)], dependent=True)
    assert word.item() == 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_weights_are_what_the_kernels_take(bits: int) -> None:
    weight = benchmark.random_weight(TileLayout(bits, 256, 48, 128, False), torch.device("cpu"))
    check_weight(weight, torch.device("cpu"))
    assert benchmark.weight_bytes(weight) == 256 * 48 * bits // 8 + 3 * 2 * (32 + (16 if bits == 8 else 8))


class OneRun:
    """A timer that runs what it is given once and says 2 us."""

    def median_us(self, run: Callable[[], object], repeats: int) -> float:
        run()
        return 2.0


def test_attention_reads_every_page_once() -> None:
    shape = attention.Shape("tiny", 4, 2, 64)
    step = attention.make_step(shape, "q4", 130, 3, torch.device("cpu"))
    tables = step.tables
    names = ("query_start", "context_len", "page_table", "slots")
    check_tables(*(getattr(tables, name).numpy() for name in names), len(step.pages))
    assert sorted(tables.page_table.flatten().tolist()) == list(range(len(step.pages)))
    assert step.page_bytes == 3 * 3 * 2 * PageLayout("q4", 64).num_bytes
    step.run(make_backend("plain", 86))
    assert step.out.isfinite().all()
    assert step.out.abs().max() > 0


def test_attention_rows() -> None:
    """A roof of one page of q4 and kv head a microsecond: two kv heads in two microseconds are all of it."""
    shape = attention.Shape("tiny", 4, 2, 64)
    roof = PageLayout("q4", 64).num_bytes * 1e6
    lines = list(attention.attention_rows(make_backend("plain", 86), OneRun(), roof, (shape,), (64,), (1,)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| tiny")]
    assert [row[3] for row in rows] == list(KINDS)
    assert rows[-1] == ["tiny 4 / 2", "64", "1", "q4", "2.0", "100%", "1.00"]


def test_one_line_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert benchmark.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks/kernels.py needs a GPU: no CUDA device")
