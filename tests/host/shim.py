"""The host backend's library for tests: every kernel in one of three builds.

- ``race``: in this process; detects races in shared memory, reads before any write and missing waits; checks every
  access against the launch's buffers.
- ``asan``: AddressSanitizer and UBSan, in a worker process; buffers and shared memory lie between redzones.
- ``plain``: no checks, for whole models.

Each launch has its own seed, derived from the shim's seed and a count, so lanes, warps and blocks run in another order.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from exl.errors import KernelError
from exl.kernels.args import Arg, Pointer
from exl.kernels.launch import HostBackend, Param
from exl.kernels.spec import KernelSpec

from .build import build
from .library import Fault, Library, Request
from .worker import Worker

ELEMENTS = {"h": "f16", "b": "bf16", "v": "void", "s": "struct"}


class HostShim:
    """A ``HostLibrary``. ``folder`` holds the kernels' sources and ``include/exl`` (default: exl's own)."""

    def __init__(
        self, mode: str = "race", seed: int = 0, folder: Path | None = None, extra: tuple[str, ...] = ()
    ) -> None:
        self.mode = mode
        self.folder = folder
        self.extra = extra
        self.num_launches = 0
        self._seed = seed
        self._chain: dict[tuple[int, int], bool] = {}  # memory that the chain may still use -> whether it is written

    def load(self, spec: KernelSpec) -> HostKernel:
        return HostKernel(self, spec, build(spec, self.mode, self.folder, self.extra))

    def next_seed(self) -> int:
        self.num_launches += 1
        return (self._seed * 1_000_003 + self.num_launches) & (2**63 - 1)

    def may_touch_early(self, arg: Pointer, writable: bool) -> bool:
        """Whether an access before griddepcontrol.wait is safe: no earlier launch of the chain may write that memory
        or, if this launch writes it, read it.

        All earlier launches count, not only the last: it may have let this one start before it waited itself.
        """
        start, stop = arg.address, arg.address + arg.num_bytes
        return not any(start < b and a < stop and (writable or written) for (a, b), written in self._chain.items())

    def end_chain(self) -> None:
        """Something that is no launch comes next, such as a copy: it starts after all earlier launches have ended, and
        later ones after it. Without this, memory that was freed and is used for something else would still count."""
        self._chain.clear()

    def note_launch(self, ranges: Sequence[tuple[int, int, int, bool, bool]], dependent: bool) -> None:
        if not dependent:
            self.end_chain()  # a plain launch starts after all earlier launches have ended
        for start, num_bytes, _, writable, _ in ranges:
            piece = (start, start + num_bytes)
            self._chain[piece] = writable or self._chain.get(piece, False)


class ShimBackend(HostBackend):
    """A ``HostBackend`` on a ``HostShim``, which learns of the copies between launches, too."""

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        super().call(function, *tensors)
        self._library.end_chain()


class HostKernel:
    """One kernel variant, loaded."""

    def __init__(self, shim: HostShim, spec: KernelSpec, path: Path) -> None:
        self.spec = spec
        self.path = path
        self._shim = shim
        self._library = Worker.shared().load(str(path)) if shim.mode == "asan" else Library(str(path))
        self.params = tuple(_param(*fields) for fields in self._library.params())
        self.max_threads = self._library.max_threads()

    def stats(self) -> dict[str, int]:
        """Counts of the last launch: fiber switches, collectives per lane, and (``race`` only) checked accesses."""
        return self._library.stats()

    def run(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Arg], shared_bytes: int, dependent: bool
    ) -> None:
        ranges = []
        for i, (param, arg) in enumerate(zip(self.params, args, strict=True)):
            if isinstance(arg, Pointer) and arg.num_bytes:
                early = not dependent or self._shim.may_touch_early(arg, not param.is_const)
                ranges.append((arg.address, arg.num_bytes, i, not param.is_const, early))
        slots = tuple(int.from_bytes(arg.pack().ljust(8, b"\0"), "little") for arg in args)
        request = Request(
            tuple(grid), tuple(block), shared_bytes, self._shim.next_seed(), dependent, slots, tuple(ranges)
        )
        self._shim.note_launch(ranges, dependent)
        fault = self._library.launch(request)
        if fault is not None:
            raise KernelError(self._explain(fault))

    def _explain(self, fault: Fault) -> str:
        message = fault.message
        for i, site in enumerate(fault.sites):
            message = message.replace(f"{{{i}}}", source_line(self.path, site))
        where = f"block {fault.block}, thread {fault.thread} (warp {fault.warp}, lane {fault.lane})"
        return f"{self.spec} on the host: {message}; {where}"


def _param(kind: str, num_bytes: int, element: str, element_bytes: int, is_const: bool) -> Param:
    name = ELEMENTS.get(element) or (f"{element}{element_bytes * 8}" if element else "")
    return Param(kind, num_bytes, name, element_bytes, is_const)


def source_line(path: Path, site: int) -> str:
    """A return address as ``linear_q.cu:120 (in ptx.cuh:30)``: the kernel's own line, then inlined callees."""
    command = ["addr2line", "-i", "-s", "-e", str(path), hex(site - 1)]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return f"offset {site:#x} of {path.name}"
    frames = [line.split(" ")[0] for line in out if line and not line.startswith("?")]
    frames = [f for f in frames if not f.startswith(("device.hpp", "ptx.hpp", "kernel_main.hpp"))] or frames
    if not frames:
        return f"offset {site:#x} of {path.name}"
    inner = f" (in {', '.join(reversed(frames[:-1]))})" if len(frames) > 1 else ""
    return frames[-1] + inner
