"""A recorded decode step: its stages as two programs, which take turns, over two sets of buffers; or as one, over
buffers that everything shares.

A program that repeats chunks may still have a thread in it when the next step begins (see ``Pool``). That thread reads
and writes only its own set's buffers, which the step after the next overwrites, and for which that one waits; and the
places in the cache of its own tokens, where it stores what is there already. So the next step must not write to these
places: if it would, as after a step that was taken back, it waits, too. A program over shared buffers waits for all
others, and leaves no thread behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from exl.batch import ForwardBatch
from exl.cpu_kernels.library import Library
from exl.cpu_kernels.pool import Pool, Program
from exl.ops.compiled_batch import BatchTables, StagedBatch
from exl.ops.compiled_tape import Rows, Tape


class RecordedSet:
    """A program: where its stages read the batch, and where they leave what the caller reads."""

    def __init__(
        self,
        library: Library,
        tape: Tape,
        tables: BatchTables,
        results: Sequence[tuple[Rows, torch.Tensor]],
        *,
        repeats: bool,
    ) -> None:
        """``results``: rows that are copied to tensors at the end. ``repeats``: as for ``Program``."""
        self.program, self.tables = Program(library, tape.stages, repeats=repeats), tables
        self._memory, self._changing = tape.memory, tape.changing
        self._results = [(rows.array(), tensor.numpy()) for rows, tensor in results]

    def takes(self, staged: StagedBatch) -> bool:
        """Whether there is room for the batch."""
        return self.tables.takes(staged)

    def fill(self, staged: StagedBatch) -> None:
        self.tables.fill(staged)
        for stage_idx, key, chunks in self._changing:
            self.program.set_chunks(stage_idx, chunks * self.tables.num_items(key))

    def copy_results(self) -> None:
        for found, wanted in self._results:
            np.copyto(wanted, found)


def _places_of(batch: ForwardBatch) -> frozenset[int]:
    """The places in the cache that a step writes; of layers with pages of their own, where nobody writes to page 0, as
    numbers below -1. Padding rows have -1 everywhere."""
    found = set(batch.slots.tolist())
    if batch.window_slots is not None:
        found.update(~slot for slot in batch.window_slots.tolist() if slot >= 0)
    return frozenset(found - {-1})


class StepRunner:
    """Runs programs of recorded steps, of any shape, over the two sets of buffers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._last: list[Program | None] = [None, None]  # that used each set
        self._turn = 0
        self._slots: frozenset[int] = frozenset()  # that the last step has written

    def run(self, sets: tuple[RecordedSet, RecordedSet], staged: StagedBatch) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        if self._last[turn] is not None:
            self._pool.settle(self._last[turn])
        slots = _places_of(staged.batch)
        if not slots.isdisjoint(self._slots):
            self.settle()
        now = sets[turn]
        now.fill(staged)
        self._last[turn], self._slots = now.program, slots
        self._pool.run(now.program)
        now.copy_results()

    def run_alone(self, recorded: RecordedSet, staged: StagedBatch) -> None:
        """A program that does not repeat."""
        self.settle()  # late threads may still write to the cache
        self._pool.settle(recorded.program)
        recorded.fill(staged)
        self._pool.run(recorded.program)
        recorded.copy_results()

    def settle(self) -> None:
        """Waits until no thread is in any step."""
        for program in self._last:
            if program is not None:
                self._pool.settle(program)
        self._slots = frozenset()
