"""Recorded steps on the CPU: what a thread may do that is late in one, and batches that share a recording."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from exl.batch import padded_step
from exl.cpu_kernels.processor import usable_isas
from exl.layout.steps import StepLimits
from exl.ops.compiled_batch import BatchTables, StagedBatch
from exl.ops.compiled_steps import StepRunner
from exl.ops.compiled_tape import ArenaMemory
from tests.model.batches import batch_of, run
from tests.model.hf_models import CASES as DENSE_CASES
from tests.model.hf_models import build as build_dense
from tests.model.hf_models import save
from tests.model.test_compiled_bits import IDS, every_row, opened, same
from tests.model.test_quantized import make

if not usable_isas():
    pytest.skip("this processor has no instruction set that the kernels are written for", allow_module_level=True)


class WorstThreads(StepRunner):
    """Runs steps as the worst of late threads would: each chunk twice, a stage's in any order; and once a step is done,
    all chunks of it and of the one before once more. ``changed``: what these left differently."""

    def __init__(self, engine) -> None:
        ops = engine.generator.runner.decoder.ops
        super().__init__(ops._pool)
        self._library, self._rng = ops.library, np.random.default_rng(5)
        self._memory = {"arena 0": ops._arenas[0], "arena 1": ops._arenas[1], "cache": engine.generator.runner.kv.slab}
        self._before = None  # the last step's program
        self.changed: list[str] = []
        self.steps = 0
        ops._steps = self

    def run(self, sets, staged) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        now = sets[turn]
        now.fill(staged)
        for stage_idx in range(now.program.num_stages):
            self._execute(now.program, [stage_idx], times=2)
        now.copy_results()
        late = [now.program] if self._before is None else [now.program, self._before]
        kept = {name: memory.clone() for name, memory in self._memory.items()}
        for program in late:
            self._execute(program, range(program.num_stages), times=1)
            self.changed += [
                f"step {self.steps}: {name}" for name, memory in self._memory.items() if not memory.equal(kept[name])
            ]
        self._before = now.program
        self.steps += 1

    def _execute(self, program, stages, times: int) -> None:
        chunks = [(s, c) for s in stages for c in range(program.table[s, 2])] * times
        self._rng.shuffle(chunks)
        for stage_idx, chunk in chunks:
            address, args = program.table[stage_idx, :2]
            self._library._invoke(int(address), int(args), chunk, chunk + 1)


def steps_of(engine, num_sequences: int) -> list[torch.Tensor]:
    """Logits of some steps with so many sequences, of different lengths, after their prompts."""
    runner = engine.generator.runner
    pages = [[2 * i, 2 * i + 1] for i in range(num_sequences)]
    lengths = [5 + 29 * i for i in range(num_sequences)]
    for n, own in zip(lengths, pages, strict=True):
        run(runner, batch_of([(IDS[:n], 0, own)]))
    steps = ([([7 + step], n + step, own) for n, own in zip(lengths, pages, strict=True)] for step in range(5))
    return [run(runner, batch_of(step, decode=True)) for step in steps]


QUANTIZED = [
    (2, 16, {}, {"kv_cache": "q4"}),
    (3, 32, {"order": "own"}, {"kv_cache": "f32"}),
    (4, 32, {"order": "shared"}, {"kv_cache": "q8"}),
    (4, 64, {"sym": True}, {"kv_cache": "k8v4", "arithmetic": "f32"}),
    (8, 32, {"order": "own"}, {"kv_cache": "f16", "arithmetic": "f32"}),
    (8, -1, {}, {"kv_cache": "f16", "arithmetic": "int8"}),
]


@pytest.mark.parametrize(("bits", "group_size", "made", "options"), QUANTIZED, ids=str)
def test_threads_that_are_late_change_nothing(tmp_path, bits, group_size, made, options):
    make(tmp_path, bits, group_size, **made)
    with opened(tmp_path, **options) as engine:
        expected = steps_of(engine, 3)
        worst = WorstThreads(engine)
        found = steps_of(engine, 3)
    assert worst.steps == 5
    assert not worst.changed
    assert all(map(same, found, expected))


@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_threads_that_are_late_change_nothing_in_any_family(tmp_path, case):
    folder = save(build_dense(case), tmp_path)
    with opened(folder, kv_cache="f16") as engine:
        expected = steps_of(engine, 2)
        worst = WorstThreads(engine)
        found = steps_of(engine, 2)
    assert worst.steps == 5
    assert not worst.changed
    assert all(map(same, found, expected))


def test_a_residual_that_is_added_in_place_is_found(tmp_path, monkeypatch):
    """That the check above sees what it is to see."""

    def write(memory: ArenaMemory, tensor: torch.Tensor):
        return memory._places.get(tensor.data_ptr()) or plain(memory, tensor)

    plain = ArenaMemory.write
    monkeypatch.setattr(ArenaMemory, "write", write)
    make(tmp_path, 4, 32)
    with opened(tmp_path) as engine:
        steps_of(engine, 3)
        worst = WorstThreads(engine)
        steps_of(engine, 3)
    assert worst.changed


def test_a_batch_may_be_larger_than_the_one_that_was_recorded(tmp_path):
    """Three sequences and four run the same recorded step: three are padded to four."""
    make(tmp_path, 4, 32)
    with opened(tmp_path) as engine:
        runner = engine.generator.runner
        pages = [[0], [1], [2], [3]]
        for own in pages:
            run(runner, batch_of([(IDS[:9], 0, own)]))
        steps = [([i + 20], 9, own) for i, own in enumerate(pages)]
        alone = [run(runner, batch_of([step])) for step in steps]
        for count in (3, 3, 4, 3, 4):
            assert same(run(runner, batch_of(steps[:count], decode=True)), torch.cat(alone[:count]))


def test_tables_that_are_filled_again_are_those_of_the_new_batch():
    limits = StepLimits(8, 8, 8, 128, 64, 128, 64, 64, 100, 16, max_sequences=8)
    steps = [([7], 60 + i, [i, 8 + i]) for i in range(8)]
    batches = (padded_step(batch_of(steps[:count], decode=True), 8) for count in (5, 7))
    first, second = (StagedBatch(batch, batch.token_ids, limits) for batch in batches)
    tables = BatchTables(first, 64)
    tables.fill(second)
    for name, expected in vars(BatchTables(second, 64)).items():
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(getattr(tables, name), expected, name)


@pytest.mark.parametrize("isa", usable_isas())
def test_nothing_is_compiled_once_a_model_is_loaded(tmp_path, isa):
    """Neither for prompts of any length nor for steps with any number of sequences."""
    make(tmp_path, 4, 32, order="shared")
    with opened(tmp_path, isa=isa) as engine:
        library = engine.generator.runner.decoder.ops.library
        before = set(library._addresses)
        for count in (1, 2, 3, 7, 9, 16, 20, 33, 65, 90):
            every_row(engine, IDS[:count])
        for count in (1, 2, 4):
            steps_of(engine, count)
        assert {kernel.name for kernel in set(library._addresses) - before} == set()


@contextmanager
def a_late_thread(engine, work) -> Iterator[None]:
    """``work`` in a thread, begun while the last step seems to have one inside, which leaves at the end."""
    steps_of(engine, 1)
    last = engine.generator.runner.decoder.ops._steps._last[0]
    last.active[0] += 1
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.3)
    try:
        yield
    finally:
        last.active[0] -= 1
        thread.join(20)
    assert not thread.is_alive()


def test_weights_are_freed_once_no_thread_is_in_the_last_step(tmp_path):
    make(tmp_path, 4, 32)
    with opened(tmp_path) as engine, a_late_thread(engine, engine.close):
        assert engine.weights.embed.fields["weight"].any()


def test_a_page_is_copied_once_no_thread_is_in_the_last_step(tmp_path, monkeypatch):
    """It may be the one that the step has written to."""
    make(tmp_path, 4, 32)
    copies = []
    with opened(tmp_path) as engine:
        generator = engine.generator
        monkeypatch.setattr(generator.runner.kv, "copy_pages", lambda *pages: copies.append(pages))
        first = generator.begin(30)
        generator.extend(first, IDS[:30])
        generator.end(first)
        with a_late_thread(engine, lambda: generator.runner.copy_pages([0], [1])):
            assert not copies
    assert copies
