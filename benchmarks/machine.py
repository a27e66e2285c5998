"""The GPU to measure, with its roofs; for dry runs the host shim instead."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.guard import one_line
from benchmarks.timing import REPEATS, Timer, keep_busy, make_timer
from exl.kernels.args import ptr, u64
from exl.kernels.launch import Backend, CudaBackend, launch
from exl.kernels.program import Call
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Work
from exl.memory.device import pinned
from exl.memory.host import HostBuffer

SOURCES = Path(__file__).resolve().parent / "cuda"
READ_BYTES = 2 * 2**30
COPY_BYTES = 1 << 30
GRAPH_NODES = 512


class CountingBackend:
    """Counts launches, including captured ones."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.num_launches = 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def start(self, work: Sequence[Work]) -> None:
        self.num_launches += sum(not isinstance(one, Call) for one in work)
        self._inner.start(work)

    def load(self, spec: KernelSpec) -> _Counted:
        return _Counted(self, self._inner.load(spec))


class _Counted:
    def __init__(self, backend: CountingBackend, inner) -> None:
        self._backend, self._inner = backend, inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def run(self, *args) -> None:
        self._backend.num_launches += 1
        self._inner.run(*args)


@dataclass
class Machine:
    """``own``: backend with the kernels of ``benchmarks/cuda``. A roof that fails is None, and the error is printed."""

    backend: CountingBackend
    own: Backend
    name: str
    read_bytes: int = READ_BYTES
    copy_bytes: int = COPY_BYTES
    _roofs: dict[str, float | None] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.backend.device

    def timer(self) -> Timer:
        return make_timer(self.device)

    def read_roof(self) -> float | None:
        """Bytes per second of a read-only pass over memory."""
        return self._once("read", lambda: read_rate(self.own, self.timer(), self.read_bytes))

    def copy_roof(self) -> float | None:
        """Bytes per second, reads plus writes, of a copy within memory."""
        return self._once("copy", lambda: copy_rate(self.device, self.timer(), self.read_bytes))

    def pinned_roof(self) -> float | None:
        """Bytes per second of copies from pinned memory."""
        return self._once("pinned", lambda: pinned_copy_rate(self.device, self.timer(), self.copy_bytes))

    def _once(self, name: str, measure: Callable[[], float]) -> float | None:
        if name not in self._roofs:
            self._roofs[name] = None
            try:
                self._roofs[name] = measure()
            except Exception as error:
                print(f"the {name} roof could not be measured: {one_line(error)}", file=sys.stderr)
        return self._roofs[name]


def gpu_machine(kernel_cache: Path | None = None) -> Machine:
    """This machine's GPU. Raises ``KernelError``."""
    backend = CudaBackend(folder=kernel_cache)
    own = CudaBackend(backend.device, folder=kernel_cache, sources=SOURCES)
    return Machine(CountingBackend(backend), own, torch.cuda.get_device_name(backend.device))


def share(num_bytes: float, seconds: float, roof: float | None) -> str:
    """Share of a roof, as text."""
    return "?" if roof is None else f"{num_bytes / seconds / roof:.0%}"


def rate(bytes_a_second: float | None) -> str:
    return "could not be measured" if bytes_a_second is None else f"{bytes_a_second / 1e9:.2f} GB/s"


def read_rate(own: Backend, timer: Timer, num_bytes: int) -> float:
    src = torch.empty(num_bytes, dtype=torch.uint8, device=own.device).random_()
    word = torch.zeros(1, dtype=torch.int32, device=own.device)
    read_all = own.load(KernelSpec("bandwidth.cu", "read_all", {}, own.arch))
    args = [ptr(src), ptr(word), u64(num_bytes // 16)]
    return num_bytes / timer.median_us(lambda: launch(read_all, (4 * own.num_multiprocessors,), (512,), args)) * 1e6


def copy_rate(device: torch.device, timer: Timer, num_bytes: int) -> float:
    src = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    return 2 * num_bytes / timer.median_us(lambda: dst.copy_(src)) * 1e6


def pinned_copy_rate(device: torch.device, timer: Timer, num_bytes: int) -> float:
    buffer = HostBuffer(num_bytes, "copied")
    buffer.array[::4096] = 1
    source, target = torch.from_numpy(buffer.array), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if device.type != "cuda":
        return num_bytes / timer.median_us(lambda: target.copy_(source)) * 1e6
    with pinned(buffer, device):
        us = timer.median_us(lambda: target.copy_(source, non_blocking=True), 5)
        torch.cuda.synchronize(device)
    return num_bytes / us * 1e6


def graph_gap_us(own: Backend, dependent: bool, num_nodes: int = GRAPH_NODES) -> float | None:
    """Time per node of a long chain of the smallest kernel in one graph; None if the backend has no graphs."""
    counter = torch.zeros(1, dtype=torch.int32, device=own.device)
    touch = own.load(KernelSpec("bandwidth.cu", "touch", {}, own.arch))
    launch(touch, (1,), (32,), [ptr(counter)])  # loads its module before anything is captured

    def chain() -> None:
        for i in range(num_nodes):
            launch(touch, (1,), (32,), [ptr(counter)], dependent=dependent and i > 0)

    replay = own.capture(chain)
    if replay is None or own.device.type != "cuda":
        return None
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep_busy(0)
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / num_nodes)
    return statistics.median(times)


@functools.cache
def host_machine() -> Machine:
    """The host shim, compiled by g++. Everything works except that its times mean nothing."""
    from tests.host.backends import make_backend

    return Machine(
        CountingBackend(make_backend("plain")), make_backend("plain", 90, SOURCES), "host shim", 1 << 16, 1 << 16
    )
