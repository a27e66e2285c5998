"""A launch's arguments in memory, as the driver takes them: ``void* params[]``, each the address of a value.

Most values never change: sizes, and addresses of buffers. ``Varying`` holds those that do, the addresses of a layer's
weights and pages, in one place that all launches of a program point to: setting them is one copy of a few words.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from exl.kernels.args import SCALARS, Arg, Pointer, Scalar, ptr

ALIGNMENT = 16  # no kernel's check asks for more


class Bindings:
    """Tensors that take their turn in one program: of one layer, then of the next.

    ``structure`` is equal if and only if launches prepared for one set of tensors are right for the other once their
    addresses are exchanged: it holds each tensor's shape, strides, type, device and address modulo 16, which is all
    that checks and arguments besides the address depend on, and ``form``, what else the caller's launches depend on.
    Tensors that overlap have their addresses in it, too, as no address of an argument would say which one is meant.

    Keeps the tensors alive. They must stay where they are: nobody calls ``set_`` or ``resize_`` on them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None], form: Hashable = ()) -> None:
        self.tensors = tuple(tensors)
        pointers = [ptr(tensor) for tensor in self.tensors]
        self.starts = tuple(pointer.address for pointer in pointers)
        self.spans = [  # an empty tensor's address is one, too
            (0, 0) if pointer.dtype == "null" else (pointer.address, pointer.address + max(1, pointer.num_bytes))
            for pointer in pointers
        ]
        self.addresses = struct.pack(f"<{len(pointers)}Q", *self.starts)
        described = tuple(
            None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNMENT)
            for t in self.tensors
        )
        taken = sorted(span for span in self.spans if span[1])
        overlap = any(a[1] > b[0] for a, b in itertools.pairwise(taken))
        self.number = -1  # of the structure, where there is a register of them
        self.structure: Hashable = (form, described, self.starts if overlap else None)


class Varying:
    """Where launches of a program find the addresses of its bindings."""

    def __init__(self, bindings: Bindings) -> None:
        """``bindings``: those that the program is recorded with."""
        self._spans = bindings.spans
        self._values = (ctypes.c_uint64 * max(1, len(bindings.tensors)))()
        self._bytes = memoryview(self._values).cast("B")[: len(bindings.addresses)]
        self._inside: dict[tuple[int, int], ctypes.c_uint64] = {}
        self.set(bindings)

    def find(self, pointer: Pointer) -> tuple[int, int] | None:
        """Which tensor an argument points into, and how far from its start."""
        for i, (start, stop) in enumerate(self._spans):
            if pointer.dtype != "null" and start <= pointer.address < stop:
                return i, pointer.address - start
        return None

    def slot(self, pointer: Pointer) -> int | None:
        """Address of the value that stands for this argument; None: it does not vary."""
        found = self.find(pointer)
        if found is None:
            return None
        i, offset = found
        if not offset:
            return ctypes.addressof(self._values) + 8 * i
        value = self._inside.setdefault(found, ctypes.c_uint64(pointer.address))
        return ctypes.addressof(value)

    def set(self, bindings: Bindings) -> None:
        """``bindings`` of the structure that the program was recorded with."""
        self._bytes[:] = bindings.addresses
        for (i, offset), value in self._inside.items():
            value.value = bindings.starts[i] + offset


class Params:
    """One launch's arguments. Keeps no tensor alive: whoever launches does, until the device has run it."""

    def __init__(self, args: Sequence[Arg], varying: Varying | None = None) -> None:
        self._args = tuple(_without_owner(arg) if isinstance(arg, Pointer) else arg for arg in args)
        self._values = (ctypes.c_uint64 * max(1, len(args)))()
        self._varying = varying  # whose memory the pointers lead to
        base = ctypes.addressof(self._values)
        self.pointers = (ctypes.c_void_p * max(1, len(args)))()
        for i, arg in enumerate(args):
            slot = varying.slot(arg) if varying is not None and isinstance(arg, Pointer) else None
            if slot is None:
                slot = base + 8 * i
                data = arg.pack()
                ctypes.memmove(slot, data, len(data))
            self.pointers[i] = slot

    def __len__(self) -> int:
        return len(self._args)

    def read(self) -> tuple[Arg, ...]:
        """The arguments as a kernel would see them now, out of the packed memory."""
        return tuple(_read(arg, self.pointers[i]) for i, arg in enumerate(self._args))


def _without_owner(arg: Pointer) -> Pointer:
    return Pointer(arg.address, arg.num_bytes, arg.dtype, arg.device)


def _read(arg: Arg, address: int) -> Arg:
    code = "<Q" if isinstance(arg, Pointer) else SCALARS[arg.dtype]
    (value,) = struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))
    return replace(arg, address=value) if isinstance(arg, Pointer) else Scalar(value, arg.dtype)
