"""Host time of launches, measured without a GPU: whole passes of a model whose kernels do not run.

``python -m benchmarks.launch_cost`` builds CudaOps on its own backend. Its functions are exl's, prepared and started as
on a GPU, but ``libcuda`` is replaced by a library of two functions that return at once. Tensors are on the CPU, weights
are memory that is never accessed, products of panels are left out. So the figures are the time of our own Python and of
ctypes; the driver's own time, about 2 us per launch, and cuBLAS's calls come on top.

Needs a C compiler. Figures are medians of rounds. ``first``: the first pass of a shape, with kernels already loaded.
``staging``, the preparation of a batch's tables, is part of both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.end_to_end import forward, step_batch
from benchmarks.synthetic import write_headers
from exl.batch import PAGE_SIZE, ForwardBatch
from exl.engine.build import Engine, build_engine
from exl.errors import KernelError
from exl.kernels.cuda_function import CudaFunction
from exl.kernels.driver import Driver, DriverLaunch
from exl.kernels.spec import KernelSpec
from exl.kernels.work import Work
from exl.models.manifest import BlobSpec
from exl.ops.base import Ops, view_field, view_segments
from exl.planning.from_headers import ModelFiles, open_model
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan
from exl.planning.shapes import SHAPES, ModelShape
from exl.weights.loader import ModelWeights
from exl.weights.placement import DeviceWeights

ARCH, NUM_MULTIPROCESSORS = 86, 82  # an RTX 3090
ROUNDS = 15
STEPS = (1, 16, 64)  # sequences of a step
PROMPTS = (512, 2048)  # rows of a chunk: below and above the crossover to panels
NO_DRIVER = """
int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) { return 0; }
int cuGetErrorString(int status, const char** text) { return 0; }
"""


class NoDevice:
    """A backend that prepares and starts launches like CUDA's, with a driver that does nothing."""

    def __init__(self, driver: Driver) -> None:
        self.device = torch.device("cpu")
        self.arch, self.num_multiprocessors = ARCH, NUM_MULTIPROCESSORS
        self.num_launches = self.num_calls = 0
        self._driver, self._functions = driver, {}
        attributes = SimpleNamespace(funcSetAttribute=lambda *_: None, CUDADriverError=KernelError)
        runtime = SimpleNamespace(CUDARuntimeError=KernelError)
        self._cupy = SimpleNamespace(
            cuda=SimpleNamespace(driver=attributes, runtime=runtime, Device=lambda index: nullcontext())
        )

    def load(self, spec: KernelSpec) -> CudaFunction:
        if spec not in self._functions:
            handle = SimpleNamespace(ptr=0xF00)
            self._functions[spec] = CudaFunction(spec, self.device, handle, self._driver, self._cupy)
        return self._functions[spec]

    def start(self, work: Sequence[Work]) -> None:
        for one in work:
            if isinstance(one, DriverLaunch):
                one.start(0xABC)
                self.num_launches += 1
            else:
                self.num_calls += 1  # a call of cuBLAS

    def call(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        function(*tensors)  # the copy of a window's tables

    def capture(self, run: Callable[[], None]) -> None:
        return None


def prompt(num_rows: int) -> ForwardBatch:
    """All tokens of a prompt in one chunk."""
    rows, length = np.arange(num_rows, dtype=np.int32), np.array([num_rows], np.int32)
    return ForwardBatch(
        token_ids=rows % 1000,
        positions=rows,
        slots=rows,
        query_start=np.array([0, num_rows], np.int32),
        context_len=length,
        rope_len=length,
        page_table=np.arange(-(-num_rows // PAGE_SIZE), dtype=np.int32)[None],
        logit_rows=length - 1,
        num_decode_rows=0,
    )


@contextmanager
def model(shape: ModelShape, act_order: bool) -> Iterator[tuple[Engine, NoDevice]]:
    """A model of 4 bits in groups of 128; with ``act_order`` all linears of a layer are sorted by group."""
    with tempfile.TemporaryDirectory() as name:
        driver = Driver(str(_library(Path(name))))
        driver.open()
        backend = NoDevice(driver)
        write_headers(Path(name) / "headers", shape)
        with open_model(Path(name) / "headers") as files:
            if act_order:
                layers = tuple(_sorted(layer) for layer in files.manifest.layers)
                files = replace(files, manifest=replace(files.manifest, layers=layers))
            options = EngineOptions(
                **{"context": max(PROMPTS) + PAGE_SIZE, "max_sequences": max(STEPS), "cache_tokens": 4 * max(PROMPTS)},
                **{"prefill_chunk": max(PROMPTS), "prefill_window": max(PROMPTS), "vram": "32GB"},
            )
            engine = build_engine(files, options, backend, lambda ops, plan: _weights(files, ops, plan))
    try:
        yield engine, backend
    finally:
        engine.close()


def _library(folder: Path) -> Path:
    path = folder / "no_driver.so"
    subprocess.run(
        ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-o", path, "-"], input=NO_DRIVER, text=True, check=True
    )
    return path


def _sorted(layer: BlobSpec) -> BlobSpec:
    linears = [
        (name, tuple(replace(x, parts=tuple(replace(p, order_key=name) for p in x.parts)) for x in segments))
        for name, segments in layer.linears
    ]
    return replace(layer, linears=tuple(linears))


def _weights(files: ModelFiles, ops: Ops, plan: MemoryPlan) -> ModelWeights:
    found = files.manifest.layouts(ops.target)
    layouts = (found.embed, *found.layers, found.head)
    with ExitStack() as stack:
        placement = plan.placement
        memory = DeviceWeights(layouts, placement.resident, (), plan.num_buffers, ops.device, stack, placement.embed)
        last = len(layouts) - 1
        return ModelWeights(
            embed=view_segments(found.embed, memory.view(0), "embed")[0],
            final_norm=view_field(memory.view(last), found.head.fields["final_norm"]),
            head=view_segments(found.head, memory.view(last), "head")[0],
            source=memory.source(None),
            slabs=memory.slabs,
            _owned=stack.pop_all(),
        )


@dataclass(frozen=True)
class Cost:
    num_launches: int
    num_calls: int
    first_seconds: float
    again_seconds: float
    staging_seconds: float

    def __str__(self) -> str:
        def time_of(seconds: float) -> str:
            return f"{seconds * 1e3:7.2f} ms {seconds / self.num_launches * 1e6:6.1f} us"

        first, again = time_of(self.first_seconds), time_of(self.again_seconds)
        return f"{self.num_launches:8} {self.num_calls:7} {first} {again} {self.staging_seconds * 1e3:7.2f} ms"


def measure(engine: Engine, backend: NoDevice, batches: Sequence[ForwardBatch]) -> Cost:
    """Measures ``batches``: their shapes must not have run yet, and must use the same kernels."""
    first, again, staging = [], [], []
    for batch in batches:
        backend.num_launches = backend.num_calls = 0
        first.append(_seconds(lambda batch=batch: forward(engine, [batch])))
        counts = backend.num_launches, backend.num_calls
        again.append(_seconds(lambda batch=batch: forward(engine, [batch])))
        staging.append(_seconds(lambda batch=batch: engine.generator.runner.decoder.ops.stage([batch])))
    engine.generator.runner.decoder.ops.stage(())
    return Cost(*counts, *(statistics.median(times) for times in (first, again, staging)))


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(shape: str) -> Iterator[str]:
    title = f"{shape}, 4 bits, sm_{ARCH}, {NUM_MULTIPROCESSORS} multiprocessors"
    yield f"{title:42} launches  cuBLAS      first: all, a launch      again: all, a launch  staging"
    for act_order in (False, True):
        with model(SHAPES[shape], act_order) as (engine, backend):
            vocab = engine.config.vocab_size
            forward(engine, [prompt(PROMPTS[0] + 64)])  # work that is done once per process
            cases = {f"a step of {rows} rows": [step_batch(100, rows, vocab)] * ROUNDS for rows in STEPS}
            for num_rows in PROMPTS:  # each is a new shape
                cases[f"a prompt of {num_rows} rows"] = [prompt(num_rows - i) for i in range(ROUNDS)]
            for name, batches in cases.items():
                yield f"{'act-order, ' if act_order else ''}{name:{31 if act_order else 42}} " + str(
                    measure(engine, backend, batches)
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other would measure other processes
    for line in report(args.shape):
        print(line, flush=True)


if __name__ == "__main__":
    main()
