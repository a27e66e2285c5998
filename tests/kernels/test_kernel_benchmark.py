"""The parts of ``benchmarks/kernels.py`` that need no GPU: its kernels, its weights, its message if there is no GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import attention, timing
from benchmarks import kernels as benchmark
from benchmarks.machine import CountingBackend, Machine
from benchmarks.report import Measurement, Section, report_lines
from exl.kernels.args import ptr, u64
from exl.kernels.attention_decode import check_tables
from exl.kernels.launch import launch
from exl.kernels.spec import KernelSpec
from exl.kernels.weights import check_weight
from exl.layout.pages import KINDS, PageLayout
from exl.layout.tiles import TileLayout
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
    """A timer that runs its function once and returns 2 us."""

    def median_us(self, run: Callable[[], object], repeats: int = 1) -> float:
        run()
        return 2.0


class TimedOnce(Machine):
    def timer(self) -> OneRun:
        return OneRun()


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
    """The roof is one q4 page of one kv head per microsecond: two kv heads in two microseconds are 100 % of it."""
    shape, backend = attention.Shape("tiny", 4, 2, 64), make_backend("plain", 86)
    roof = PageLayout("q4", 64).num_bytes * 1e6
    machine = TimedOnce(CountingBackend(backend), backend, "shim", _roofs={"read": roof})
    section = attention.attention_section(machine, (shape,), (64,), (1,))
    rows = [[cell.strip() for cell in m.run().strip("|").split("|")] for m in section.measurements]
    assert [row[3] for row in rows] == list(KINDS)
    assert rows[-1] == ["tiny 4 / 2", "64", "1", "q4", "2.0", "100%", "1.00"]


def test_a_failure_loses_its_own_line() -> None:
    def fail() -> str:
        raise RuntimeError("no such kernel")

    section = Section(
        "S", (), 10, (Measurement("a", lambda: "- a"), Measurement("b", fail), Measurement("c", lambda: "- c"))
    )
    lines = list(report_lines(("# T",), (section, section)))
    assert lines.count("- a") == lines.count("- c") == 2
    assert lines.count("- b: failed: RuntimeError: no such kernel") == 2


def test_nothing_is_measured_in_a_context_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    measurements = (Measurement("a", fault), Measurement("b", lambda: "- b"))
    lines = list(report_lines((), (Section("S", (), 10, measurements),)))
    assert "- b" not in lines
    assert lines[-1].startswith(
        "The rest was left out: the GPU's context is lost (RuntimeError: CUDA error: an illegal"
    )


def test_a_section_ends_at_its_deadline() -> None:
    seconds = iter((0, 0, 1, 7, 8, 8))
    measurements = tuple(Measurement(name, lambda name=name: name) for name in "abc")
    lines = list(report_lines((), (Section("S", (), 5, measurements),), clock=lambda: next(seconds)))
    assert lines[3:] == ["a", "", "2 more were left out: the 5 s for them were over.", "", "All of this took 8 s."]


def test_the_device_is_busy_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the host's time for a launch would count as the kernel's: here all of its 10 ms are slept."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, stop: object) -> float:
            return 0.004

    slept = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: (slept.append(cycles), calls.append("sleep")), raising=False
    )
    timer = timing.GpuTimer(torch.device("cpu"), 64)
    assert timer.median_us(lambda: (time.sleep(0.01), calls.append("run")), 2) == 4.0
    assert calls == ["run"] * 3 + ["sleep", "record", "run", "record", "synchronize"] * 2
    assert min(slept) >= 0.01 * 2.6e9  # cycles at the fastest clock of any GPU


def test_one_line_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    assert benchmark.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks/kernels.py needs a GPU: no CUDA device")
