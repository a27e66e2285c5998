"""The order of a pass: layer by layer over a prefill window, chunk by chunk within a layer. Owns the step buffers.

Layer-major order means that a streamed layer's weights cross the bus once per prefill window, not once per chunk. A
decode step is a window of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from exl.batch import ForwardBatch, is_step, step_bucket
from exl.cache.kv import KVCache
from exl.engine.step_graph import StepGraphs
from exl.layout.steps import StepLimits
from exl.models.decoder import Decoder, StepBuffers
from exl.request_options import PromptProgress
from exl.threads import layer_kind
from exl.weights.loader import ModelWeights
from exl.weights.stream import ResidentWeights, WeightSource

_NOTHING = nullcontext()


class _Teller:
    """Calls a prompt's ``progress`` with what its windows have come to."""

    def __init__(
        self, progress: Callable[[PromptProgress], None], batches: Sequence[ForwardBatch], num_layers: int
    ) -> None:
        self._progress, self._num_layers = progress, num_layers
        self._total = sum(batch.num_rows for batch in batches)
        self._before = self._window = 0  # tokens of earlier windows, and of the present one

    def begin(self, chunks: Sequence[ForwardBatch]) -> None:
        self._before += self._window
        self._window = sum(batch.num_rows for batch in chunks)

    def layer_done(self, layer_idx: int) -> None:
        layers = layer_idx + 1
        tokens = self._before + self._window * layers // self._num_layers
        self._progress(PromptProgress(tokens, self._total, layers, self._num_layers))


class Runner:
    def __init__(
        self,
        decoder: Decoder,
        weights: ModelWeights,
        kv: KVCache,
        limits: StepLimits,
        *,
        graphs: bool = True,
    ) -> None:
        self.decoder, self.kv, self.limits = decoder, kv, limits
        self.weights: WeightSource = weights.source
        self._embed, self._final_norm, self._head = weights.embed, weights.final_norm, weights.head
        self._embed_rows = weights.embed_rows

        buffer = decoder.ops.buffer
        self._residual = buffer("residual")
        self._buffers = StepBuffers(qkv=buffer("qkv"), attn=buffer("attn"), mlp=buffer("mlp"))
        self._logits = buffer("logits")
        self.graphs = StepGraphs(decoder.ops, self.weights) if graphs and decoder.ops.captures else None

    @property
    def decode_steps(self) -> str | None:
        """How decode steps run, see ``LLM.decode_steps``."""
        if not self.decoder.ops.captures:
            return None
        return "launched one by one, as asked" if self.graphs is None else self.graphs.describe()

    def forward(
        self, batches: Sequence[ForwardBatch], progress: Callable[[PromptProgress], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """Runs the batches, later ones seeing what earlier ones cached. Yields each batch's logits f32 [R, V],
        a view that is valid until the next is asked for. To be exhausted: a batch runs when its prefill
        window's turn comes. ``progress`` is called after each layer of a window.
        """
        ops = self.decoder.ops
        tell = None if progress is None else _Teller(progress, batches, self.decoder.config.num_layers)
        try:
            for chunks in self._prefill_windows(batches):
                small = chunks[0].num_rows <= ops.captures
                if self.graphs is not None and len(chunks) == 1 and small and is_step(chunks[0]):
                    yield self._step(self.graphs, chunks[0])
                    continue
                if tell is not None:
                    tell.begin(chunks)
                rows = self._run_layers(chunks, tell)
                for i, h in enumerate(rows):
                    ops.select(i)
                    with self._like(h.shape[0]):
                        logits = self.decoder.head(self._final_norm, self._head, h, self._logits)
                    yield logits
        finally:
            ops.stage(())

    def _step(self, graphs: StepGraphs, batch: ForwardBatch) -> torch.Tensor:
        decoder, ops = self.decoder, self.decoder.ops
        fewest = 1 if ops.backend is None else 8  # a tensor core's product has eight rows
        padded = step_bucket(batch, min(ops.captures, len(self._logits)), self.limits.max_sequences, fewest)
        ops.stage((padded,), self._embed_rows)
        h = self._residual[: padded.num_rows]

        def step() -> None:
            ops.fence()  # nothing to overlap with: before it is a copy, or the beginning of a graph
            decoder.embed(self._embed, h)
            self._through_layers([h])
            decoder.head(self._final_norm, self._head, h, self._logits)

        graphs.run(ops.step_key, step)
        return self._logits[: batch.num_rows]

    def _run_layers(self, chunks: Sequence[ForwardBatch], tell: _Teller | None) -> list[torch.Tensor]:
        decoder, ops = self.decoder, self.decoder.ops
        ops.stage(chunks, self._embed_rows)
        rows: list[torch.Tensor] = []
        start = 0
        for i, batch in enumerate(chunks):
            rows.append(self._residual[start : start + batch.num_rows])
            start += batch.num_rows
            ops.select(i)
            decoder.embed(self._embed, rows[i])
        self._through_layers(rows, tell)
        return rows

    def _through_layers(self, rows: Sequence[torch.Tensor], tell: _Teller | None = None) -> None:
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
                    decoder.layer(layer_idx, weights, buffers[i], h, self.kv)
            ops.launch()
            self.weights.release(layer_idx)
            if tell is not None:
                tell.layer_done(layer_idx)

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
