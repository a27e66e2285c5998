"""Launches that are prepared once and started many times.

A wrapper checks its arguments, chooses a configuration and builds some twenty typed arguments: tens of microseconds,
each time the same. Handed a ``Recorder`` in the place of a backend, it does so once, and what it launches becomes a
``Program``. Starting that costs a copy of the addresses that vary (``params.Varying``) and the driver's call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence

import torch

from exl.errors import KernelError
from exl.kernels.args import Arg, ptr
from exl.kernels.launch import Backend, Function
from exl.kernels.params import Bindings, Params, Varying
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Dim, Work

MAX_PROGRAMS = 256
MAX_STRUCTURES = 4096  # remembered, each with a number that no other ever gets


class Program:
    """What was recorded, in its order. Only for bindings of the structure that it was recorded with."""

    def __init__(self, backend: Backend, bindings: Bindings) -> None:
        self.backend, self.varying = backend, Varying(bindings)
        self.work: list[Work] = []
        self.last_run = 0

    def run(self, bindings: Bindings) -> None:
        self.varying.set(bindings)
        self.backend.start(self.work)


class Recorder:
    """A ``Backend`` that writes into a program what is launched, and starts nothing."""

    def __init__(self, program: Program) -> None:
        inner = program.backend
        self.device, self.arch, self.num_multiprocessors = inner.device, inner.arch, inner.num_multiprocessors
        self._program = program

    def load(self, spec: KernelSpec) -> Function:
        return _RecordedFunction(self._program, self._program.backend.load(spec))

    def start(self, work: Sequence[Work]) -> None:
        self._program.work += work

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            found = self._program.varying.find(ptr(tensor))
            if found is not None:
                raise KernelError(f"{function.__name__} is given tensor {found[0]} of those that vary: it would not")
        self._program.work.append(Call(function, tensors))

    def capture(self, run: Callable[[], None]) -> None:
        raise KernelError("a program is recorded: no graph can be captured")


class _RecordedFunction:
    def __init__(self, program: Program, inner: Function) -> None:
        self.spec, self.device = inner.spec, inner.device
        self._program, self._inner = program, inner

    def prepare(self, grid: Dim, block: Dim, params: Params, shared_bytes: int, dependent: bool) -> Work:
        return self._inner.prepare(grid, block, params, shared_bytes, dependent)

    def run(self, grid: Dim, block: Dim, args: Sequence[Arg], shared_bytes: int, dependent: bool) -> None:
        params = Params(args, self._program.varying)
        self._program.work.append(self.prepare(grid, block, params, shared_bytes, dependent))


class Call:
    """Something else than a launch, in its place among them."""

    def __init__(self, function: Callable[..., None], tensors: tuple[torch.Tensor, ...]) -> None:
        self._function, self._tensors = function, tensors

    def start(self, stream: int) -> None:
        self._function(*self._tensors)


class Programs:
    """Programs by what they depend on; the least recently used goes when there are more than ``max_programs``."""

    def __init__(self, backend: Backend, max_programs: int = MAX_PROGRAMS) -> None:
        self.backend, self._max_programs = backend, max_programs
        self._programs: dict[Hashable, Program] = {}
        self._structures: dict[Hashable, int] = {}
        self._next_number = itertools.count()
        self._clock = 0
        self.num_recorded = 0

    def __len__(self) -> int:
        return len(self._programs)

    def bind(self, tensors: Sequence[torch.Tensor | None], form: Hashable = ()) -> Bindings:
        """For ``run``: the structure is looked at here, once, and is a number there."""
        bindings = Bindings(tensors, form)
        number = self._structures.get(bindings.structure)
        if number is None:
            if len(self._structures) >= MAX_STRUCTURES:
                self._structures.clear()
            number = self._structures[bindings.structure] = next(self._next_number)
        bindings.number = number
        return bindings

    def run(self, key: Hashable, bindings: Bindings, record: Callable[[Backend], None]) -> Program:
        """Starts the program for ``key`` and the structure of ``bindings`` (of ``bind``); the first time ``record``
        launches it, through the backend that it is handed, and nothing runs if that raises.

        ``key`` says all that the launches depend on besides ``bindings``: what is launched, sizes, numbers, and place,
        shape, strides and type of every other tensor (``place``). Then equal keys mean equal bytes, whether the memory
        is still the same tensor's or another's.
        """
        whole = key, bindings.number
        program = self._programs.get(whole)
        if program is None:
            program = Program(self.backend, bindings)
            record(Recorder(program))
            self.num_recorded += 1
            if len(self._programs) >= self._max_programs:
                del self._programs[min(self._programs, key=lambda one: self._programs[one].last_run)]
            self._programs[whole] = program
        self._clock += 1
        program.last_run = self._clock
        program.run(bindings)
        return program


def place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """A tensor in a key: all that an argument made of it, and the checks of it, can depend on. Addresses are unique
    among the host and all GPUs, so they stand for the device, too."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
