"""Where packed weights are: slabs of the host, or of a GPU and the host. The loader fills them blob by blob.

Blob 0 is the embedding, blob 1 + i layer i, the last one the head: in memory as in the packed file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.errors import KernelError, MemoryBudgetError
from exl.layout.layers import LayerLayout
from exl.memory.copies import HostCopyEngine, TorchCopyEngine
from exl.memory.device import device_tensor, pinned
from exl.memory.host import HostBuffer
from exl.memory.mapped import mapped
from exl.ops.base import LayerWeights
from exl.planning.plan import Tier
from exl.weights.device_stream import DeviceStream, DiskLayers, HostLayers, PinnedLayers
from exl.weights.packed import PackedFile
from exl.weights.reader import BufferReader
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

    def __init__(
        self, layouts: Sequence[LayerLayout], resident: Collection[int], num_buffers: int, stack: ExitStack
    ) -> None:
        """``layouts`` of all blobs; ``resident`` layers; ``stack`` closes the slabs."""
        self._layouts, self._num_buffers = layouts, num_buffers
        self._resident, self._streamed = _split(layouts, resident)
        sizes = [layout.num_bytes for layout in layouts]
        buffer_bytes = max((sizes[1 + i] for i in self._streamed), default=0)
        self._stack = stack
        layer_bytes = [sizes[1 + i] for i in self._resident]
        self.slabs = {
            "embedding": sizes[0],
            "layers": sum(layer_bytes),
            "head": sizes[-1],
            "stream buffers": num_buffers * buffer_bytes,
        }
        self.reading = stack.enter_context(ExitStack())
        slabs = {
            purpose: _host_slab(num_bytes, purpose, self.reading if purpose == "stream buffers" else stack)
            for purpose, num_bytes in self.slabs.items()
        }
        self._buffers = slabs["stream buffers"]
        memory = torch.from_numpy(slabs["layers"].array)
        pieces = memory.split(layer_bytes) if layer_bytes else ()
        self._blobs = {1 + i: piece for i, piece in zip(self._resident, pieces, strict=True)}
        self._blobs[0] = torch.from_numpy(slabs["embedding"].array)
        self._blobs[len(sizes) - 1] = torch.from_numpy(slabs["head"].array)
        self.in_memory = sorted(self._blobs)

    def blob(self, blob_idx: int) -> torch.Tensor:
        if blob_idx in self._blobs:
            return self._blobs[blob_idx]
        return torch.from_numpy(self._buffers.array)[: self._layouts[blob_idx].num_bytes].zero_()

    def filled(self, blob_idx: int) -> None:
        pass

    def view(self, blob_idx: int) -> torch.Tensor:
        return self._blobs[blob_idx]

    def source(self, packed: PackedFile | None) -> WeightSource:
        layers = self._layouts[1:-1]
        views = {i: LayerWeights.view(layers[i], self._blobs[1 + i]) for i in self._resident}
        if not self._streamed:
            self.reading.close()
            return ResidentWeights([views[i] for i in self._resident])
        sizes = {i: layers[i].num_bytes for i in self._streamed}
        arrays = _pieces(self._buffers, self._num_buffers)
        with ExitStack() as made:  # until the stream closes it
            reader = BufferReader(packed, _blobs_of(sizes), sizes, arrays, self.reading)
            made.callback(reader.close)
            stream = LayerStream(layers, views, reader)
            made.pop_all()
        self._stack.callback(stream.close)
        return stream


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
        self._resident, streamed = _split(layouts, resident)
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
        return DiskLayers(BufferReader(packed, _blobs_of(sizes), sizes, arrays, self.reading))


def _split(layouts: Sequence[LayerLayout], resident: Collection[int]) -> tuple[list[int], list[int]]:
    """Resident layers and streamed layers."""
    layers = range(len(layouts) - 2)
    if not frozenset(resident) <= frozenset(layers):
        raise ValueError(f"resident layers {sorted(resident)} of a model of {len(layers)}")
    return sorted(resident), [i for i in layers if i not in resident]


def _blobs_of(layers: Iterable[int]) -> dict[int, int]:
    return {i: 1 + i for i in layers}


def _pieces(buffer: HostBuffer, count: int) -> list[NDArray[np.uint8]]:
    """``count`` equal parts."""
    return list(buffer.array.reshape(count, -1))


def _host_slab(num_bytes: int, purpose: str, stack: ExitStack) -> HostBuffer:
    buffer = HostBuffer(num_bytes, purpose)
    stack.callback(buffer.close)
    return buffer
