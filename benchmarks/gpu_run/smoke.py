"""The *smoke* stage: the features of a GPU that exl needs, one check per feature, each with a known result.

A worker of ``driver.py``. Checks are independent: one that destroys the CUDA context does not affect the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.gpu_run.worker import Place, Worker
from benchmarks.guard import one_line
from exl.kernels.args import f32, i32, ptr
from exl.kernels.launch import Backend, CudaBackend, launch
from exl.kernels.linear_many import multiply_f32
from exl.kernels.spec import KernelSpec
from exl.layout.arch import arch_limits
from exl.memory.copies import TorchCopyEngine
from exl.memory.device import pinned
from exl.memory.host import HostBuffer
from exl.memory.mapped import mapped

KERNELS = Path(__file__).resolve().parents[2] / "tests" / "host" / "kernels"
N = 128 * 50
ROUNDS = 3  # replays of a graph, each with different inputs


class Copies(Protocol):
    """The part of a copy engine (``exl/weights/device_stream.py``) that checks use."""

    def copy(self, dst, src, after): ...

    def record(self): ...

    def wait(self, event) -> None: ...


class RecordedCopies:
    """For the host shim: queued work is done at once or, during a capture, belongs to the graph."""

    def __init__(self, recorder) -> None:
        self._recorder = recorder

    def copy(self, dst: torch.Tensor, src: torch.Tensor, after: object) -> object:
        self._recorder.do(lambda: dst.copy_(src))
        return object()

    def record(self) -> object:
        return object()

    def wait(self, event: object) -> None:
        pass


class Wrong(Exception):
    """A check's result differs from the known one."""


class Checks:
    def __init__(self, backend: Backend, copies: Copies) -> None:
        self.backend, self.copies, self.device = backend, copies, backend.device

    # -- kernels and inputs

    def load(self, entry: str):
        return self.backend.load(KernelSpec("gpu.cu", entry, {}, self.backend.arch))

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x f16 [N], weights f32 [128] of whole numbers, y f32 [N]."""
        x, w = torch.randn(N).half().to(self.device), torch.randint(-4, 5, (128,)).float().to(self.device)
        return x, w, torch.full((N,), float("nan"), device=self.device)

    def scale(self, x: torch.Tensor, y: torch.Tensor, *, dependent: bool = False) -> None:
        args = [ptr(x), ptr(y), i32(N), f32(2.0)]
        launch(self.load("scale_halves"), (N // 128,), (128,), args, dependent=dependent)

    def add(self, w: torch.Tensor, y: torch.Tensor, *, dependent: bool = False) -> None:
        launch(self.load("add_weights"), (N // 128,), (128,), [ptr(w), ptr(y), i32(N)], dependent=dependent)

    def expected(self, x: torch.Tensor, w: torch.Tensor, added: int) -> torch.Tensor:
        y = x.float() * 2
        for _ in range(added):
            y = (y.view(-1, 128) + w).view(-1)
        return y

    # -- checks: each returns the text for the report

    def plain_launch(self) -> str:
        x, w, y = self.inputs()
        self.scale(x, y)
        return same(y, self.expected(x, w, 0))

    def dependent_launch(self) -> str:
        x, w, y = self.inputs()
        self.scale(x, y)
        for _ in range(8):
            self.add(w, y, dependent=True)
        return same(y, self.expected(x, w, 8)) + self._dependence()

    def large_shared_memory(self) -> str:
        num_bytes = arch_limits(self.backend.arch).max_shared_bytes
        count = num_bytes // 4
        x = torch.randn(2, count).to(self.device)
        y = torch.zeros_like(x)
        launch(self.load("reverse_large"), (2,), (128,), [ptr(x), ptr(y), i32(count)], num_bytes)
        return f"{same(y, x.flip(1))}; {num_bytes} bytes a block"

    def graph_of_plain_nodes(self) -> str:
        return self._graph(first_dependent=False, dependent=False, added=2)

    def graph_of_dependent_nodes(self) -> str:
        return self._graph(first_dependent=False, dependent=True, added=3) + self._dependence()

    def graph_with_a_dependent_node_first(self) -> str:
        return self._graph(first_dependent=True, dependent=True, added=2) + self._dependence()

    def graph_with_a_copy_from_registered_memory(self) -> str:
        with self._registered() as (buffer, source):
            x, w, y, replay, _ = self._captured_copy(source)
            for _ in range(ROUNDS):
                source.copy_(torch.randn(N).half())
                x.zero_(), y.fill_(float("nan"))
                replay()
                said = same(y, self.expected(source.to(self.device), w, 0))
            self._synchronize()
            return f"{said}; {buffer.num_bytes} bytes"

    def graph_that_reads_mapped_memory(self) -> str:
        """A kernel reads page-locked memory of the host over the bus, where an embedding is; nothing is copied."""
        with ExitStack() as stack:
            host, on_device = mapped(2 * N, "smoke test", self.device, stack)
            source, x, y = host.view(torch.float16), on_device.view(torch.float16), self.inputs()[2]
            self.scale(x, y)
            replay = self._capture(lambda: self.scale(x, y))
            for _ in range(ROUNDS):
                source.copy_(torch.randn(N).half())
                y.fill_(float("nan"))
                replay()
                said = same(y, source.float() * 2)
            address = "the host's address" if x.data_ptr() == source.data_ptr() else "another address than the host's"
            return f"{said}, at {address}"

    def eager_wait_after_a_capture(self) -> str:
        """Streamed layers can wait for copies eagerly after a graph with such copies was captured."""
        with self._registered() as (_, source):
            x, w, y, replay, _ = self._captured_copy(source)
            for _ in range(ROUNDS):
                source.copy_(torch.randn(N).half())
                self.copies.wait(self.copies.copy(x, source, self.copies.record()))
                self.scale(x, y)
                said = same(y, self.expected(source.to(self.device), w, 0))
                replay()
            self._synchronize()
            return said

    def eager_wait_for_a_captured_event(self) -> str:
        """An eager wait for a captured event, which exl must not do. Any outcome passes if the device survives."""
        with self._registered() as (_, source):
            x, w, y, _, event = self._captured_copy(source)
            try:
                self.copies.wait(event)
                said = "allowed here"
            except RuntimeError as error:
                said = f"refused, as it must be: {one_line(error)}"
            self.scale(x, y)
            same(y, self.expected(x, w, 0))
            return said

    def product_with_an_f32_result(self) -> str:
        said = []
        for dtype in (torch.float16, torch.bfloat16):
            x, panel = torch.randn(70, 384).to(dtype), torch.randn(104, 384).to(dtype)
            product = torch.full((70, 104), float("nan"), device=self.device)
            multiply_f32(x.to(self.device), panel.to(self.device), product)
            exact = x.double() @ panel.double().t()
            error = float((product.cpu().double() - exact).abs().max() / exact.abs().max())
            if not error < 1e-5:  # 384 products in f32; an f16 or bf16 result would be off by 5e-4 or 4e-3
                raise Wrong(f"{dtype}: off by {error:.1e} of the largest")
            said.append(f"{dtype}: off by {error:.0e}")
        return ", ".join(said)

    # -- parts of checks

    def _graph(self, *, first_dependent: bool, dependent: bool, added: int) -> str:
        x, w, y = self.inputs()

        def chain() -> None:
            self.scale(x, y, dependent=first_dependent)
            for _ in range(added):
                self.add(w, y, dependent=dependent)

        chain()  # loads the modules
        replay = self._capture(chain)
        for _ in range(ROUNDS):
            x.copy_(torch.randn(N).half())
            y.fill_(float("nan"))
            replay()
            said = same(y, self.expected(x, w, added))
        return said

    def _captured_copy(self, source: torch.Tensor):
        """A graph: x = source on the copy stream, then y = 2 x. Returns x, w, y, replay, and the captured event."""
        x, w, y = self.inputs()
        self.scale(x, y)
        events = []

        def step() -> None:
            events.append(self.copies.copy(x, source, self.copies.record()))
            self.copies.wait(events[-1])
            self.scale(x, y)

        return x, w, y, self._capture(step), events[-1]

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self._synchronize()
        replay = self.backend.capture(run)
        if replay is None:
            raise Wrong("this backend has no graphs")
        return replay

    def _registered(self):
        return _Registered(self.device)

    def _dependence(self) -> str:
        return "" if self.backend.arch >= 90 else "; no dependent launches below compute capability 9.0"

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Registered:
    """Host memory that the driver has page-locked: a buffer, and f16 [N] in it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = HostBuffer(2 * N, "smoke test")
        self._lock = pinned(self._buffer) if device.type == "cuda" else None

    def __enter__(self) -> tuple[HostBuffer, torch.Tensor]:
        if self._lock is not None:
            self._lock.__enter__()
        source = torch.from_numpy(self._buffer.array).view(torch.float16)
        source.copy_(torch.randn(N).half())
        return self._buffer, source

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)


def same(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Raises ``Wrong``, naming the first value that differs."""
    found, expected = found.cpu().flatten(), expected.cpu().flatten()
    if torch.equal(found, expected):
        return f"{len(found)} values"
    wrong = (found != expected).nonzero().flatten()
    at = int(wrong[0])
    raise Wrong(
        f"{len(wrong)} of {len(found)} values differ, first at {at}: found {found[at]}, expected {expected[at]}"
    )


CHECKS: tuple[Callable[[Checks], str], ...] = (
    Checks.plain_launch,
    Checks.dependent_launch,
    Checks.large_shared_memory,
    Checks.graph_of_plain_nodes,
    Checks.graph_of_dependent_nodes,
    Checks.graph_with_a_dependent_node_first,
    Checks.graph_with_a_copy_from_registered_memory,
    Checks.graph_that_reads_mapped_memory,
    Checks.eager_wait_after_a_capture,
    Checks.product_with_an_f32_result,
    Checks.eager_wait_for_a_captured_event,
)


def make_checks(dry_run: bool, kernel_cache: Path | None) -> Checks:
    if not dry_run:
        backend = CudaBackend(folder=kernel_cache, sources=KERNELS)
        return Checks(backend, TorchCopyEngine(backend.device))
    from tests.host.backends import make_backend
    from tests.host.recording import RecordingBackend

    recorder = RecordingBackend(make_backend("plain", 90, KERNELS))
    return Checks(recorder, RecordedCopies(recorder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Place.parse, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--kernel-cache", type=Path)
    parser.add_argument("--only", type=json.loads, help="JSON list of names")
    arguments = parser.parse_args()
    worker, made = Worker(arguments.place), []
    torch.manual_seed(0)

    def make() -> str:
        made.append(make_checks(arguments.dry_run, arguments.kernel_cache))
        backend = made[0].backend
        return (
            f"{backend.device}, compute capability {backend.arch / 10}, {backend.num_multiprocessors} multiprocessors"
        )

    # Every worker needs a backend; only the first worker reports it.
    if arguments.only is None and worker.claim("backend"):
        worker.run("backend", make)
    if not made:
        make()
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        if (arguments.only is None or name in arguments.only) and worker.claim(name):
            worker.run(name, lambda check=check: check(made[0]))


if __name__ == "__main__":
    main()
