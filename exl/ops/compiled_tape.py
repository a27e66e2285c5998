"""What the CPU's own kernels are to do, as a list of stages, and the memory between them.

An operation adds its stages to a tape. Either they run at once, over buffers that every operation shares; or a whole
step is recorded, to be run as one program. One that may repeat chunks must never write what it reads, so that each of
its results has memory of its own: ``ArenaMemory`` gives a buffer that the decoder writes a new place at each write, and
tells where it was written last. A step that is too large for that is recorded over the shared buffers, and repeats no
chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.pool import Stage
from exl.cpu_kernels.quantize import ActivationForm
from exl.layout.fields import align_up

ARENA_ALIGN = 64  # a cache line


@dataclass(frozen=True)
class Rows:
    """f32 rows in memory."""

    address: int
    stride: int  # elements from row to row
    num_rows: int
    width: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows:
        """A tensor f32 [T, width] whose rows are contiguous."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.shape[0], tensor.shape[1])

    def some(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop - 1``."""
        return Rows(self.address + 4 * start * self.stride, self.stride, stop - start, self.width)

    def columns(self, start: int, width: int) -> Rows:
        return Rows(self.address + 4 * start, self.stride, self.num_rows, width)

    def array(self) -> NDArray[np.float32]:
        """A view [num_rows, width]; whoever owns the memory must outlive it."""
        size = (self.num_rows - 1) * self.stride + self.width
        flat = np.ctypeslib.as_array(ctypes.cast(self.address, ctypes.POINTER(ctypes.c_float)), (size,))
        return np.lib.stride_tricks.as_strided(flat, (self.num_rows, self.width), (4 * self.stride, 4))


@dataclass(frozen=True)
class RecordForm:
    """What linears that share an input take of it: quantized activations, in what order."""

    form: ActivationForm
    num_records: int  # of a row
    source: torch.Tensor | None  # i32: which input each one of the records is, -1: none; None: in their own order

    def num_bytes(self, num_rows: int) -> int:
        return num_rows * self.num_records * self.form.num_bytes


@dataclass(frozen=True)
class Records:
    """Rows as quantized activations in memory: [record][row]."""

    address: int
    num_rows: int


class Memory(Protocol):
    """Where stages find and leave values."""

    def read(self, tensor: torch.Tensor) -> Rows:
        """Where the tensor's values are when the next stage runs."""

    def write(self, tensor: torch.Tensor) -> Rows:
        """Where the next stage is to write the tensor's new values. ``read`` what it reads first."""

    def scratch(self, purpose: str, num_bytes: int) -> int:
        """The address of memory for values that live from one stage to a later one of the same operation."""


class SharedMemory:
    """For stages that run at once: tensors are where they are, scratch is shared by all operations."""

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """``buffers``: u8, by purpose."""
        self.buffers = buffers

    def read(self, tensor: torch.Tensor) -> Rows:
        return Rows.of(tensor)

    def write(self, tensor: torch.Tensor) -> Rows:
        return Rows.of(tensor)

    def scratch(self, purpose: str, num_bytes: int) -> int:
        buffer = self.buffers[purpose]
        if num_bytes > buffer.numel():
            raise ValueError(f"{purpose}: {num_bytes} bytes, the buffer has {buffer.numel()}")
        return buffer.data_ptr()


class RecordedMemory(SharedMemory):
    """For a recorded step over the shared buffers: what lives as long as the step is not in them."""

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        super().__init__(buffers)
        self._own: list[NDArray[np.uint8]] = []

    def scratch(self, purpose: str, num_bytes: int) -> int:
        if purpose in self.buffers:
            return super().scratch(purpose, num_bytes)
        self._own.append(np.empty(num_bytes, np.uint8))
        return self._own[-1].ctypes.data


class ArenaMemory:
    """For a recorded step: every value has a place of its own."""

    def __init__(self, arena: torch.Tensor) -> None:
        """``arena``: u8."""
        self._arena, self._used = arena, 0
        self._places: dict[int, Rows] = {}

    def read(self, tensor: torch.Tensor) -> Rows:
        return self._places.get(tensor.data_ptr(), Rows.of(tensor))

    def write(self, tensor: torch.Tensor) -> Rows:
        num_rows, width = tensor.shape
        rows = Rows(self.scratch("rows", 4 * num_rows * width), width, num_rows, width)
        self._places[tensor.data_ptr()] = rows
        return rows

    def scratch(self, purpose: str, num_bytes: int) -> int:
        start = self._used
        self._used += align_up(num_bytes, ARENA_ALIGN)
        if self._used > self._arena.numel():
            raise ValueError(f"{purpose}: a recorded step needs more than the arena's {self._arena.numel()} bytes")
        return self._arena.data_ptr() + start


class NoMemory:
    """For stages that are never run."""

    def read(self, tensor: torch.Tensor) -> Rows:
        return Rows.of(tensor)

    def write(self, tensor: torch.Tensor) -> Rows:
        return Rows.of(tensor)

    def scratch(self, purpose: str, num_bytes: int) -> int:
        return 0


@dataclass
class Tape:
    """Stages so far. ``recorded``: they run again, for other batches. ``changing``: those whose number of chunks the
    batch's tables say, by a key of theirs."""

    memory: Memory
    recorded: bool = False
    stages: list[Stage] = field(default_factory=list)
    changing: list[tuple[int, Hashable, int]] = field(default_factory=list)  # stage, key, chunks of an item
    _made: dict[Hashable, int] = field(default_factory=dict)
    _kept: dict[Hashable, int] = field(default_factory=dict)

    def add(self, kernel: KernelSpec, num_chunks: int, *args: NDArray | torch.Tensor | int | float | None) -> None:
        self.stages.append(Stage(kernel, num_chunks, tuple(map(_slot, args))))

    def add_changing(
        self,
        kernel: KernelSpec,
        key: Hashable,
        num_items: tuple[int, int],
        chunks: int,
        *args: NDArray | torch.Tensor | int | float | None,
    ) -> None:
        """A stage of ``chunks`` chunks for each of the items that the batch's tables have under ``key``: so many now,
        and at most so many."""
        now, most = num_items
        self.changing.append((len(self.stages), key, chunks))
        self.stages.append(Stage(kernel, now * chunks, tuple(map(_slot, args)), most * chunks))

    def made(self, key: Hashable, purpose: str, num_bytes: int, make: Callable[[int], None]) -> int:
        """The address of what ``make``'s stages leave there. Made once for each key, as long as the memory stays."""
        if key not in self._made:
            if isinstance(self.memory, SharedMemory):
                self._made.clear()  # in whose place this comes
            self._made[key] = self.memory.scratch(purpose, num_bytes)
            make(self._made[key])
        return self._made[key]

    def once(self, key: Hashable, purpose: str, num_bytes: int, make: Callable[[int], None]) -> int:
        """The same for what the whole of a recorded step keeps."""
        if key not in self._kept:
            self._kept[key] = self.memory.scratch(purpose, num_bytes)
            make(self._kept[key])
        return self._kept[key]

    def forget(self) -> None:
        """What was made in shared memory is overwritten by what comes now."""
        if isinstance(self.memory, SharedMemory):
            self._made.clear()


def _slot(value: NDArray | torch.Tensor | int | float | None) -> NDArray | int | float | None:
    return value.view(torch.uint8).numpy() if isinstance(value, torch.Tensor) else value  # NumPy has no bf16
