"""A model's steps with more threads than processors, beside busy processes: threads are descheduled inside of chunks,
others repeat those, and late ones store what is there. 20 seconds of it; ``--stress-seconds 600`` for a longer run."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from exl.checkpoint.hub import BUNDLED_MODEL
from exl.cpu_kernels import pool as pool_module
from exl.cpu_kernels.processor import usable_isas
from exl.engine import build
from exl.engine.build import load_engine
from exl.planning.options import EngineOptions

THREADS = 5
IDS = torch.randint(3, 500, (300,), generator=torch.Generator().manual_seed(4)).tolist()


def _busy() -> None:
    while True:
        pass


@pytest.fixture
def busy_processes():
    """Two of them, which take the processors from this one half of the time."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_busy, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()
        process.join()


def steps(engine, ids) -> list[bytes]:
    generator = engine.generator
    sequence = generator.begin(len(ids))
    try:
        return [generator.extend(sequence, [token_id]).numpy().tobytes() for token_id in ids]
    finally:
        generator.end(sequence)


@pytest.mark.skipif(not usable_isas(), reason="no kernels for this processor")
@pytest.mark.parametrize("spin_cycles", [200, 40_000], ids=["repeats at once", "as always"])
@pytest.mark.sample(2)
def test_steps_beside_busy_processes_have_the_bits_of_one_thread(request, monkeypatch, busy_processes, spin_cycles):
    monkeypatch.setattr(pool_module, "_SPIN_CYCLES", spin_cycles)
    options = EngineOptions(context=320, device="cpu", kv_cache="q8")
    monkeypatch.setattr(build, "thread_limit", lambda asked: 1)
    alone = load_engine(BUNDLED_MODEL, options)
    expected = steps(alone, IDS)
    alone.close()
    monkeypatch.setattr(build, "thread_limit", lambda asked: THREADS)
    engine = load_engine(BUNDLED_MODEL, options)
    until = time.monotonic() + request.config.option.stress_seconds / 2
    rounds = 0
    while time.monotonic() < until or rounds == 0:
        found = steps(engine, IDS)
        assert [i for i in range(len(IDS)) if found[i] != expected[i]] == []
        rounds += 1
    assert engine.decode_steps == "recorded, one call each"
    engine.close()
