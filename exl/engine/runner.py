"""The order of a pass: layer by layer over a prefill window, chunk by chunk within a layer. Owns the step buffers.

Layer-major order means that a streamed layer's weights cross the bus once per prefill window, not once per chunk. A
decode step is a window of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import ForwardBatch, SamplingBatch, is_step, step_bucket
from exl.cache.kv import KVCache
from exl.engine.compose import ChunkRules
from exl.engine.guidance import GuidedRow, guide
from exl.engine.step_graph import StepGraphs
from exl.layout.attention import MAX_NEW_TOKENS
from exl.layout.steps import StepLimits
from exl.models.decoder import Decoder, StepBuffers
from exl.ops.base import Samples
from exl.ops.rope import depends_on_length
from exl.ops.turned_keys import turn_keys
from exl.threads import layer_kind
from exl.weights.loader import ModelWeights
from exl.weights.stream import ResidentWeights, WeightSource

_NOTHING = nullcontext()
OnLayer = Callable[[int, int], None]  # layers done, layers
OnChunks = Callable[[range, int, int], None]  # which chunks of a step; layers that they went through, layers


class Runner:
    def __init__(
        self,
        decoder: Decoder,
        weights: ModelWeights,
        kv: KVCache,
        limits: StepLimits,
        *,
        windows: KVCache | None = None,
        graphs: bool = True,
        max_decode_prompt: int = 1,
    ) -> None:
        """``windows``: of layers that have a window and pages of their own; ``kv`` has the others.
        ``max_decode_prompt``: prompts up to this length run as decode rows, whose kernels are faster there."""
        self.decoder, self.kv, self.windows, self.limits = decoder, kv, windows, limits
        self._cache_of = [kv if windows is None or i in kv else windows for i in range(decoder.config.num_layers)]
        self.weights: WeightSource = weights.source
        self._embed, self._final_norm, self._head = weights.embed, weights.final_norm, weights.head
        self._embed_rows = weights.embed_rows

        buffer = decoder.ops.buffer
        self._residual = buffer("residual")
        self._buffers = StepBuffers.of(decoder.ops, decoder.config)
        self._logits = buffer("logits")
        self.graphs = StepGraphs(decoder.ops, self.weights) if graphs and decoder.ops.captures else None
        self.rules = ChunkRules(
            chunk=limits.chunk_rows,
            max_decode_prompt=min(max_decode_prompt, limits.chunk_rows),
            max_decode_rows=min(MAX_NEW_TOKENS, limits.max_rows),
            invariant_rows=decoder.ops.invariant_rows,
            decode_alike=decoder.ops.decode_alike,
            by_length=any(map(depends_on_length, decoder.config.ropes)),
        )
        # With streamed layers, one crossing of the bus serves all rows of a step.
        self._one_window = not isinstance(self.weights, ResidentWeights)
        self.keeps_all_rows, self.max_logit_rows = self._one_window, limits.max_logit_rows
        self.step_tokens = limits.window_rows - limits.decode_rows if self._one_window else limits.chunk_rows
        # The window that the residual stream's buffer holds: its batches' rows, and which of them is chunk 0 of a step.
        self._rows: list[torch.Tensor] = []
        self._first_chunk = 0
        self.max_sequences, self.vocab_size = limits.max_sequences, limits.vocab_size
        self.runs_ahead = decoder.ops.runs_ahead

    @property
    def decode_steps(self) -> str | None:
        """How decode steps run, see ``LLM.decode_steps``."""
        if not self.decoder.ops.captures:
            return None
        return "launched one by one, as asked" if self.graphs is None else self.graphs.describe()

    # ---- what a scheduler asks for (``exl.engine.device.Device``)

    def step(
        self,
        decode: ForwardBatch | None,
        chunks: Sequence[ForwardBatch],
        on_layer: OnChunks | None = None,
        keep_rows: bool = False,
    ) -> torch.Tensor:
        """Logits f32 [R, V] of the decode rows, then of each chunk's logit rows: a view that is valid until the next
        call. ``on_layer`` is called after each layer that chunks went through. ``keep_rows``: the last window
        stays staged, and its rows in the residual stream's buffer, for ``prompt_logits`` and ``final_states``."""
        at, first, kept = 0, 0, False
        try:
            if decode is not None and not (self._one_window and chunks):
                at = len(self._decode(decode))
                decode = None
            if self._one_window:
                windows = self._prefill_windows([batch for batch in (decode, *chunks) if batch is not None])
            else:
                windows = ([batch] for batch in chunks)
            for window in windows:
                count = len(window) - (window[0] is decode)
                tell = None if on_layer is None else functools.partial(on_layer, range(first, first + count))
                at += len(self._pass(window, at, tell))
                self._first_chunk = len(window) - count - first
                first += count
            kept = keep_rows
        finally:
            if not kept:
                self.abandon()
        return self._logits[:at]

    def guide(self, logits: torch.Tensor, rows: Sequence[GuidedRow]) -> None:
        self.decoder.ops.fence()  # the pass is at its end before, and the draw begins after
        guide(logits, rows)

    def prompt_logits(self, chunk: int, rows: range) -> torch.Tensor:
        i = self._kept(chunk)
        self.decoder.ops.fence()  # draws from what is overwritten now have ended
        return self._head_of(i, self._rows[i], 0, np.arange(rows.start, rows.stop, dtype=np.int32))

    def final_states(self, chunk: int, rows: range) -> NDArray[np.float64]:
        h = self._rows[self._kept(chunk)][rows.start : rows.stop].to("cpu").numpy().astype(np.float64)
        norm = self.decoder.config.norm
        if norm.kind == "layer":
            h -= h.mean(axis=1, keepdims=True)
        mean = np.square(h).mean(axis=1, keepdims=True)
        return h / np.sqrt(mean + norm.eps) * self._final_weight

    @functools.cached_property
    def _final_weight(self) -> NDArray[np.float64]:
        return self._final_norm.to("cpu").numpy().astype(np.float64)

    def _kept(self, chunk: int) -> int:
        """Which batch of the last window is this chunk of the last step."""
        i = self._first_chunk + chunk
        if not 0 <= i < len(self._rows):
            raise ValueError(f"chunk {chunk}: its rows are gone, the buffer holds those of {len(self._rows)} batches")
        return i

    def sample(self, logits: torch.Tensor, params: SamplingBatch) -> Samples:
        return self.decoder.ops.sample(logits, params)

    def zero_pages(self, pages: Sequence[int]) -> None:
        self.decoder.ops.fence()
        self.kv.zero_pages(pages)

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        self.decoder.ops.fence()  # a late thread of the last step may still write to its page
        self.kv.copy_pages(src, dst)

    def zero_windows(self, pages: Sequence[int]) -> None:
        """``zero_pages`` of ``windows``."""
        self.decoder.ops.fence()
        self.windows.zero_pages(pages)

    def copy_windows(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """``copy_pages`` of ``windows``."""
        self.decoder.ops.fence()
        self.windows.copy_pages(src, dst)

    def turn_pages(self, src: Sequence[int], dst: Sequence[int], num_positions: int) -> None:
        ops = self.decoder.ops
        ops.fence()
        ropes = [layer.attention.rope for layer in self.decoder.config.layers]
        turn_keys(self.kv, ropes, src, dst, num_positions, on_gpu=ops.backend is not None)

    def abandon(self) -> None:
        self._rows = []
        self.decoder.ops.stage(())

    def is_lost(self) -> bool:
        """CUDA's worst errors stay: from then on, every call returns them (CUDA's documentation of its error codes)."""
        try:
            if self.decoder.ops.device.type == "cuda":
                torch.cuda.synchronize(self.decoder.ops.device)
        except RuntimeError:
            return True
        return False

    # ---- passes

    def forward(self, batches: Sequence[ForwardBatch]) -> Iterator[torch.Tensor]:
        """Runs the batches, later ones seeing what earlier ones cached. Yields each batch's logits f32 [R, V],
        a view that is valid until the next is asked for. To be exhausted: a batch runs when its prefill
        window's turn comes.
        """
        try:
            for chunks in self._prefill_windows(batches):
                if self._replays(chunks):
                    yield self._step(self.graphs, chunks[0])
                    continue
                rows = self._run_layers(chunks)
                for i, h in enumerate(rows):
                    yield self._head_of(i, h, 0)
        finally:
            self.abandon()

    def _pass(self, chunks: Sequence[ForwardBatch], at: int, on_layer: OnLayer | None) -> torch.Tensor:
        """One window through all layers; its logits, which are at row ``at`` of the buffer."""
        if at == 0 and self._replays(chunks):
            return self._step(self.graphs, chunks[0])
        rows, start = self._run_layers(chunks, on_layer), at
        for i, h in enumerate(rows):
            at += len(self._head_of(i, h, at))
        return self._logits[start:at]

    def _decode(self, batch: ForwardBatch) -> torch.Tensor:
        """A scheduler's decode rows, whose logits come first."""
        if self.graphs is not None and batch.num_rows <= self.decoder.ops.captures:
            return self._step(self.graphs, batch)
        return self._pass([batch], 0, None)

    def _replays(self, chunks: Sequence[ForwardBatch]) -> bool:
        small = len(chunks) == 1 and chunks[0].num_rows <= self.decoder.ops.captures
        return self.graphs is not None and small and is_step(chunks[0])

    def _head_of(self, i: int, h: torch.Tensor, at: int, rows: NDArray[np.int32] | None = None) -> torch.Tensor:
        """Logits of batch i of the window, whose rows are ``h``: of those that it asked for, or of these."""
        self.decoder.ops.select(i)
        if rows is not None:
            self.decoder.ops.choose_logits(rows)
        with self._like(h.shape[0]):
            return self.decoder.head(self._final_norm, self._head, h, self._logits[at:])

    def _step(self, graphs: StepGraphs, batch: ForwardBatch) -> torch.Tensor:
        decoder, ops = self.decoder, self.decoder.ops
        fewest = 1 if ops.backend is None else 8  # a tensor core's product has eight rows
        padded = step_bucket(batch, min(ops.captures, len(self._logits)), self.limits.max_sequences, fewest)
        ops.stage((padded,), self._embed_rows)
        self._rows = []  # a replayed step leaves them elsewhere
        h = self._residual[: padded.num_rows]

        def step() -> None:
            ops.fence()  # nothing to overlap with: before it is a copy, or the beginning of a graph
            decoder.embed(self._embed, h)
            self._through_layers([h])
            decoder.head(self._final_norm, self._head, h, self._logits)

        graphs.run(ops.step_key, step)
        return self._logits[: batch.num_rows]

    def _run_layers(self, chunks: Sequence[ForwardBatch], on_layer: OnLayer | None = None) -> list[torch.Tensor]:
        decoder, ops = self.decoder, self.decoder.ops
        self._rows = []
        ops.stage(chunks, self._embed_rows)
        rows: list[torch.Tensor] = []
        start = 0
        for i, batch in enumerate(chunks):
            rows.append(self._residual[start : start + batch.num_rows])
            start += batch.num_rows
            ops.select(i)
            decoder.embed(self._embed, rows[i])
        self._through_layers(rows, on_layer)
        self._rows = rows
        return rows

    def _through_layers(self, rows: Sequence[torch.Tensor], on_layer: OnLayer | None = None) -> None:
        decoder, ops = self.decoder, self.decoder.ops
        order = range(decoder.config.num_layers)
        buffers = [self._buffers.rows(h.shape[0]) for h in rows]
        self.weights.begin(order)
        for layer_idx in order:
            weights = self.weights.acquire(layer_idx)
            if not isinstance(self.weights, ResidentWeights):
                ops.fence()
            for i, h in enumerate(rows):
                ops.select(i)
                with self._measured(h.shape[0]):
                    decoder.layer(layer_idx, weights, buffers[i], h, self._cache_of[layer_idx])
            ops.launch()
            self.weights.release(layer_idx)
            if on_layer is not None:
                on_layer(layer_idx + 1, len(order))

    def _measured(self, num_rows: int) -> AbstractContextManager[None]:
        """Around one layer: with as many threads as are fastest on the CPU for so many rows."""
        threads = self.decoder.ops.threads
        return _NOTHING if threads is None else threads.measured(layer_kind(num_rows), num_rows)

    def _like(self, num_rows: int) -> AbstractContextManager[None]:
        threads = self.decoder.ops.threads
        return _NOTHING if threads is None else threads.like(layer_kind(num_rows))

    def _prefill_windows(self, batches: Sequence[ForwardBatch]) -> Iterator[list[ForwardBatch]]:
        """The batches in groups that fit into the buffers of one prefill window."""
        chunks: list[ForwardBatch] = []
        num_rows = num_sequences = 0
        for batch in batches:
            if batch.num_rows > self.limits.max_rows:
                raise ValueError(f"batch of {batch.num_rows} rows, buffers are made for {self.limits.max_rows}")
            if len(batch.logit_rows) > self.limits.max_logit_rows:
                raise ValueError(f"{len(batch.logit_rows)} logit rows, expected <= {self.limits.max_logit_rows}")
            limits, sequences = self.limits, num_sequences + batch.num_sequences
            if chunks and (num_rows + batch.num_rows > limits.window_rows or sequences > limits.window_sequences):
                yield chunks
                chunks, num_rows, num_sequences = [], 0, 0
            chunks.append(batch)
            num_rows += batch.num_rows
            num_sequences += batch.num_sequences
        if chunks:
            yield chunks
