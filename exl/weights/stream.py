"""Gives a pass each layer's weights in time: from memory if the layer is resident, else read ahead from disk."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from exl.errors import ExlError
from exl.layout.layers import ExpertLayout, LayerLayout
from exl.ops.base import LayerWeights
from exl.weights.reader import BufferReader, StreamStats


class WeightSource(Protocol):
    """A pass announces its order of layers, then takes and returns them one by one."""

    def begin(self, order: Sequence[int]) -> None: ...

    def acquire(self, layer_idx: int) -> LayerWeights: ...

    def release(self, layer_idx: int) -> None: ...

    @property
    def capturable(self) -> bool:
        """Whether a pass can be captured in a graph: each layer is always at the same address and nothing waits."""

    @property
    def stats(self) -> StreamStats:
        """What was read from the disk so far. From any thread."""


class ResidentWeights:
    """All layers stay in memory."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self.layers = tuple(layers)

    def begin(self, order: Sequence[int]) -> None:
        pass

    def acquire(self, layer_idx: int) -> LayerWeights:
        return self.layers[layer_idx]

    def release(self, layer_idx: int) -> None:
        pass

    @property
    def capturable(self) -> bool:
        return True

    @property
    def stats(self) -> StreamStats:
        return StreamStats()


class LayerStream:
    """Some layers stay in memory; the others are read ahead from the packed file, in the order that a pass announces.
    After the end of the order, reading continues at its start, because passes repeat.

    ``acquire`` waits for the layer; its weights are valid until ``release``. Only one pass runs at a time; ``begin``
    ends an interrupted one. ``acquire`` raises errors of the reader as ``CheckpointError`` that names the file.
    """

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        resident: Mapping[int, LayerWeights],
        reader: BufferReader,
        experts: Sequence[ExpertLayout | None] = (),
    ) -> None:
        """``resident``: views by layer, of memory that the caller owns. ``reader`` has the other layers and is closed
        with the stream. ``experts``: by layer; (): there are none."""
        self._layouts, self._resident = tuple(layouts), dict(resident)
        self._experts = tuple(experts) or (None,) * len(self._layouts)
        self._num_layers = len(self._layouts)
        if reader.sizes.keys() & self._resident.keys() or len(reader.sizes) + len(resident) != self._num_layers:
            raise ValueError("each layer must be either resident or streamed")
        self._tensors = [torch.from_numpy(buffer.array) for buffer in reader.buffers]
        self._views: dict[tuple[int, int], LayerWeights] = {}
        self._reader = reader
        # Runs even if nobody calls close(), at the latest when the interpreter exits.
        self._finalizer = weakref.finalize(self, reader.close)
        self.begin(range(self._num_layers))

    @property
    def stats(self) -> StreamStats:
        return self._reader.stats

    def begin(self, order: Sequence[int]) -> None:
        self._check_open()
        streamed = tuple(layer_idx for layer_idx in order if layer_idx not in self._resident)
        unknown = [layer_idx for layer_idx in order if not 0 <= layer_idx < self._num_layers]
        if unknown:
            raise ValueError(f"layer {unknown[0]} of a model of {self._num_layers}")
        self._reader.begin(streamed)

    def acquire(self, layer_idx: int) -> LayerWeights:
        self._check_open()
        if layer_idx in self._resident:
            return self._resident[layer_idx]
        buffer_idx = self._reader.acquire(layer_idx)
        weights = self._views.get((layer_idx, buffer_idx))
        if weights is None:
            weights = LayerWeights.view(self._layouts[layer_idx], self._tensors[buffer_idx], self._experts[layer_idx])
            self._views[layer_idx, buffer_idx] = weights
        return weights

    def release(self, layer_idx: int) -> None:
        if layer_idx not in self._resident:
            self._reader.release(layer_idx)

    @property
    def capturable(self) -> bool:
        return False

    def wait_until_idle(self, timeout_seconds: float = 60.0) -> bool:
        """Waits until there is nothing left to read ahead, to count what a pass reads. Returns False on timeout."""
        return self._reader.wait_until_idle(timeout_seconds)

    def close(self) -> None:
        """Closes the reader, as ``BufferReader.close``. Later calls of ``begin`` and ``acquire`` raise ``ExlError``."""
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ExlError("the weights are closed")
