"""``benchmarks/end_to_end.py`` on the host shim with a small model: everything except the times themselves."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benchmarks import end_to_end as benchmark
from benchmarks.machine import CountingBackend, Machine
from exl.batch import is_step
from exl.planning.shapes import ModelShape
from tests.host.backends import make_backend

TINY = ModelShape("llama", 128, 256, 2, 4, 2, 32, 128, 4096)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "PROMPT", 70)
    return make_backend("plain")


@pytest.fixture
def machine(backend) -> Machine:
    """A machine with every roof at 1 GB/s."""
    return Machine(CountingBackend(backend), backend, "shim", _roofs={"read": 1e9, "pinned": 1e9})


def test_a_steps_batch_is_one_and_sequences_share_no_page() -> None:
    batch = benchmark.step_batch(130, 3, 128)
    assert is_step(batch)
    assert len({int(page) for page in batch.page_table.reshape(-1)}) == 9
    assert (batch.slots == batch.page_table[:, 2] * 64 + 2).all()


def test_random_models_decode(machine) -> None:
    row = benchmark.decode_row(machine, "tiny", "q4", 64, 2)
    assert re.fullmatch(
        r"\| tiny \| q4 \| 64 \| 2 \| [\d.]+ \| [\d.]+ \| \d+% \| launched one by one: this device has no graphs \|",
        row,
    )


def test_logits_of_random_models_are_finite(backend) -> None:
    with benchmark.synthetic_engine(backend, TINY, vram="1GB", context=64) as engine:
        (logits,) = engine.generator.runner.forward([benchmark.step_batch(0, 1, 128)])
        assert torch.isfinite(logits).all()
        assert logits.std() > 0


def test_bytes_of_a_step_by_hand(backend) -> None:
    """The weights once, and each sequence's pages."""
    with benchmark.synthetic_engine(
        backend, TINY, vram="1GB", context=128, max_sequences=4, cache_tokens=512
    ) as engine:
        one, four = (benchmark.step_bytes_read(engine, 99, n) for n in (1, 4))
    assert four - one == 3 * 100 * 2 * 2 * 2 * 32 * 2  # tokens, layers, K and V, heads, channels, bytes


def test_prompts_and_streams(machine) -> None:
    found = benchmark.prefill_line(machine, "tiny")
    assert re.match(r"- tiny, a prompt of 70 tokens: \d+ tokens/s; \d+ bytes planned", found)
    found = benchmark.stream_line(machine, "tiny")
    assert re.match(r"- tiny, 1 of 2 layers in VRAM, launched one by one: .*: [\d.]+ tokens/s, [\d.]+ GB/s", found)


class BrokenCapture(CountingBackend):
    def capture(self, run):
        try:
            raise ValueError("the cause")
        except ValueError:
            raise RuntimeError("operation not permitted when stream is capturing")  # noqa: B904


def test_why_steps_are_not_replayed_is_said(backend) -> None:
    """If a capture fails, the report does not say "replayed as a graph"."""
    machine = Machine(BrokenCapture(backend), backend, "shim", _roofs={"read": None})
    row = benchmark.decode_row(machine, "tiny", "f16", 0, 1)
    assert "replayed" not in row
    assert "launched one by one" in row
    assert "operation not permitted when stream is capturing" in row
    line = benchmark.host_line(machine, "tiny", True)
    assert "replayed" not in line
    assert re.match(r"- tiny, \d+ launches a step, launched one by one: .*operation not permitted", line)


def test_one_line_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py"])
    assert benchmark.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks/end_to_end.py needs a GPU: no CUDA device")
