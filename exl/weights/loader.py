"""Checkpoint -> blobs, in memory and in the packed file, in one pass.

Host memory while loading: what stays (resident weights, stream buffers) and, if there is no packed file to read from,
the memory that the checkpoint is read ahead into (``read_ahead_bytes``) and the block of one matrix that is being
unpacked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError
from exl.formats.load import expect_orders, load_part
from exl.formats.tensors import read_norm
from exl.layout.layers import LayerLayout, LinearLayout, packs_in_order
from exl.layout.specs import ExpertSpec
from exl.memory.host import trim_heap
from exl.models.packing_order import packing_order
from exl.ops.base import Linear, Ops, TableRows, view_field, view_segments
from exl.planning.from_headers import ModelFiles
from exl.planning.plan import Tier
from exl.progress import Progress
from exl.threads import thread_limit
from exl.weights.packed import PackedFile, PackedRows, PackedWriter
from exl.weights.packed_store import default_packed_folder, packed_key, packed_path, source_name
from exl.weights.placement import DeviceWeights, HostWeights, WeightMemory
from exl.weights.read_ahead import ReadAhead
from exl.weights.stream import WeightSource

logger = logging.getLogger(__name__)

_READ_THREADS = 6  # enough of them wait for the disk while others compare checksums


@dataclass(frozen=True)
class ModelWeights:
    """Weights ready to run. ``close`` gives their memory back; nothing of them may be used afterwards."""

    embed: Linear  # the table, or if it is on the disk the rows that ``Ops.stage`` has copied
    final_norm: torch.Tensor  # [C] f32
    head: Linear
    source: WeightSource
    slabs: Mapping[str, int]  # bytes by purpose
    _owned: ExitStack
    embed_rows: TableRows | None = None  # of an embedding on the disk

    def close(self) -> None:
        """Ends the stream's thread, too. May be called again."""
        self._owned.close()


@dataclass(frozen=True)
class WeightPlaces:
    """Which layers stay where they are computed; the others are streamed through ``num_buffers`` buffers."""

    resident: Collection[int] | None = None  # None: all
    in_host: Collection[int] = ()  # streamed from pinned memory to the GPU; the rest from the packed file
    num_buffers: int = 2
    embed: Tier = Tier.DEVICE  # of the embedding, on a GPU
    packed_folder: Path | None = None  # of the packed file; None: the user's cache


def load_weights(
    files: ModelFiles, ops: Ops, places: WeightPlaces | None = None, progress: Progress | None = None
) -> ModelWeights:
    """Puts the weights where ``places`` (default: all resident) says. The packed file is written first if there is
    none. If nothing is read from it later no packed file is written, and one is read only if the folder is given.

    ``progress`` is told in bytes of packed weights. An error, Ctrl-C included, leaves nothing behind. Raises
    ``CheckpointError`` for what only the data can show to be wrong, ``MemoryBudgetError`` if the system has no
    memory, ``ExlError`` that names folder, bytes needed and bytes free if the packed file has no room.
    """
    places = WeightPlaces() if places is None else places
    layers, in_host = range(files.config.num_layers), places.in_host
    resident = frozenset(layers if places.resident is None else places.resident)
    from_disk = places.embed is Tier.DISK or any(i not in resident and i not in in_host for i in layers)
    layouts = files.manifest.layouts(ops.target)
    with ExitStack() as stack:
        memory: WeightMemory
        if ops.target.kind == "cuda":
            memory = DeviceWeights(
                layouts.blobs, resident, in_host, places.num_buffers, ops.device, stack, places.embed
            )
        else:
            memory = HostWeights(layouts, resident, places.num_buffers, stack)
        loader = _Loader(files, ops, memory, progress or (lambda done, total: None))
        return loader.load(stack, places.packed_folder, from_disk)


class _Loader:
    def __init__(self, files: ModelFiles, ops: Ops, memory: WeightMemory, progress: Progress) -> None:
        self.checkpoint, self.config, self.quant = files.checkpoint, files.config, files.quant
        self.manifest, self.ops, self.memory, self.progress = files.manifest, ops, memory, progress
        self.layouts = files.manifest.layouts(ops.target)
        self.all_layouts = self.layouts.blobs
        self.sizes = [layout.num_bytes for layout in self.all_layouts]
        self.head_idx = 1 + self.config.num_layers
        self.done = 0
        self.executor: ThreadPoolExecutor | None = None

    def load(self, stack: ExitStack, packed_folder: Path | None, from_disk: bool) -> ModelWeights:
        packed = None
        if from_disk or packed_folder is not None:
            packed = self._read_packed(packed_folder or default_packed_folder())
        if packed is None and from_disk:
            packed = self._pack_to_file(packed_folder or default_packed_folder())
        elif packed is None:
            self._pack(None)
        trim_heap()
        return self._assemble(packed, stack)

    # from the packed file

    def _key(self) -> bytes:
        # What exl's own packing depends on is in the layouts and their version; torch's kernels have orders of theirs.
        packer = "exl" if self.ops.target.compiled else f"torch {torch.__version__}"
        experts = [
            (layout, spec)
            for layout, spec in zip(self.layouts.experts, self.manifest.experts, strict=True)
            if layout is not None and spec is not None
        ]
        first = self.all_layouts[: self.head_idx + 1]
        return packed_key(self.checkpoint, self.quant, first, self.ops.target, packer, experts)

    def _read_packed(self, folder: Path) -> PackedFile | None:
        """Fills the blobs that stay from a valid packed file. None: there is none, or one that turned out damaged."""
        key = self._key()
        packed = PackedFile.open(packed_path(folder, self.checkpoint.path, key), key, self.sizes)
        if packed is None:
            return None
        self.memory.reading.callback(packed.close)
        try:
            self._read_blobs(packed)
            return packed
        except CheckpointError as error:
            logger.warning("%s; packing again", error)
            packed.close()  # on Windows a file that is open keeps its name
        for i in self.memory.in_memory:
            self.memory.blob(i).zero_()
        return None

    def _read_blobs(self, packed: PackedFile) -> None:
        """Reads the blobs that stay in memory, and the embedding in any case. Some threads wait for the disk while
        others compare checksums, the largest blobs first, so that all end together; for a GPU a single thread reads
        them one by one through staging."""
        stopped = threading.Event()
        # Single rows have no checksum: an embedding that stays on the disk is compared as a whole, once.
        wanted = sorted({0, *self.memory.in_memory})
        total, done = sum(self.sizes[i] for i in wanted), 0
        threads = 1
        if self.ops.target.kind == "cpu":
            threads = _READ_THREADS
            wanted.sort(key=lambda i: -self.sizes[i])

        def read(blob_idx: int) -> int:
            if packed.read_blob(blob_idx, self.memory.blob(blob_idx).numpy(), lambda: not stopped.is_set()):
                self.memory.filled(blob_idx)
            return self.sizes[blob_idx]

        with ThreadPoolExecutor(threads, "exl packed reader") as executor:
            try:
                jobs = [executor.submit(read, i) for i in wanted]
                for job in as_completed(jobs):
                    done += job.result()
                    self.progress(done, total)
            finally:
                stopped.set()
                executor.shutdown(wait=True, cancel_futures=True)

    # from the checkpoint

    def _pack_to_file(self, folder: Path) -> PackedFile:
        key, stamps = self._key(), self.checkpoint.modified_ns
        path = packed_path(folder, self.checkpoint.path, key)
        with PackedWriter(path, key, source_name(self.checkpoint.path), self.sizes) as writer:
            self._pack(writer)
            if self.checkpoint.modified_ns != stamps:
                raise CheckpointError(f"{self.checkpoint.path}: its files were changed while they were being packed")
            writer.commit()
        path = writer.path
        packed = PackedFile.open(path, key, self.sizes)
        if packed is None:
            raise CheckpointError(f"{path}: packed weights were changed right after they had been written")
        self.memory.reading.callback(packed.close)
        return packed

    def _pack(self, writer: PackedWriter | None) -> None:
        """Packs every blob once, in order: to its place if it stays in memory, and to the file."""
        self.done = 0
        embed, head = self._table(self.layouts.embed), self._table(self.layouts.head)
        order = packing_order(self.checkpoint, self.manifest)
        experts = [(spec, i) for spec in self.manifest.experts if spec is not None for i in range(spec.count)]
        with ReadAhead(self.checkpoint, embed, order, head) as ahead, self._pack_threads() as self.executor:
            self._pack_blob(0, ahead.tables(), writer)
            for i in range(self.config.num_layers):
                self._pack_blob(1 + i, ahead.layer(i), writer)
            self._pack_blob(self.head_idx, ahead.tables(), writer)
            for i, expert in enumerate(experts):
                self._pack_blob(self.head_idx + 1 + i, ahead.expert(i), writer, expert)

    def _table(self, layout: LayerLayout) -> str | None:
        """The tensor of an embedding or a head whose bytes are copied as they are."""
        linears = [linear for some in layout.linears.values() for linear in some]
        if self.ops.target.kind != "cpu" or [linear.kind for linear in linears] != ["dense"]:
            return None
        part = linears[0].spec.parts[0]
        info = self.checkpoint.tensors.get(f"{part.name}.weight")
        return info.name if info is not None and info.dtype == part.dtype and not part.dequantized else None

    def _pack_blob(
        self,
        blob_idx: int,
        checkpoint: Checkpoint,
        writer: PackedWriter | None,
        expert: tuple[ExpertSpec, int] | None = None,
    ) -> None:
        layout = self.all_layouts[blob_idx]
        blob = self.memory.blob(blob_idx)
        self._fill(blob, layout, checkpoint, expert)
        if writer is not None:
            writer.write(blob.numpy())
        self.memory.filled(blob_idx)
        self.done += layout.num_bytes
        self.progress(self.done, self.layouts.num_bytes)

    def _fill(
        self, blob: torch.Tensor, layout: LayerLayout, checkpoint: Checkpoint, expert: tuple[ExpertSpec, int] | None
    ) -> None:
        for norm in layout.norms:
            vector = torch.from_numpy(read_norm(checkpoint, norm.tensor, norm))
            view_field(blob, layout.fields[norm.name]).copy_(vector)

        def pack(linear: LinearLayout, start: int, stop: int, order: NDArray[np.int32] | None) -> int:
            specs = linear.spec.parts
            if expert is not None:  # the packer names what it refuses
                specs = tuple(expert[0].part(part, expert[1]) for part in specs)
                linear = replace(linear, spec=replace(linear.spec, parts=specs))
            parts = [load_part(checkpoint, part, self.quant) for part in specs]
            if expert is not None:
                expect_orders(parts, linear.spec, specs[0].name)
            self.ops.pack(parts, linear, blob[start:stop], order)
            return stop

        linears = []
        for key, some in layout.linears.items():
            for i, linear in enumerate(some):
                order = None
                if key == "gate_up" and packs_in_order(layout):
                    (down,) = layout.linears["down"][0].spec.parts
                    down = down if expert is None else expert[0].part(down, expert[1])
                    order = load_part(checkpoint, down, self.quant).order
                linears.append((linear, *layout.linear_range(key, i), order))
        for stop in self._each(pack, linears):
            self.progress(self.done + stop, self.layouts.num_bytes)

    def _pack_threads(self) -> AbstractContextManager[ThreadPoolExecutor | None]:
        """Threads that pack a layer's linears beside each other. None: packing needs more memory than what it packs, or
        takes torch's threads."""
        return ThreadPoolExecutor(thread_limit(), "exl packs") if self.ops.target.compiled else nullcontext()

    def _each(self, pack: Callable[..., int], linears: Sequence[tuple]) -> Iterator[int]:
        """``pack`` of each, results in order; largest first if several run at once."""
        if self.executor is None:
            yield from (pack(*linear) for linear in linears)
            return
        by_size = sorted(range(len(linears)), key=lambda i: -linears[i][0].num_bytes)
        jobs = {i: self.executor.submit(pack, *linears[i]) for i in by_size}
        try:
            yield from (jobs[i].result() for i in range(len(linears)))
        finally:
            wait(jobs.values())

    # what the model runs on

    def _assemble(self, packed: PackedFile | None, stack: ExitStack) -> ModelWeights:
        layouts, memory = self.layouts, self.memory
        rows = None
        if 0 in memory.in_memory:
            embed = view_segments(layouts.embed, memory.view(0), "embed")[0]
        else:
            (linear,) = layouts.embed.linears["embed"]
            embed = Linear(linear, {"weight": self.ops.buffer("embedding rows")})
            rows = self._rows_of_embedding(packed)
            stack.callback(rows.close)
        head = memory.view(self.head_idx)
        return ModelWeights(
            embed=embed,
            final_norm=view_field(head, layouts.head.fields["final_norm"]),
            head=view_segments(layouts.head, head, "head")[0] if layouts.head.linears else embed,
            source=memory.source(packed),
            slabs=memory.slabs,
            embed_rows=rows,
            _owned=stack.pop_all(),
        )

    def _rows_of_embedding(self, packed: PackedFile) -> PackedRows:
        table = self.layouts.embed.linear_fields("embed", 0)["weight"]
        num_rows = table.shape[0]
        return packed.rows(0, table.offset, table.num_bytes // num_rows, num_rows)
