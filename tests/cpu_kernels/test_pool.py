"""The pool: every chunk is run, in order of stages, whatever company and forks do to the threads."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from exl.cpu_kernels.ir import F32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.pool import Pool, Program, Stage
from tests.command_line import without_compiling

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mix(KernelSpec):
    """out[c] = x[c] + x[(c + 1) mod n] for f32 [n]; slots 0 x, 1 out, 2 n, 3 times it is computed. Chunk: an element.

    A chunk of ``slow`` takes a while, so that others wait for it."""

    @property
    def name(self) -> str:
        return "mix"

    def emit(self, k: Kernel) -> None:
        x, out, n = k.pointer(0), k.pointer(1), k.size(2)
        other = k.b.srem(k.add(k.chunk, 1), n)
        total = k.var(F32(0.0))
        with k.loop(k.size(3)):
            total.set(k.b.fadd(k.load(F32, x, k.mul(4, k.chunk)), k.load(F32, x, k.mul(4, other))))
            k.call("llvm.x86.sse2.pause", k.function.ftype.return_type)
        k.store(total.get(), out, k.mul(4, k.chunk))


@dataclass(frozen=True)
class Count(KernelSpec):
    """counts[c] += 1 for i64: how often chunk c was run. Reads what it writes: only for programs that do not repeat."""

    @property
    def name(self) -> str:
        return "count"

    def emit(self, k: Kernel) -> None:
        k.b.atomic_rmw("add", k.at(k.pointer(0), k.mul(8, k.chunk)), I64(1), "seq_cst")


@pytest.fixture
def pool(library: Library):
    made = Pool(library, 4)
    yield made
    made.close()


def chain(library: Library, num_stages: int, n: int, times: int = 1, repeats: bool = True):
    """A program in which each stage needs all of the stage before, and what its last stage must give."""
    buffers = [np.zeros(n, np.float32) for _ in range(num_stages + 1)]
    buffers[0][:] = np.arange(n) % 5
    expected = buffers[0].copy()
    for _ in range(num_stages):
        expected = expected + np.roll(expected, -1)
    stages = [Stage(Mix(), n, (a, b, n, times)) for a, b in itertools.pairwise(buffers)]
    return Program(library, stages, repeats=repeats), buffers, expected


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_each_stage_sees_all_of_the_one_before(library, pool, n, repeats):
    program, buffers, expected = chain(library, 12, n, repeats=repeats)
    for _ in range(20):
        buffers[-1][:] = -1
        pool.settle(program)
        for buffer in buffers[1:]:
            buffer[:] = np.nan
        pool.run(program)
        np.testing.assert_array_equal(buffers[-1], expected)


def test_without_repeats_each_chunk_runs_once_and_nobody_is_left_inside(library, pool):
    counts = np.zeros(50, np.int64)
    program = Program(library, [Stage(Count(), 50, (counts,)) for _ in range(20)], repeats=False)
    for i in range(1, 30):
        pool.run(program)
        np.testing.assert_array_equal(counts, 20 * i)


def test_more_threads_than_processors_beside_busy_ones(library):
    """Threads are descheduled inside of chunks here, and others repeat them."""
    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [np.sort(noise) for _ in iter(stop.is_set, True)]) for _ in range(3)]
    noise = np.random.default_rng(0).random(200_000)
    pool = Pool(library, 8)
    program, buffers, expected = chain(library, 30, 24, times=400)
    for thread in busy:
        thread.start()
    try:
        for _ in range(15):
            pool.run(program)
            np.testing.assert_array_equal(buffers[-1], expected)
    finally:
        stop.set()
        for thread in busy:
            thread.join()
        pool.settle(program)
        pool.close()


def test_a_number_of_chunks_can_change(library, pool):
    x, out = np.ones(10, np.float32), np.zeros(10, np.float32)
    program = Program(library, [Stage(Mix(), 2, (x, out, 10, 1), most_chunks=10)], repeats=True)
    pool.run(program)
    assert out.tolist() == [2, 2] + [0] * 8
    pool.settle(program)
    program.set_chunks(0, 7)
    pool.run(program)
    assert out.tolist() == [2] * 7 + [0] * 3
    with pytest.raises(ValueError, match="11 chunks of stage 0, expected 10 or fewer"):
        program.set_chunks(0, 11)


def test_idle_workers_take_no_time(library, pool):
    program, _, _ = chain(library, 3, 8)
    pool.run(program)
    pool.settle(program)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_the_caller_does_not_wait_for_workers_that_never_wake(library, pool, monkeypatch):
    """As when the system does not schedule them."""
    program, buffers, expected = chain(library, 5, 8, repeats=False)
    pool.run(program)
    for worker in pool._workers:
        monkeypatch.setattr(worker, "wake", lambda program: None)
    buffers[-1][:] = 0
    pool.run(program)
    np.testing.assert_array_equal(buffers[-1], expected)


def test_a_worker_that_comes_late_touches_nothing(library, pool):
    """It was woken for a run that is over: it finds the list closed."""
    counts = np.zeros(4, np.int64)
    program = Program(library, [Stage(Count(), 4, (counts,))], repeats=False)
    pool.run(program)
    program.clear()  # as if nothing were done yet: a thread inside would run all chunks
    pool._walk(program)
    assert counts.tolist() == [1] * 4
    assert program.active[0] == program.active[1]  # closed, nobody inside


def test_closed_pools_run_again(library, pool):
    program, buffers, expected = chain(library, 5, 8)
    pool.run(program)
    pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "exl computes"]
    buffers[-1][:] = 0
    pool.run(program)
    np.testing.assert_array_equal(buffers[-1], expected)


def test_a_pool_that_nobody_closes_ends_its_threads(library):
    pool = Pool(library, 3)
    program, _, _ = chain(library, 3, 8)
    pool.run(program)
    threads = [worker.thread for worker in pool._workers]
    del pool
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


EXITING = """
import atexit, sys
left = []
# Registered first, so that it runs last, when all that is done at the exit has been done.
atexit.register(lambda: print(sum(thread.is_alive() for thread in left)))
from pathlib import Path
from exl.cpu_kernels.library import Library
from exl.cpu_kernels.pool import Pool
from tests.cpu_kernels.test_pool import chain
library = Library(folder=Path(sys.argv[1]))
pool = Pool(library, 4)
pool.run(chain(library, 3, 8)[0])
left += [worker.thread for worker in pool._workers]
"""


def test_workers_have_ended_before_the_interpreter_is_taken_down(library, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EXITING, str(tmp_path / "cache")], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stdout.strip(), without_compiling(done.stderr)) == (0, "0", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_workers_of_its_own(library, pool):
    program, buffers, expected = chain(library, 8, 16)
    pool.run(program)
    child = os.fork()
    if child == 0:
        buffers[-1][:] = 0
        pool.run(program)
        os._exit(0 if (buffers[-1] == expected).all() and len(pool._workers) == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    pool.run(program)
    np.testing.assert_array_equal(buffers[-1], expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_does_not_wait_for_threads_that_its_parent_has_in_a_program(library, pool):
    """Neither before its first run, nor later, when the pool has threads of this process."""
    (late, buffers, expected), (other, _, _) = chain(library, 8, 16), chain(library, 3, 8)
    pool.run(late)
    pool.settle(late)
    late.active[0] += 1  # as if a thread were still inside when the process forks
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        pool.run(other)
        buffers[-1][:] = 0
        pool.run(late)
        os._exit(0 if (buffers[-1] == expected).all() else 1)
    _, status = os.waitpid(child, 0)
    late.active[0] -= 1
    assert status == 0


def test_workers_are_used_again_after_an_interrupt(library, pool, monkeypatch):
    """Ctrl-C while they were started, and between a job and the waking."""
    program, buffers, expected = chain(library, 8, 16)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.run(program)
    pool.run(program)
    assert len(pool._workers) == 3
    pool.settle(program)
    while not all(worker.idle for worker in pool._workers):
        time.sleep(0.001)
    pool._workers[0]._jobs.append(program)
    assert pool._workers[0].idle
    pool.run(program)
    np.testing.assert_array_equal(buffers[-1], expected)


@dataclass(frozen=True)
class Half(KernelSpec):
    """out = x / 2 for one f32; slots 0 x, 1 out."""

    @property
    def name(self) -> str:
        return "half"

    def emit(self, k: Kernel) -> None:
        k.store(k.b.fmul(k.load(F32, k.pointer(0)), F32(0.5)), k.pointer(1))


def test_denormals_stay_where_torch_was_told_to_flush_them(library, pool):
    tiny = np.array([2.0**-126], np.float32)
    out = np.zeros(1, np.float32)
    torch.set_flush_denormal(True)
    try:
        assert float(torch.tensor(tiny) * 0.5) == 0.0  # it does flush
        library.call(Half(), slots(tiny, out))
        assert out[0] == np.float32(2.0**-127)
        out[0] = 0
        pool.run(Program(library, [Stage(Half(), 1, (tiny, out))], repeats=True))
        assert out[0] == np.float32(2.0**-127)
        assert float(torch.tensor(tiny) * 0.5) == 0.0  # and it still does
    finally:
        torch.set_flush_denormal(False)
