"""A backend that records launches. Its graphs are recorded lists; a replay runs them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exl.kernels.args import Arg
from exl.kernels.launch import Backend, Function
from exl.kernels.params import Params
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Work

from .captures import Captures, Event


@dataclass(frozen=True)
class Launch:
    function: Function
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[Arg, ...]
    shared_bytes: int
    dependent: bool

    @property
    def entry(self) -> str:
        return self.function.spec.entry

    def run(self) -> None:
        self.function.run(self.grid, self.block, self.args, self.shared_bytes, self.dependent)


class RecordingBackend:
    """Launches through ``inner`` and keeps ``launches``. While it captures it runs nothing, as CUDA does."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.device, self.arch = inner, inner.device, inner.arch
        self.num_multiprocessors = inner.num_multiprocessors
        self.launches: list[Launch] = []
        self.graphs: list[list[Callable[[], None]]] = []
        self.copies: list[int] = []  # destination addresses of layers, filled by ``RecordedCopies``
        self.captures = Captures()
        self._capturing: list[Callable[[], None]] | None = None
        self._functions: dict[KernelSpec, RecordedFunction] = {}

    def load(self, spec: KernelSpec) -> RecordedFunction:
        if spec not in self._functions:
            assert self._capturing is None, f"{spec} is loaded while a graph is captured"
            self._functions[spec] = RecordedFunction(self, self.inner.load(spec))
        return self._functions[spec]

    def start(self, work: Sequence[Work]) -> None:
        for one in work:
            one.start(0)

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        self.inner.call(function, *tensors)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph: list[Callable[[], None]] = []
        self._capturing = graph
        self.captures.begin()
        try:
            run()
        finally:
            self._capturing = None
            self.captures.end()
        self.graphs.append(graph)
        return lambda: [work() for work in graph]

    def do(self, work: Callable[[], None]) -> None:
        """Runs the action now or, during a capture, at each replay of that graph."""
        if self._capturing is None:
            work()
        else:
            self._capturing.append(work)

    def note(self, launch: Launch) -> None:
        self.launches.append(launch)
        self.do(launch.run)


class RecordedCopies:
    """Copies of streamed layers, recorded beside the launches. During a capture none happens, and their events obey
    CUDA's rules."""

    def __init__(self, recorder: RecordingBackend) -> None:
        self._recorder, self._captures = recorder, recorder.captures

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: Event | None) -> Event:
        if after is not None:
            self._captures.wait("copies", after)
        self._captures.work("copies")
        self._recorder.do(lambda: (self._recorder.copies.append(dst.data_ptr()), dst.copy_(src)))
        return self._captures.record("copies")

    def record(self) -> Event:
        return self._captures.record("arithmetic")

    def wait(self, event: Event) -> None:
        self._captures.wait("arithmetic", event)


class RecordedFunction:
    def __init__(self, backend: RecordingBackend, inner: Function) -> None:
        self.spec, self.device = inner.spec, inner.device
        self._backend, self._inner = backend, inner

    def prepare(
        self, grid: Sequence[int], block: Sequence[int], params: Params, shared_bytes: int, dependent: bool
    ) -> RecordedLaunch:
        self._inner.prepare(grid, block, params, shared_bytes, dependent)  # for its refusals
        return RecordedLaunch(self, tuple(grid), tuple(block), params, shared_bytes, dependent)

    def run(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Arg], shared_bytes: int, dependent: bool
    ) -> None:
        self.prepare(grid, block, Params(args), shared_bytes, dependent).start(0)

    def note(self, launch: RecordedLaunch) -> None:
        """Records the launch with its arguments' present values: a graph keeps them if the memory changes later."""
        where = launch.grid, launch.block, launch.params.read(), launch.shared_bytes, launch.dependent
        self._backend.note(Launch(self._inner, *where))


@dataclass(frozen=True)
class RecordedLaunch:
    function: RecordedFunction
    grid: tuple[int, ...]
    block: tuple[int, ...]
    params: Params
    shared_bytes: int
    dependent: bool

    def start(self, stream: int) -> None:
        self.function.note(self)


class TorchCalls(TorchDispatchMode):
    """Names of the torch operations that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


def on_device(calls: list[str]) -> list[str]:
    """Operations that would cost a GPU work or make the host wait: all except views."""
    return [name for name in calls if name not in _VIEWS]


_VIEWS = {"view", "slice", "split", "as_strided", "select", "split_with_sizes", "alias"}
