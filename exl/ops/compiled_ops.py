"""The operations on the CPU through exl's own kernels, compiled at run time.

Each operation adds stages to a tape, which runs when it is told to (``launch``) or a result is asked for: a layer's
stages are one call. A decode step whose weights all stay in memory is recorded instead (``capture``), and is then one
call: a small one twice, over two sets of buffers that take turns; a large one over the buffers that all share. What a
row's values are never depends on which of these happens, on other rows, or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch, SamplingBatch
from exl.cache.kv import KVCache
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.pool import Pool, Program
from exl.cpu_kernels.sampling_weights import CompiledMath
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.layout.cpu_steps import RECORDED_ROWS, CompiledSizes, scratch_partials, step_partials
from exl.layout.kv import DeviceKVLayout
from exl.layout.layers import LinearLayout
from exl.layout.specs import Target
from exl.layout.steps import StepLimits
from exl.memory.host import host_tensor
from exl.ops import compiled_rows
from exl.ops.base import (
    ALL_ROWS,
    PLAIN_BRANCH,
    AttentionSpec,
    Branch,
    EmbedSpec,
    ExpertSet,
    GatedMlp,
    Linear,
    LogitsSpec,
    Loras,
    Norm,
    RouteSpec,
    Segments,
    TableRows,
)
from exl.ops.compiled_attention import AttentionStages
from exl.ops.compiled_batch import BatchTables, StagedBatch
from exl.ops.compiled_experts import ExpertStages
from exl.ops.compiled_linear import LinearStages
from exl.ops.compiled_pack import pack_linear
from exl.ops.compiled_steps import RecordedSet, StepRunner
from exl.ops.compiled_tape import ArenaMemory, NoMemory, RecordedMemory, RecordForm, Records, Rows, SharedMemory, Tape
from exl.ops.cpu_buffers import refuse_output_order, step_buffer
from exl.ops.torch_ops import HostSamples, keep_samples
from exl.sampling import sample
from exl.threads import using


class CompiledOps:
    """See ``exl.ops.base.Ops``. Owns its scratch and its samples; the caller owns everything else."""

    device = torch.device("cpu")
    act_dtype = torch.float32
    backend = None
    threads = None
    dependent = False
    runs_ahead = False
    invariant_rows = ALL_ROWS
    decode_alike = True

    def __init__(
        self,
        pool: Pool,
        target: Target,
        kv_layout: DeviceKVLayout,
        limits: StepLimits,
        sizes: CompiledSizes,
        arithmetic: str,
    ) -> None:
        """``pool``: closed with the operations. ``arithmetic``: of quantized linears, a key of
        ``exl.layout.cpu_steps.ARITHMETIC``."""
        library = pool.library
        self.library, self.target, self.kv_layout, self.limits = library, target, kv_layout, limits
        self.arithmetic, self._pool = arithmetic, pool
        self.captures = min(RECORDED_ROWS, limits.max_sequences) if sizes.arena_rows else 0
        self._arena_rows = sizes.arena_rows
        scratch = {name: host_tensor([size], torch.uint8, name) for name, size in sizes.scratch.items()}
        self._samples = scratch.pop("samples").view(torch.int64)
        self._shared = SharedMemory(scratch)
        self._arenas = [host_tensor([sizes.arena], torch.uint8, "recorded steps") for _ in range(2)]
        self._linears = LinearStages(arithmetic, library.isa, pool.num_threads)
        self._attention = AttentionStages(library, kv_layout)
        self._experts = ExpertStages(self._linears, limits, arithmetic, library.isa)
        self._sampling = CompiledMath(library)
        self._steps = StepRunner(self._pool)
        self._staged: list[StagedBatch] = []
        self._now: StagedBatch | None = None
        self._pending = Tape(self._shared)
        self._made: dict[int, Records] = {}  # inputs of a linear, by the buffer that the decoder knows them by
        self._tape: Tape | None = None  # of the step that is being recorded
        self._results: list[tuple[Rows, torch.Tensor]] = []

    def close(self) -> None:
        self._steps.settle()
        self._pool.close()

    def buffer(self, name: str) -> torch.Tensor:
        return step_buffer(self.limits, name)

    # load

    def pack(
        self,
        parts: Sequence[QuantizedMatrix | DenseMatrix],
        layout: LinearLayout,
        out: torch.Tensor,
        output_order: NDArray[np.int32] | None = None,
    ) -> None:
        refuse_output_order(output_order)
        pack_linear(parts, layout, out.numpy(), self.library)

    # recording

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The operations that ``step`` calls, on the selected batch, as a function that runs them for whichever batch
        of the same shape is selected when it is called. What no recording has room for runs as ``step`` itself does."""
        small = self._now.batch.num_rows <= self._arena_rows and not self._now.batch.lora_runs  # those add in place
        sets = tuple(self._record(step, arena) for arena in self._arenas) if small else ()
        shared: list[RecordedSet] = [] if small else [self._record(step)]

        def replay() -> None:
            now = self._now
            if sets and sets[0].takes(now):
                self._steps.run(sets, now)
                return
            if not shared:  # the first whose sequences share so many pages that an arena lacks room
                shared.append(self._record(step))
            if shared[0].takes(now):
                self._steps.run_alone(shared[0], now)
            else:
                step()

        return replay

    def kernels_of(self, step: Callable[[], None], batch: ForwardBatch) -> set[KernelSpec]:
        """The kernels of all stages that ``step`` adds for a batch. None is run."""
        staged = StagedBatch(batch, batch.token_ids, self.limits)
        tape, _ = self._taped(step, staged, Tape(NoMemory(), recorded=True))
        return {stage.kernel for stage in tape.stages}

    def _record(self, step: Callable[[], None], arena: torch.Tensor | None = None) -> RecordedSet:
        """In an arena, so that chunks may be repeated; else over the buffers that all operations share."""
        staged = StagedBatch(self._now.batch, self._now.ids, self.limits)
        room = scratch_partials(self.limits) if arena is None else step_partials(self.limits, staged.batch.num_rows)
        staged.tables = BatchTables(staged, room)
        memory = RecordedMemory(self._shared.buffers) if arena is None else ArenaMemory(arena)
        tape, results = self._taped(step, staged, Tape(memory, recorded=True))
        return RecordedSet(self.library, tape, staged.tables, results, repeats=arena is not None)

    def _taped(
        self, step: Callable[[], None], staged: StagedBatch, tape: Tape
    ) -> tuple[Tape, tuple[tuple[Rows, torch.Tensor], ...]]:
        """The tape with the stages of ``step``, and where results are to be copied from, and to."""
        before = self._staged, self._now
        self._tape, self._results, self._staged, self._now = tape, [], [staged], staged
        try:
            step()
            return tape, tuple(self._results)
        finally:
            self._tape, self._results = None, []
            self._staged, self._now = before

    @contextmanager
    def _stages(self) -> Iterator[Tape]:
        """The tape that an operation adds to."""
        tape = self._pending if self._tape is None else self._tape
        tape.forget()  # scratch is another operation's now
        yield tape

    def launch(self) -> None:
        """Runs what was added since the last time."""
        pending, self._pending = self._pending, Tape(self._shared)
        if pending.stages:
            self._steps.settle()  # whose late threads may still write to the cache
            self._pool.run(Program(self.library, pending.stages, repeats=False))

    # step

    def stage(self, batches: Sequence[ForwardBatch], rows: TableRows | None = None) -> None:
        if rows is not None:
            raise ValueError("an embedding on the disk: the CPU has it in RAM")
        self._pending, self._made = Tape(self._shared), {}  # also those of a pass that was interrupted
        self._staged = [StagedBatch(batch, self._resolve(batch.token_ids), self.limits) for batch in batches]
        self._now = self._staged[0] if self._staged else None

    def _resolve(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Replaces token -1-i by sample i of the previous step."""
        if not (token_ids < 0).any():
            return token_ids
        samples = self._samples.numpy()
        return np.where(token_ids < 0, samples[np.maximum(-1 - token_ids, 0)], token_ids).astype(np.int32)

    def select(self, batch_idx: int) -> None:
        self._now = self._staged[batch_idx]

    def choose_logits(self, rows: NDArray[np.int32]) -> None:
        self._now.tables.logit_rows = np.array(rows, np.int32)

    def fence(self) -> None:
        if self._tape is None:
            self.launch()
            self._steps.settle()

    @property
    def step_key(self) -> tuple[Hashable, ...]:
        return self._now.shape

    def embed(self, table: Linear, h: torch.Tensor, spec: EmbedSpec) -> None:
        with self._stages() as tape:
            compiled_rows.embed(tape, table, self._now.tables.ids, tape.memory.write(h), spec)

    def project(self, h: torch.Tensor, norm: Norm | None, w: Segments, out: torch.Tensor, loras: Loras = ()) -> None:
        with self._stages() as tape:
            rows = tape.memory.read(h)
            x, written = self._normed(tape, rows, norm, w), tape.memory.write(out)
            self._linears.multiply(tape, x, w, written)
            self._add_loras(tape, rows, norm, x, loras, written)

    def _add_loras(self, tape: Tape, h: Rows, norm: Norm | None, x: Rows | Records, loras: Loras, out: Rows) -> None:
        """To the product of a linear and x, which is norm(h), what adapters add."""
        runs = self._now.batch.lora_runs
        if not loras or not runs:
            return
        if isinstance(x, Records):
            normed = self._normed_rows(tape, h)
            compiled_rows.norm(tape, h, norm, normed)
            x = normed
        self._linears.add_loras(tape, x, loras, runs, out)

    def _normed(self, tape: Tape, x: Rows, norm: Norm | None, w: Segments) -> Rows | Records:
        """x as ``w`` reads it: normalized, and at once in the form that all of ``w`` take."""
        if norm is None:
            return x
        form = self._linears.record_form(w)
        if form is not None:
            records = self._records(tape, form, x.num_rows)
            compiled_rows.norm_to_records(tape, x, norm, form, records)
            return records
        normed = self._normed_rows(tape, x)
        compiled_rows.norm(tape, x, norm, normed)
        return normed

    def _normed_rows(self, tape: Tape, x: Rows) -> Rows:
        return Rows(tape.memory.scratch("normed", 4 * x.num_rows * x.width), x.width, x.num_rows, x.width)

    def _form_for(self, consumer: Segments) -> RecordForm | None:
        """The form in which a result may be handed to the linear that reads it. Adapters read it, too, in f32."""
        return None if self._now.batch.lora_runs else self._linears.record_form(consumer)

    def _records(self, tape: Tape, form: RecordForm, num_rows: int) -> Records:
        return Records(tape.memory.scratch("inputs", form.num_bytes(num_rows)), num_rows)

    def attend(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        layer_idx: int,
        kv: KVCache,
        out: torch.Tensor,
        consumer: Segments = (),
    ) -> None:
        with self._stages() as tape:
            rows, form = tape.memory.read(qkv), self._form_for(consumer)
            written, pages = tape.memory.write(out), kv.layer(layer_idx)
            records = self._attention.attend(tape, rows, spec, self._now.tables, pages, written, form, kv.windowed)
            if records is not None:
                self._made[out.data_ptr()] = records

    def gated_mlp(
        self,
        h: torch.Tensor,
        norm: Norm | None,
        w: Segments,
        spec: GatedMlp,
        out: torch.Tensor,
        consumer: Segments = (),
        loras: Loras = (),
    ) -> None:
        compiled_rows.check_activation(spec)
        with self._stages() as tape:
            num_rows, width = out.shape
            place = tape.memory.scratch("gate and up", 8 * num_rows * width)
            both = Rows(place, 2 * width, num_rows, 2 * width)
            rows = tape.memory.read(h)
            x = self._normed(tape, rows, norm, w)
            self._linears.multiply(tape, x, w, both)
            self._add_loras(tape, rows, norm, x, loras, both)
            form = self._form_for(consumer)
            if form is None:
                compiled_rows.gated(tape, both, spec, tape.memory.write(out))
                return
            records = self._made[out.data_ptr()] = self._records(tape, form, num_rows)
            compiled_rows.gated_to_records(tape, both, spec, form, records)

    def add_projection(
        self, x: torch.Tensor, w: Segments, h: torch.Tensor, branch: Branch = PLAIN_BRANCH, loras: Loras = ()
    ) -> None:
        with self._stages() as tape:
            inputs = self._made.pop(x.data_ptr(), None) or tape.memory.read(x)
            before, after = tape.memory.read(h), tape.memory.write(h)
            runs = self._now.batch.lora_runs if loras else ()
            if branch.post_norm is None:
                self._linears.multiply(tape, inputs, w, after, residual=before, scale=branch.scale)
                self._linears.add_loras(tape, inputs, loras, runs, after, branch.scale)
                return
            y = Rows(tape.memory.scratch("branch", 4 * after.num_rows * after.width), after.width, *_shape(after))
            self._linears.multiply(tape, inputs, w, y)
            self._linears.add_loras(tape, inputs, loras, runs, y)
            compiled_rows.add_normed(tape, y, branch, before, after)

    def route(
        self,
        h: torch.Tensor,
        norm: Norm,
        router: Linear,
        bias: torch.Tensor | None,
        spec: RouteSpec,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        with self._stages() as tape:
            before, normed = tape.memory.read(h), tape.memory.write(x)
            compiled_rows.norm(tape, before, norm, normed)
            chosen = tape.memory.write(ids), tape.memory.write(weights)
            self._experts.choose(tape, normed, router, bias, spec, self._now.tables.places(False).slots, *chosen)

    def experts_add(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: ExpertSet,
        spec: GatedMlp,
        h: torch.Tensor,
    ) -> None:
        compiled_rows.check_activation(spec)
        with self._stages() as tape:
            rows = (tape.memory.read(tensor) for tensor in (x, ids, weights))
            before, after = tape.memory.read(h), tape.memory.write(h)
            self._experts.add(tape, *rows, experts, spec, before, after)

    def shared_add(
        self, x: torch.Tensor, gate_up: Segments, down: Segments, gate: Linear | None, spec: GatedMlp, h: torch.Tensor
    ) -> None:
        compiled_rows.check_activation(spec)
        with self._stages() as tape:
            rows, num_rows = tape.memory.read(x), h.shape[0]
            inputs = self._gated(tape, rows, gate_up, down, spec)
            before, after = tape.memory.read(h), tape.memory.write(h)
            if gate is None:
                self._linears.multiply(tape, inputs, down, after, residual=before)
                return
            factor = Rows(tape.memory.scratch("shared gate", 4 * num_rows), 1, num_rows, 1)
            self._linears.multiply(tape, rows, (gate,), factor)
            y = Rows(tape.memory.scratch("branch", 4 * num_rows * after.width), after.width, num_rows, after.width)
            self._linears.multiply(tape, inputs, down, y)
            self._experts.add_shared(tape, y, factor, before, after)

    def _gated(self, tape: Tape, x: Rows, w: Segments, consumer: Segments, spec: GatedMlp) -> Rows | Records:
        """The product of a shared expert, in the form that ``consumer`` takes."""
        num_rows, width = x.num_rows, sum(linear.N for linear in w) // 2
        both = Rows(tape.memory.scratch("gate and up", 8 * num_rows * width), 2 * width, num_rows, 2 * width)
        self._linears.multiply(tape, x, w, both)
        form = self._linears.record_form(consumer)
        if form is None:
            product = Rows(tape.memory.scratch("shared products", 4 * num_rows * width), width, num_rows, width)
            compiled_rows.gated(tape, both, spec, product)
            return product
        records = self._records(tape, form, num_rows)
        compiled_rows.gated_to_records(tape, both, spec, form, records)
        return records

    def logits(self, h: torch.Tensor, norm: Norm, head: Linear, spec: LogitsSpec, out: torch.Tensor) -> torch.Tensor:
        rows = self._now.tables.logit_rows
        out = out[: len(rows)]
        if len(rows) == 0:
            return out
        with self._stages() as tape:
            x, width = tape.memory.read(h), h.shape[1]
            place = tape.memory.scratch("normed", 4 * len(rows) * width)
            normed = Rows(place, width, len(rows), width)
            compiled_rows.norm(tape, x, norm, normed, rows)
            written = tape.memory.write(out)
            self._linears.multiply(tape, normed, (head,), written)
            if spec != LogitsSpec():
                plain, written = written, tape.memory.write(out)
                compiled_rows.logits(tape, plain, spec, written)
        if self._tape is not None:
            if written.address != out.data_ptr():
                self._results.append((written, out))
        else:
            self.launch()
        return out

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> HostSamples:
        # torch's own threads would spin beside the pool's; the largest logit is found without torch.
        with nullcontext() if params.takes_largest else using(1):
            rows = sample(logits, params, self._sampling)
        keep_samples(rows, self._samples)
        return HostSamples(rows)


def _shape(rows: Rows) -> tuple[int, int]:
    return rows.num_rows, rows.width
