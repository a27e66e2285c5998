"""Tokens drawn on a GPU: what a step's draws ask for goes there, ids come back, and nobody waits in between. What the
launches cannot do is drawn on the host, from a copy of its row of logits, for which the host waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import SampleRows, SamplingBatch
from exl.errors import KernelError
from exl.kernels.program import Programs, place
from exl.kernels.sample import SampleScratch, SampleTables, sample
from exl.kernels.sample_tables import (
    CheckedBatch,
    LaunchRows,
    adjustments_of,
    check_batch,
    host_rows,
    launch_rows,
    pack_tables,
)
from exl.layout.arena import max_draws, sample_rows
from exl.layout.samples import MAX_RANKED, RANKED, RESULT, found_bytes, scratch_shapes
from exl.layout.steps import StepLimits
from exl.memory.device import pinned, record_event
from exl.memory.host import HostBuffer
from exl.ops.cuda_batch import Upload
from exl.sampling import sample as sample_on_host
from exl.sampling_params import SamplingParams

_UNIT_BITS = 44  # a weight is in units of 2^-44 of the likeliest token's


@dataclass(frozen=True)
class _Told:
    """What one launch tells besides ids, on its way to the host."""

    rows: LaunchRows
    results: NDArray[np.void]  # RESULT [n]
    ranked: NDArray[np.void]  # RANKED [n, MAX_RANKED]


def needs_host(params: SamplingParams, num_logprobs: int = -1) -> bool:
    """Whether a request's draws are made on the host, which waits for each. A single draw may be even if not: where
    more than 4,096 tokens are adjusted."""
    if num_logprobs > MAX_RANKED:
        return True
    typical = params.typical_p < 1.0 and params.mirostat_tau == 0.0
    later = params.temperature_last and params.temperature != 1.0
    return params.temperature > 0.0 and (typical or later or params.dynamic_range > 0.0)


class DeviceSamples:
    """See ``exl.ops.base.Samples``: copies on their way, to a place that the call after the next overwrites."""

    def __init__(
        self,
        batch: SamplingBatch,
        ids: NDArray[np.int32],
        told: list[_Told],
        on_host: Mapping[int, tuple[float, tuple[tuple[int, float], ...] | None]],
        copied: torch.cuda.Event | None,
    ) -> None:
        """``on_host``: surprise and log-probabilities of draws that were made there."""
        self._batch, self._ids, self._told, self._on_host, self._copied = batch, ids, told, on_host, copied

    def read(self) -> SampleRows:
        if self._copied is not None:
            self._copied.synchronize()
        ids = self._ids.tolist()
        rows = SampleRows(ids, [math.nan] * len(ids), [None] * len(ids))
        drawn: dict[int, np.void] = {}
        for told in self._told:  # every draw comes before all that is measured
            for n, (i, measured) in enumerate(zip(told.rows.draws.tolist(), told.rows.measured.tolist(), strict=True)):
                if ids[i] < 0:
                    continue
                if measured:
                    rows.ranked[i] = _log_probabilities(ids[i], drawn[i], told.results[n], told.ranked[n])
                    continue
                drawn[i] = told.results[n]
                if self._batch.mirostat_mu[i] < math.inf and self._batch.temperature[i] > 0.0:
                    rows.surprise[i] = math.log2(int(drawn[i]["mass_before"])) - math.log2(int(drawn[i]["weight"]))
        for i, (surprise, ranked) in self._on_host.items():
            rows.surprise[i], rows.ranked[i] = surprise, ranked
        return rows


def _log_probabilities(
    token_id: int, drawn: np.void, measured: np.void, ranked: NDArray[np.void]
) -> tuple[tuple[int, float], ...] | None:
    """Of the drawn token, then of the likeliest; None: the row has NaN or inf. The mass is less than V 2^-44 off,
    relatively."""
    mass, top = int(measured["mass"]), float(measured["logit"])
    if mass == 0:
        return None
    log_mass = math.log(mass) - _UNIT_BITS * math.log(2.0)
    found = [(token_id, float(drawn["logit"])), *ranked[: int(measured["num_ranked"])].tolist()]
    return tuple((other, logit - top - log_mass) for other, logit in found)


class Sampler:
    def __init__(
        self, programs: Programs, limits: StepLimits, fields: Mapping[str, torch.Tensor], stack: ExitStack
    ) -> None:
        """``fields``: of the arena, by purpose. Page-locked buffers are given back when ``stack`` closes."""
        self._programs, self._nothing = programs, programs.bind(())
        self._num_rows, self._max_draws, self._vocab_size = sample_rows(limits), max_draws(limits), limits.vocab_size
        self._samples, buffer = fields["samples"], fields["sampling tables"]
        self._tables = SampleTables(buffer, self._num_rows)
        names = scratch_shapes(self._num_rows, self._vocab_size)
        self._scratch = SampleScratch(**{name: fields[f"sampling {name}"] for name in names})
        self._upload = Upload(programs.backend, buffer, "sampling tables", stack)
        self._found = [_Found(self._max_draws, self._num_rows, buffer.device, stack) for _ in range(2)]
        self._turn = 0

    def sample(self, logits: torch.Tensor, params: SamplingBatch, *, dependent: bool) -> DeviceSamples:
        """Waits for the device only where a draw is made on the host (``host_rows``). Raises ``KernelError`` for more
        draws than the buffers are made for, and for values that no request has."""
        count = len(params.row)
        if not 1 <= count <= self._max_draws:
            raise KernelError(f"{count} draws: expected 1 to {self._max_draws}")
        checked = check_batch(params, len(logits), self._vocab_size)
        self._turn = 1 - self._turn
        found, on_host = self._found[self._turn], host_rows(checked)
        told = []
        for n, rows in enumerate(launch_rows(checked, on_host, self._num_rows)):
            self._launch(logits, checked, rows, dependent)
            if (params.num_logprobs >= 0).any() or (params.mirostat_mu < math.inf).any():
                told.append(found.take(n, rows, self._scratch))
        drawn = self._draw_on_host(logits, params, np.nonzero(on_host)[0]) if on_host.any() else {}
        ids = found.ids[:count]
        torch.from_numpy(ids).copy_(self._samples[:count], non_blocking=True)
        stream = torch.cuda.current_stream(logits.device) if logits.is_cuda else None
        return DeviceSamples(params, ids, told, drawn, None if stream is None else record_event(stream))

    def _launch(self, logits: torch.Tensor, checked: CheckedBatch, rows: LaunchRows, dependent: bool) -> None:
        self._upload.send(pack_tables(checked, rows, self._num_rows, self._vocab_size, self._upload.buffer()))
        count = len(rows.draws)
        self._programs.run(
            ("sample", place(logits), count, dependent),
            self._nothing,
            lambda backend: sample(
                *(backend, logits, self._tables, self._samples, self._scratch, count), dependent=dependent
            ),
        )

    def _draw_on_host(
        self, logits: torch.Tensor, params: SamplingBatch, draws: NDArray[np.int64]
    ) -> dict[int, tuple[float, tuple[tuple[int, float], ...] | None]]:
        """Copies the draws' rows here, draws, and sends the ids to where the next step reads them."""
        drawn, ids = sample_on_host(logits, some_draws(params, draws)), np.zeros(1, np.int32)
        for n, i in enumerate(draws.tolist()):
            ids[0] = drawn.ids[n]
            self._programs.backend.call(_copy, torch.from_numpy(ids), self._samples[i : i + 1])
        return dict(zip(draws.tolist(), zip(drawn.surprise, drawn.ranked, strict=True), strict=True))


class _Found:
    """Where ids, and what launches tell besides, come to on the host."""

    def __init__(self, max_draws: int, num_rows: int, device: torch.device, stack: ExitStack) -> None:
        """Page-locked, and given back when ``stack`` closes, if ``device`` is a GPU."""
        buffers = [HostBuffer(num_bytes, "samples") for num_bytes in found_bytes(max_draws, num_rows)]
        if device.type == "cuda":
            for buffer in buffers:
                stack.enter_context(pinned(buffer, device))
        self.ids = buffers[0].array.view(np.int32)
        self._results = buffers[1].array.view(RESULT).reshape(-1, num_rows)
        self._ranked = buffers[2].array.view(RANKED).reshape(-1, num_rows, MAX_RANKED)

    def take(self, n: int, rows: LaunchRows, scratch: SampleScratch) -> _Told:
        """Queues the copies of what launch ``n`` tells."""
        count = len(rows.draws)
        told = _Told(rows, self._results[n, :count], self._ranked[n, :count])
        pairs = [(told.results, scratch.results)] + ([(told.ranked, scratch.ranked)] if rows.measured.any() else [])
        for out, source in pairs:
            words = torch.from_numpy(out.reshape(-1).view(np.int64))
            words.copy_(source[: len(words)], non_blocking=True)
        return told


def some_draws(batch: SamplingBatch, draws: NDArray[np.int64]) -> SamplingBatch:
    """Those draws of a batch, from the same rows of the same logits."""
    starts, places = adjustments_of(batch, draws)
    per_draw = (
        *("row", "uniform", "temperature", "dynamic_range", "dynamic_exponent", "temperature_last", "top_n_sigma"),
        *("top_k", "typical_p", "top_p", "min_p", "mirostat_mu", "xtc_threshold", "mask_idx", "num_logprobs"),
    )
    return replace(
        batch,
        **{name: getattr(batch, name)[draws] for name in per_draw},
        **{name: getattr(batch, name)[places] for name in ("adjust_id", "adjust_bias", "adjust_factor")},
        adjust_subtract=batch.adjust_subtract[places],
        adjust_start=starts,
    )


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
