"""Registers, stack and memory of a compiled kernel, as ptxas reports them."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from exl.kernels.compiler import write_file
from exl.kernels.spec import KernelSpec, digest, flattened, nvrtc_options

from .nvrtc import Nvrtc, nvrtc

CACHE = Path(__file__).resolve().parents[2] / "build" / "compile"
NUM_PROCESSES = 2
VERBOSE = "--ptxas-options=-v"  # adds to the log, does not change the code
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """Per thread, except ``static_shared_bytes``, which is per block (a launch sets its dynamic shared memory)."""

    registers: int
    stack_bytes: int
    spilled_bytes: int  # stores and loads
    static_shared_bytes: int


def parse(log: str, entry: str) -> Resources:
    """Reads ptxas's log of one entry. Raises ``ValueError`` if the log does not mention it."""
    start = log.find(f"Compiling entry function '{entry}'")
    part = log[start:].split("Compiling entry function", 2)[1] if start >= 0 else ""
    frame, used = FRAME.search(part), USED.search(part)
    if frame is None or used is None:
        raise ValueError(f"no resource usage of {entry} in the compiler's log:\n{log}")
    shared = SHARED.search(part)
    stack, stores, loads = map(int, frame.groups())
    return Resources(int(used[1]), stack, stores + loads, int(shared[1]) if shared else 0)


def measure(spec: KernelSpec, compiler: Nvrtc, sources: Path | None = None) -> Resources:
    """Compiles ``spec`` with the options that users get. Results are kept by digest under ``build/compile``."""
    text, options = flattened(spec, sources), (*nvrtc_options(spec), VERBOSE)
    path = CACHE / f"{spec.entry}-{digest(text, options, compiler.version())[:24]}.json"
    if path.exists():
        return Resources(**json.loads(path.read_text()))
    _, log = compiler.compile(text, spec.source, options)
    resources = parse(log, spec.entry)
    write_file(path, json.dumps(asdict(resources)).encode())
    return resources


def measure_all(specs: list[KernelSpec]) -> list[Resources]:
    """``measure`` for each of exl's kernels, in two processes: NVRTC compiles one program at a time per process."""
    with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES) as pool:
        return pool.map(_measure_here, specs, chunksize=4)


def _measure_here(spec: KernelSpec) -> Resources:
    return measure(spec, nvrtc())


def name_of(spec: KernelSpec) -> str:
    """A variant's key in the budget file: ``linear_q EXL_BITS=4 EXL_NT=1``."""
    return " ".join((spec.entry, *(f"{name}={value}" for name, value in spec.macros)))
