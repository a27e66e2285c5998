"""Checkpoint -> blobs, in memory and in the packed file, in one pass.

Host memory while loading is what stays (resident weights, stream slots) and, where there is no packed file to read
from, two layers as the checkpoint has them, and the block of one matrix that is being unpacked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from exl.checkpoint import Checkpoint
from exl.config import ModelConfig
from exl.errors import CheckpointError
from exl.formats import load_part, read_vector
from exl.host_memory import HostBuffer, trim_heap
from exl.layout import LayerLayout
from exl.models.manifest import ModelManifest
from exl.ops.base import LayerWeights, Linear, Ops, view_field, view_segments
from exl.packed import PackedFile, PackedWriter
from exl.packed_store import default_packed_folder, packed_key, packed_path, source_name
from exl.progress import Progress
from exl.quant_config import QuantConfig
from exl.read_ahead import LayerReadAhead
from exl.stream import LayerStream, ResidentWeights, WeightSource

logger = logging.getLogger(__name__)

_READ_THREADS = 2  # one waits for the disk while the other compares checksums


@dataclass(frozen=True)
class ModelWeights:
    """Weights ready to run. ``close`` gives their memory back; nothing of them may be used afterwards."""

    embed: Linear
    final_norm: torch.Tensor  # [C] f32
    head: Linear
    source: WeightSource
    slabs: Mapping[str, int]  # bytes by purpose: "embedding", "layers", "head", "slots"
    _owned: ExitStack

    def close(self) -> None:
        """Ends the stream's thread, too. May be called again."""
        self._owned.close()


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig | None,
    manifest: ModelManifest,
    ops: Ops,
    progress: Progress | None = None,
    *,
    resident: Collection[int] | None = None,
    num_slots: int = 2,
    packed_folder: Path | None = None,
) -> ModelWeights:
    """``resident``: the layers that stay in memory (None: all); the others are streamed through ``num_slots`` slots
    from the packed file in ``packed_folder`` (default: the user's cache), which is written first where there is none.
    Where nothing is streamed no packed file is written, and one is read only if the folder is given.

    ``progress`` is told in bytes of packed weights. What raises leaves nothing behind, Ctrl-C included. Raises
    ``CheckpointError`` for what only the data can show to be wrong, ``MemoryBudgetError`` where the system has no
    memory, ``ExlError`` that names folder, bytes needed and bytes free where the packed file has no room.
    """
    layers = range(config.num_layers)
    kept = frozenset(layers if resident is None else resident)
    if not kept <= frozenset(layers):
        raise ValueError(f"resident layers {sorted(kept)} of a model of {config.num_layers}")
    loader = _Loader(checkpoint, config, quant, manifest, ops, kept, num_slots, progress or (lambda done, total: None))
    with ExitStack() as stack:
        weights = loader.load(stack, packed_folder)
        trim_heap()
        return weights


class _Loader:
    """Blob 0 is the embedding, blob 1 + i layer i, the last one the head: in memory as in the packed file."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        quant: QuantConfig | None,
        manifest: ModelManifest,
        ops: Ops,
        resident: frozenset[int],
        num_slots: int,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.config, self.quant = checkpoint, config, quant
        self.manifest, self.ops, self.progress = manifest, ops, progress
        self.layouts = manifest.layouts(ops.target)
        self.all_layouts = (self.layouts.embed, *self.layouts.layers, self.layouts.head)
        self.sizes = [layout.num_bytes for layout in self.all_layouts]
        self.resident = sorted(resident)
        self.streamed = [i for i in range(config.num_layers) if i not in resident]
        self.num_slots = num_slots
        self.blobs: dict[int, torch.Tensor] = {}  # of what stays in memory, by blob
        self.done = 0

    def load(self, stack: ExitStack, packed_folder: Path | None) -> ModelWeights:
        slabs = self._allocate(stack)
        packed = None
        if self.streamed or packed_folder is not None:
            packed = self._read_packed(packed_folder or default_packed_folder(), stack)
        if packed is None and self.streamed:
            staging = torch.from_numpy(slabs["slots"].array)
            packed = self._pack_to_file(packed_folder or default_packed_folder(), staging, stack)
        elif packed is None:
            self._pack(None, None)
        return self._assemble(slabs, packed, stack)

    def _allocate(self, stack: ExitStack) -> dict[str, HostBuffer]:
        """One slab a purpose; the blobs that stay are views of them."""
        layer_bytes = [self.layouts.layers[i].num_bytes for i in self.resident]
        slot_bytes = max((self.layouts.layers[i].num_bytes for i in self.streamed), default=0)
        sizes = {
            "embedding": self.layouts.embed.num_bytes,
            "layers": sum(layer_bytes),
            "head": self.layouts.head.num_bytes,
            "slots": self.num_slots * slot_bytes,
        }
        slabs = {}
        for purpose, num_bytes in sizes.items():
            slabs[purpose] = HostBuffer(num_bytes, purpose)
            stack.callback(slabs[purpose].close)
        memory = torch.from_numpy(slabs["layers"].array)
        pieces = memory.split(layer_bytes) if layer_bytes else ()
        self.blobs = {1 + i: piece for i, piece in zip(self.resident, pieces, strict=True)}
        self.blobs[0] = torch.from_numpy(slabs["embedding"].array)
        self.blobs[len(self.sizes) - 1] = torch.from_numpy(slabs["head"].array)
        return slabs

    # from the packed file

    def _key(self) -> bytes:
        packer = f"torch {torch.__version__}"
        return packed_key(self.checkpoint, self.quant, self.all_layouts, self.ops.target, packer)

    def _read_packed(self, folder: Path, stack: ExitStack) -> PackedFile | None:
        """Fills the blobs that stay from a valid packed file. None: there is none, or one that turned out damaged."""
        key = self._key()
        packed = PackedFile.open(packed_path(folder, self.checkpoint.path, key), key, self.sizes)
        if packed is None:
            return None
        stack.callback(packed.close)
        stopped = threading.Event()
        total, done = sum(self.sizes[i] for i in self.blobs), 0
        with ThreadPoolExecutor(_READ_THREADS, "exl packed reader") as executor:
            try:
                jobs: dict[Future, int] = {
                    executor.submit(packed.read_blob, i, blob.numpy(), lambda: not stopped.is_set()): self.sizes[i]
                    for i, blob in sorted(self.blobs.items())
                }
                for job in as_completed(jobs):
                    job.result()
                    done += jobs[job]
                    self.progress(done, total)
                return packed
            except CheckpointError as error:
                logger.warning("%s; packing again", error)
            finally:
                stopped.set()
                executor.shutdown(wait=True, cancel_futures=True)
        for blob in self.blobs.values():
            blob.zero_()
        return None

    # from the checkpoint

    def _pack_to_file(self, folder: Path, staging: torch.Tensor, stack: ExitStack) -> PackedFile:
        key, stamps = self._key(), self.checkpoint.modified_ns
        path = packed_path(folder, self.checkpoint.path, key)
        with PackedWriter(path, key, source_name(self.checkpoint.path), self.sizes) as writer:
            self._pack(writer, staging)
            if self.checkpoint.modified_ns != stamps:
                raise CheckpointError(f"{self.checkpoint.path}: its files were changed while they were being packed")
            writer.commit()
        packed = PackedFile.open(path, key, self.sizes)
        if packed is None:
            raise CheckpointError(f"{path}: packed weights were changed right after they had been written")
        stack.callback(packed.close)
        return packed

    def _pack(self, writer: PackedWriter | None, staging: torch.Tensor | None) -> None:
        """Every blob once, in order: into its place where it stays, through ``staging`` where it only goes to the
        file."""
        names = self.manifest.names
        self.done = 0
        prefixes = [f"{names.layers}.{i}." for i in range(self.config.num_layers)]
        with LayerReadAhead(self.checkpoint, self._tensor_names(prefixes)) as layers:
            self._pack_blob(0, self.checkpoint, "", {}, writer, staging)
            for i, prefix in enumerate(prefixes):
                self._pack_blob(1 + i, layers.layer(i), prefix, dict(names.norms), writer, staging)
        final_norm = {"final_norm": names.final_norm}
        self._pack_blob(len(self.sizes) - 1, self.checkpoint, "", final_norm, writer, staging)

    def _tensor_names(self, prefixes: list[str]) -> list[list[str]]:
        """Tensors that are packed, by layer."""
        by_layer: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
        for name in self.checkpoint.tensors:
            head = self.manifest.names.layers + "."
            prefix = head + name[len(head) :].split(".")[0] + "."
            if name.startswith(head) and prefix in by_layer and not name.endswith(self.manifest.names.ignored):
                by_layer[prefix].append(name)
        return list(by_layer.values())

    def _pack_blob(
        self,
        blob_idx: int,
        checkpoint: Checkpoint,
        prefix: str,
        norms: dict[str, str],
        writer: PackedWriter | None,
        staging: torch.Tensor | None,
    ) -> None:
        layout = self.all_layouts[blob_idx]
        blob = self.blobs.get(blob_idx)
        if blob is None:
            blob = staging[: layout.num_bytes].zero_()  # of the layer before it
        self._fill(blob, layout, checkpoint, prefix, norms)
        if writer is not None:
            writer.write(blob.numpy())
        self.done += layout.num_bytes
        self.progress(self.done, self.layouts.num_bytes)

    def _fill(
        self, blob: torch.Tensor, layout: LayerLayout, checkpoint: Checkpoint, prefix: str, norms: dict[str, str]
    ) -> None:
        for key in layout.fields.keys() & norms.keys():
            vector = torch.from_numpy(read_vector(checkpoint, prefix + norms[key]))
            view_field(blob, layout.fields[key]).copy_(vector)
        for key, linears in layout.linears.items():
            for i, linear in enumerate(linears):
                start, stop = layout.linear_range(key, i)
                parts = [load_part(checkpoint, part, self.quant) for part in linear.spec.parts]
                self.ops.pack(parts, linear, blob[start:stop])
                self.progress(self.done + stop, self.layouts.num_bytes)

    # what the model runs on

    def _assemble(self, slabs: dict[str, HostBuffer], packed: PackedFile | None, stack: ExitStack) -> ModelWeights:
        layouts, last = self.layouts, len(self.sizes) - 1
        views = {i: LayerWeights.view(layouts.layers[i], self.blobs[1 + i]) for i in self.resident}
        source: WeightSource
        if self.streamed:
            blob_indices = {i: 1 + i for i in self.streamed}
            source = LayerStream(layouts.layers, views, packed, blob_indices, slabs["slots"], self.num_slots)
            stack.callback(source.close)
        else:
            source = ResidentWeights([views[i] for i in self.resident])
        embed = view_segments(layouts.embed, self.blobs[0], "embed")[0]
        return ModelWeights(
            embed=embed,
            final_norm=view_field(self.blobs[last], layouts.head.fields["final_norm"]),
            head=view_segments(layouts.head, self.blobs[last], "head")[0] if layouts.head.linears else embed,
            source=source,
            slabs={purpose: slab.num_bytes for purpose, slab in slabs.items()},
            _owned=stack.pop_all(),
        )
