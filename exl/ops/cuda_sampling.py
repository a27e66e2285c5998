"""Tokens drawn on a GPU: what a step's rows ask for goes there, ids come back, and nobody waits in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from exl.batch import SampleRows, SamplingBatch
from exl.errors import KernelError
from exl.kernels.program import Programs, place
from exl.kernels.sample import SampleScratch, pack_tables, sample, tables_at
from exl.layout.arena import max_seen, sample_rows
from exl.layout.samples import scratch_shapes
from exl.layout.steps import StepLimits
from exl.memory.device import pinned, record_event
from exl.memory.host import HostBuffer
from exl.ops.cuda_batch import Upload
from exl.sampling import ranked_tokens


class DeviceSamples:
    """See ``exl.ops.base.Samples``: a copy on its way, to a place that the call after the next overwrites."""

    def __init__(
        self, ids: torch.Tensor, copied: torch.cuda.Event | None, ranked: Mapping[int, tuple[torch.Tensor, int]]
    ) -> None:
        """``ranked``: the logits of rows that want log-probabilities, and of how many likeliest tokens."""
        self._ids, self._copied, self._ranked = ids, copied, ranked

    def read(self) -> SampleRows:
        if self._copied is not None:
            self._copied.synchronize()
        ids = self._ids.tolist()
        ranked: list[tuple[tuple[int, float], ...] | None] = [None] * len(ids)
        for i, (row, count) in self._ranked.items():
            if ids[i] >= 0:
                ranked[i] = ranked_tokens(row, ids[i], count)
        return SampleRows(ids, [math.nan] * len(ids), ranked)


class Sampler:
    def __init__(
        self, programs: Programs, limits: StepLimits, fields: Mapping[str, torch.Tensor], stack: ExitStack
    ) -> None:
        """``fields``: of the arena, by purpose. Page-locked buffers are given back when ``stack`` closes."""
        self._programs, self._nothing = programs, programs.bind(())
        self._num_rows, self._max_seen, self._vocab_size = sample_rows(limits), max_seen(limits), limits.vocab_size
        self._samples, buffer = fields["samples"], fields["sampling tables"]
        self._tables = tables_at(buffer, self._num_rows, self._max_seen)
        names = scratch_shapes(self._num_rows, self._vocab_size)
        self._scratch = SampleScratch(**{name: fields[f"sampling {name}"] for name in names})
        self._upload = Upload(programs.backend, buffer, "sampling tables", stack)
        self._found = [HostBuffer(4 * self._num_rows, "samples") for _ in range(2)]
        if buffer.is_cuda:
            for found in self._found:
                stack.enter_context(pinned(found, buffer.device))
        self._turn = 0

    def sample(self, logits: torch.Tensor, params: SamplingBatch, *, dependent: bool) -> DeviceSamples:
        """Raises ``KernelError`` for more rows than the buffers are made for."""
        R = len(logits)
        if not 1 <= R <= self._num_rows:
            raise KernelError(f"{R} rows of logits: expected 1 to {self._num_rows}, the sequences of a batch")
        packed = pack_tables(params, self._num_rows, self._max_seen, self._vocab_size)
        self._upload.buffer()[: packed.size] = packed
        self._upload.send(packed.size)
        ids = self._samples[:R]
        self._programs.run(
            ("sample", place(logits), dependent),
            self._nothing,
            lambda backend: sample(backend, logits, self._tables, ids, self._scratch, dependent=dependent),
        )
        self._turn = 1 - self._turn
        found = torch.from_numpy(self._found[self._turn].array).view(torch.int32)[:R]
        found.copy_(ids, non_blocking=True)
        copied = record_event(torch.cuda.current_stream(ids.device)) if ids.is_cuda else None
        wanted = {i: count for i, count in enumerate(params.num_logprobs.tolist()) if count >= 0}
        return DeviceSamples(found, copied, {i: (logits[i].cpu(), count) for i, count in wanted.items()})
