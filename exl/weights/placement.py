"""Where packed weights are: slabs of the host, or of a GPU and the host. The loader fills them blob by blob.

Blob 0 is the embedding, blob 1 + i layer i, the next one the head, then come experts: in memory as in the packed file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import KernelError, MemoryBudgetError
from exl.layout.layers import ExpertLayout, LayerLayout
from exl.memory.copies import HostCopyEngine, TorchCopyEngine
from exl.memory.device import device_tensor, pinned
from exl.memory.host import HostBuffer
from exl.memory.mapped import mapped
from exl.models.manifest import ModelLayout
from exl.ops.base import ExpertSet, LayerWeights
from exl.planning.plan import Tier
from exl.weights.device_stream import DeviceStream, DiskLayers, HostLayers, PinnedLayers
from exl.weights.packed import PackedFile
from exl.weights.reader import BufferReader, StreamedLayer
from exl.weights.stream import LayerStream, ResidentWeights, WeightSource


class WeightMemory(Protocol):
    """All memory of a model's weights, allocated when it is made."""

    in_memory: Sequence[int]  # blobs that stay in memory; of the others the packed file is read while the model runs
    slabs: Mapping[str, int]  # bytes by purpose
    reading: ExitStack  # closes the buffers of a reader and the packed file, until ``source`` hands them to the reader

    def blob(self, blob_idx: int) -> torch.Tensor:
        """Zeroed u8 of the blob's size in host memory, to be filled: its final place, or staging that the next blob
        overwrites."""

    def filled(self, blob_idx: int) -> None:
        """The blob is complete: it is copied to its final place."""

    def view(self, blob_idx: int) -> torch.Tensor:
        """A blob of ``in_memory`` where it stays: on the device, or in pinned memory; the embedding there as the device
        sees it."""

    def source(self, packed: PackedFile | None) -> WeightSource:
        """The layers, by their turn. ``packed`` is among what ``reading`` closes: from here on its reader closes it, or
        it is closed now if no layer is read from it."""


class HostWeights:
    """A CPU's: resident layers, and buffers that a reader fills from the packed file."""

    def __init__(self, layouts: ModelLayout, resident: Collection[int], num_buffers: int, stack: ExitStack) -> None:
        """``resident`` layers, with their experts; ``stack`` closes the slabs."""
        self._layouts, self._num_buffers = layouts, num_buffers
        self._sizes = [blob.num_bytes for blob in layouts.blobs]
        self._head_idx = 1 + len(layouts.layers)
        self._layers = streamed_layers(layouts)
        self._resident, self._streamed = _split(len(layouts.layers), resident)
        self._stack = stack
        layers = [self._layers[i] for i in self._resident]
        buffer_bytes = max((self._layers[i].total_bytes for i in self._streamed), default=0)
        self.slabs = {
            "embedding": self._sizes[0],
            "layers": sum(layer.num_bytes for layer in layers),
            "experts": sum(layer.total_bytes - layer.num_bytes for layer in layers),
            "head": self._sizes[self._head_idx],
            "stream buffers": num_buffers * buffer_bytes,
        }
        self.reading = stack.enter_context(ExitStack())
        slabs = {
            purpose: _host_slab(num_bytes, purpose, self.reading if purpose == "stream buffers" else stack)
            for purpose, num_bytes in self.slabs.items()
        }
        self._buffers = slabs["stream buffers"]
        self._blobs = {0: torch.from_numpy(slabs["embedding"].array)}
        self._blobs[self._head_idx] = torch.from_numpy(slabs["head"].array)
        self._blobs |= self._places(slabs["layers"], [layer.blob_idx for layer in layers])
        self._blobs |= self._places(slabs["experts"], [i for layer in layers for i in layer.experts])
        self._experts = {  # of a layer, one after another
            i: torch.from_numpy(slabs["experts"].array)[start : start + found.num_bytes]
            for i, found, start in self._expert_starts()
        }
        self.in_memory = sorted(self._blobs)

    def _places(self, slab: HostBuffer, blobs: Sequence[int]) -> dict[int, torch.Tensor]:
        sizes = [self._sizes[i] for i in blobs]
        pieces = torch.from_numpy(slab.array).split(sizes) if sizes else ()
        return dict(zip(blobs, pieces, strict=True))

    def _expert_starts(self) -> Iterator[tuple[int, ExpertLayout, int]]:
        """Resident layers that are mixtures, and where in their slab their experts begin."""
        start = 0
        for i in self._resident:
            found = self._layouts.experts[i]
            if found is not None:
                yield i, found, start
                start += found.num_bytes

    def blob(self, blob_idx: int) -> torch.Tensor:
        if blob_idx in self._blobs:
            return self._blobs[blob_idx]
        return torch.from_numpy(self._buffers.array)[: self._sizes[blob_idx]].zero_()

    def filled(self, blob_idx: int) -> None:
        pass

    def view(self, blob_idx: int) -> torch.Tensor:
        return self._blobs[blob_idx]

    def source(self, packed: PackedFile | None) -> WeightSource:
        layouts = self._layouts
        views = {i: LayerWeights.view(layouts.layers[i], self._blobs[1 + i]) for i in self._resident}
        for i, memory in self._experts.items():
            views[i] = replace(views[i], experts=ExpertSet(layouts.experts[i], memory))
        if not self._streamed:
            self.reading.close()
            return ResidentWeights([views[i] for i in self._resident])
        arrays = _pieces(self._buffers, self._num_buffers)
        with ExitStack() as made:  # until the stream closes it
            streamed = {i: self._layers[i] for i in self._streamed}
            reader = BufferReader(packed, streamed, arrays, self.reading)
            made.callback(reader.close)
            stream = LayerStream(layouts.layers, views, reader, layouts.experts)
            made.pop_all()
        self._stack.callback(stream.close)
        return stream


def streamed_layers(layouts: ModelLayout) -> list[StreamedLayer]:
    """Where each layer and its experts are in the packed file."""
    found, next_blob = [], 2 + len(layouts.layers)
    for i, (layer, experts) in enumerate(zip(layouts.layers, layouts.experts, strict=True)):
        count, size = (0, 0) if experts is None else (experts.count, experts.blob.num_bytes)
        found.append(StreamedLayer(1 + i, layer.num_bytes, range(next_blob, next_blob + count), size))
        next_blob += count
    return found


class DeviceWeights:
    """A GPU's: resident blobs in one slab, and buffers that are filled from pinned layers, or from the disk through
    pinned read buffers."""

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        resident: Collection[int],
        in_host: Collection[int],
        num_buffers: int,
        device: torch.device,
        stack: ExitStack,
        embed: Tier = Tier.DEVICE,
    ) -> None:
        """``in_host``: layers that are pinned in host memory; those that are neither resident nor there are read from
        the packed file each time. ``embed``: the tier of the embedding."""
        self._layouts, self._device, self._stack = layouts, device, stack
        self._resident, streamed = _split(len(layouts) - 2, resident)
        self._in_host = [i for i in streamed if i in in_host]
        self._on_disk = [i for i in streamed if i not in in_host]
        sizes = [layout.num_bytes for layout in layouts]
        self._buffer_bytes = max((sizes[1 + i] for i in streamed), default=0)
        on_device = [*(1 + i for i in self._resident), len(sizes) - 1]
        if embed is Tier.DEVICE:
            on_device.insert(0, 0)
        pinned_bytes = [sizes[1 + i] for i in self._in_host]
        self.slabs = {
            "weights": sum(sizes[i] for i in on_device),
            "stream buffers": num_buffers * self._buffer_bytes,
            "pinned embedding": sizes[0] if embed is Tier.PINNED else 0,
            "pinned layers": sum(pinned_bytes),
            "pinned read buffers": num_buffers * max((sizes[1 + i] for i in self._on_disk), default=0),
        }
        self._num_buffers = num_buffers
        slab = device_tensor(self.slabs["weights"], device, "weights")
        pieces = slab.split([sizes[i] for i in on_device])
        self._blobs = dict(zip(on_device, pieces, strict=True))
        self._buffers = device_tensor(self.slabs["stream buffers"], device, "stream buffers")
        self.reading = stack.enter_context(ExitStack())
        self._pinned_memory = stack.enter_context(ExitStack())
        memory = self._pinned("pinned layers", pinned_bytes, self._pinned_memory).array
        host = torch.from_numpy(memory).split(pinned_bytes) if pinned_bytes else ()
        self._host_blobs = {1 + i: piece for i, piece in zip(self._in_host, host, strict=True)}
        self._mapped: dict[int, torch.Tensor] = {}  # blobs in host memory, as the device sees them
        if embed is Tier.PINNED:
            self._host_blobs[0], self._mapped[0] = self._mapped_embedding(sizes[0])
        self.in_memory = sorted((*self._blobs, *self._host_blobs))
        through = [i for i in range(len(sizes)) if i not in self._host_blobs]
        self._staging: HostBuffer | None = HostBuffer(max(sizes[i] for i in through), "staging")

    def _pinned(self, purpose: str, pieces: Sequence[int], stack: ExitStack) -> HostBuffer:
        """``pieces``: bytes of each part that is copied by itself. ``stack`` closes the memory."""
        buffer = _host_slab(self.slabs[purpose], purpose, stack)
        if self._device.type != "cuda":
            return buffer
        return stack.enter_context(pinned(buffer, self._device, pieces=pieces))

    def _mapped_embedding(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return mapped(num_bytes, "embedding", self._device, self._stack)
        except (KernelError, MemoryBudgetError) as error:
            raise MemoryBudgetError(
                f"{error}: embed='device' puts the embedding into VRAM, embed='disk' reads its rows from the disk"
            ) from error

    def blob(self, blob_idx: int) -> torch.Tensor:
        if blob_idx in self._host_blobs:
            return self._host_blobs[blob_idx]
        return torch.from_numpy(self._staging.array)[: self._layouts[blob_idx].num_bytes].zero_()

    def filled(self, blob_idx: int) -> None:
        if blob_idx in self._blobs:
            staged = torch.from_numpy(self._staging.array)[: self._layouts[blob_idx].num_bytes]
            self._blobs[blob_idx].copy_(staged)  # waits: staging is free again

    def view(self, blob_idx: int) -> torch.Tensor:
        for where in (self._blobs, self._mapped):
            if blob_idx in where:
                return where[blob_idx]
        return self._host_blobs[blob_idx]

    def source(self, packed: PackedFile | None) -> WeightSource:
        self._staging.close()
        layers = self._layouts[1:-1]
        views = {i: LayerWeights.view(layers[i], self._blobs[1 + i]) for i in self._resident}
        if not self._on_disk:
            self.reading.close()
            if not self._in_host:
                return ResidentWeights([views[i] for i in self._resident])
        tiers: list[tuple[Sequence[int], HostLayers]] = []
        with ExitStack() as made:  # until the stream closes them
            if self._in_host:
                blobs = {i: self._host_blobs[1 + i] for i in self._in_host}
                tiers.append((self._in_host, PinnedLayers(blobs, self._pinned_memory)))
                made.callback(tiers[-1][1].close)
            if self._on_disk:
                tiers.append((self._on_disk, self._disk_layers(packed)))
                made.callback(tiers[-1][1].close)
            engine = TorchCopyEngine(self._device) if self._device.type == "cuda" else HostCopyEngine()
            stream = DeviceStream(layers, views, tiers, self._buffers.split(self._buffer_bytes), engine)
            made.pop_all()
        self._stack.callback(stream.close)
        return stream

    def _disk_layers(self, packed: PackedFile) -> DiskLayers:
        sizes = {i: self._layouts[1 + i].num_bytes for i in self._on_disk}
        pieces = [max(sizes.values())] * self._num_buffers
        arrays = _pieces(self._pinned("pinned read buffers", pieces, self.reading), self._num_buffers)
        layers = {i: StreamedLayer(1 + i, num_bytes) for i, num_bytes in sizes.items()}
        return DiskLayers(BufferReader(packed, layers, arrays, self.reading))


def _split(num_layers: int, resident: Collection[int]) -> tuple[list[int], list[int]]:
    """Resident layers and streamed layers."""
    layers = range(num_layers)
    if not frozenset(resident) <= frozenset(layers):
        raise ValueError(f"resident layers {sorted(resident)} of a model of {len(layers)}")
    return sorted(resident), [i for i in layers if i not in resident]


def _pieces(buffer: HostBuffer, count: int) -> list[NDArray[np.uint8]]:
    """``count`` equal parts."""
    return list(buffer.array.reshape(count, -1))


def _host_slab(num_bytes: int, purpose: str, stack: ExitStack) -> HostBuffer:
    buffer = HostBuffer(num_bytes, purpose)
    stack.callback(buffer.close)
    return buffer
