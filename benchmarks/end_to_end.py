"""Whole models on this machine's GPU: decoding, prompts, memory against the plan, streamed layers, in one run.

``python benchmarks/end_to_end.py`` is made to take under eight minutes, prints a report and writes it to
``benchmarks/results/<gpu>-end-to-end.md``. Needs this repository, torch and CuPy; no checkpoint: random 4-bit weights
(groups of 128, symmetric) in the shapes of Llama models are made on the device. Every share is of a roof that is
measured in the same run: a read-only pass over memory, f16 cuBLAS for the same linears, a copy from pinned memory.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, installed or not

from benchmarks.kernels import Timer, int4pack_us, measure_roofs
from benchmarks.synthetic import SHAPES, write_headers
from exl.batch import PAGE_SIZE, ForwardBatch
from exl.bench import bytes_a_token
from exl.device_memory import pinned
from exl.engine import Engine, build_engine
from exl.errors import KernelError, MemoryBudgetError
from exl.host_memory import HostBuffer
from exl.kernels.driver import DriverLaunch
from exl.kernels.launch import Backend, CudaBackend
from exl.layout import LayerLayout
from exl.loader import ModelWeights
from exl.memory import MemoryPlan, Tier
from exl.ops.base import Ops, view_field, view_segments
from exl.planning import EngineOptions, open_model
from exl.weight_memory import DeviceWeights

DEPTHS, BATCHES = (0, 4096, 32768), (1, 4, 16)
KINDS = ("f16", "q8", "k8v4", "q4")
REPEATS = 20
PROMPT = 2048
COPY_BYTES = 1 << 30
MOST_SECONDS = 460  # then the table of decoding ends where it is; a cold cache of kernels takes its share


# ---- models of random weights ---------------------------------------------------------------------------------------


def random_weights(layouts: Sequence[LayerLayout], ops: Ops, plan: MemoryPlan, streams: bool) -> ModelWeights:
    """Blobs as the loader would place them, filled where they lie. ``MemoryBudgetError`` where layers would have to be
    streamed and that was not asked for."""
    if plan.placement.num_streamed and not streams:
        raise MemoryBudgetError("not all layers fit")
    with ExitStack() as stack:
        placement = plan.placement
        in_host = placement.on_tier(Tier.PINNED)
        memory = DeviceWeights(layouts, placement.resident, in_host, plan.num_slots, ops.device, stack)
        filled: torch.Tensor | None = None  # a pinned layer: random numbers are slow on the host
        for i in memory.kept:
            blob = memory.view(i)
            if i - 1 not in in_host:
                fill_random(blob, layouts[i])
            elif filled is None:
                fill_random(blob, layouts[i])
                filled = blob
            else:
                blob.copy_(filled)
        embed = view_segments(layouts[0], memory.view(0), "embed")[0]
        last = len(layouts) - 1
        return ModelWeights(
            embed=embed,
            final_norm=view_field(memory.view(last), layouts[last].fields["final_norm"]),
            head=view_segments(layouts[last], memory.view(last), "head")[0],
            source=memory.source(None),
            slabs=memory.slabs,
            _owned=stack.pop_all(),
        )


def fill_random(blob: torch.Tensor, layout: LayerLayout) -> None:
    """Codes of all values, small scales, norms of one: sums stay finite, speed does not depend on the rest."""
    for name, field in layout.fields.items():
        tensor = view_field(blob, field)
        kind = name.rsplit(".", 1)[-1]
        if kind == "codes":
            tensor.view(torch.uint8).random_(0, 256)
        elif kind == "scales":
            tensor.fill_(0.002)
        elif kind == "weight":
            tensor.normal_(0, 0.02)
        else:
            tensor.fill_(1)


@contextmanager
def synthetic_engine(
    backend: Backend,
    shape: tuple[int, ...],
    *,
    dependent: bool = True,
    graphs: bool = True,
    streams: bool = False,
    **options,
) -> Iterator[Engine]:
    """A Llama of the shape; ``options`` of ``EngineOptions``. Raises ``MemoryBudgetError``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "headers"
        write_headers(folder, shape)
        with open_model(folder) as files:

            def load(ops: Ops, plan: MemoryPlan) -> ModelWeights:
                found = files.manifest.layouts(ops.target)
                return random_weights((found.embed, *found.layers, found.head), ops, plan, streams)

            engine = build_engine(files, EngineOptions(**options), backend, load, dependent=dependent, graphs=graphs)
    try:
        yield engine
    finally:
        engine.close()


def step_batch(depth: int, num_sequences: int, vocab_size: int) -> ForwardBatch:
    """The next token of sequences that have ``depth`` in the cache, each on pages of its own."""
    num_pages = depth // PAGE_SIZE + 1
    rows = np.arange(num_sequences, dtype=np.int32)
    table = (rows[:, None] * num_pages + np.arange(num_pages)).astype(np.int32)
    at = np.full(num_sequences, depth, np.int32)
    return ForwardBatch(
        token_ids=(3 + rows * 37 % (vocab_size - 3)).astype(np.int32),
        positions=at,
        slots=table[:, depth // PAGE_SIZE] * PAGE_SIZE + depth % PAGE_SIZE,
        query_start=np.arange(num_sequences + 1, dtype=np.int32),
        context_len=at + 1,
        rope_len=at + 1,
        page_table=table,
        logit_rows=rows,
        num_decode_rows=num_sequences,
    )


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    seconds: float  # from one step's end to the next, the device never idle
    host_seconds: float  # until the host has given a step away


def time_steps(engine: Engine, batch: ForwardBatch, repeats: int = REPEATS) -> StepTime:
    """Median of rounds of steps in a row, after the first, which runs plainly, and the second, which is captured."""
    for _ in range(4):
        forward(engine, [batch])
    rounds, host = [], []
    for _ in range(3):
        engine.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            forward(engine, [batch])
        engine.synchronize()
        rounds.append((time.perf_counter() - began) / repeats)
    for _ in range(repeats):  # each from an idle device: else the host waits for room in the queue
        engine.synchronize()
        began = time.perf_counter()
        forward(engine, [batch])
        host.append(time.perf_counter() - began)
    engine.synchronize()
    return StepTime(statistics.median(rounds), statistics.median(host))


def forward(engine: Engine, batches: Sequence[ForwardBatch]) -> None:
    for _ in engine.generator.runner.forward(batches):
        pass


def step_bytes_read(engine: Engine, depth: int, num_sequences: int) -> int:
    """Weights once, and each sequence's cache."""
    weights = bytes_a_token(engine.model, 0)
    return weights + num_sequences * (bytes_a_token(engine.model, depth + 1) - weights)


def decode_rows(backend: Backend, names: Sequence[str], kinds: Sequence[str], roof: float) -> Iterator[str]:
    """One line for each model, cache type, depth and batch; what has no room says so."""
    for name in names:
        for kind in kinds:
            for depth in DEPTHS:
                for num_sequences in BATCHES:
                    yield decode_row(backend, name, kind, depth, num_sequences, roof)


def decode_row(backend: Backend, name: str, kind: str, depth: int, num_sequences: int, roof: float) -> str:
    label = f"| {name} | {kind} | {depth} | {num_sequences}"
    options = {"kv_cache": kind, "max_sequences": num_sequences, "context": depth + PAGE_SIZE}
    options |= {"prefill_chunk": 64, "prefill_window": 64}
    try:
        with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), **options) as engine:
            found = time_steps(engine, step_batch(depth, num_sequences, engine.config.vocab_size))
            share = step_bytes_read(engine, depth, num_sequences) / found.seconds / roof
            speed = num_sequences / found.seconds
            return f"{label} | {speed:.1f} | {found.seconds * 1e3:.2f} | {share:.0%} |"
    except MemoryBudgetError:
        return f"{label} | does not fit | | |"


def host_lines(backend: CountingBackend, name: str) -> Iterator[str]:
    """What a decode step costs the host, with and without graphs, and what dependent launches bring."""
    batch = step_batch(0, 1, SHAPES[name][-1])
    times: dict[tuple[bool, bool], StepTime] = {}
    for graphs in (False, True):
        for dependent in (False, True):
            options = {"context": PAGE_SIZE, "dependent": dependent, "graphs": graphs}
            times[graphs, dependent], launches = counted_steps(backend, name, batch, options)
    for graphs, text in ((False, "launched one by one"), (True, "replayed as a graph")):
        plain, dependent = times[graphs, False], times[graphs, True]
        yield (
            f"- {name}, {text}: {dependent.seconds * 1e3:.3f} ms a step, {dependent.host_seconds * 1e6:.0f} us of them "
            f"on the host; without dependent launches {plain.seconds * 1e3:.3f} ms "
            f"({plain.seconds / dependent.seconds:.2f} times)"
        )
    yield f"- {name}: {launches} launches a step"


def counted_steps(backend: CountingBackend, name: str, batch: ForwardBatch, options: dict) -> tuple[StepTime, int]:
    """One engine's times, and how many launches its first step had."""
    with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), **options) as engine:
        before = backend.num_launches
        forward(engine, [batch])
        launches = backend.num_launches - before
        return time_steps(engine, batch), launches


def prefill_line(backend: Backend, name: str, *, peer: bool = True) -> str:
    """A prompt against the same linears in f16 through cuBLAS, and the memory that was reserved against the plan."""
    reset_peak(backend)
    context = PROMPT + 2 * PAGE_SIZE
    with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), context=context) as engine:
        ids = [3 + i * 37 % (engine.config.vocab_size - 3) for i in range(PROMPT)]
        seconds = []
        for _ in range(4):
            sequence = engine.generator.begin(PROMPT)
            engine.synchronize()
            began = time.perf_counter()
            engine.generator.extend(sequence, ids)
            engine.synchronize()
            seconds.append(time.perf_counter() - began)
            engine.generator.end(sequence)
        time_steps(engine, step_batch(0, 1, engine.config.vocab_size), 4)
        found = statistics.median(seconds[1:])
        memory = peak_text(engine)
        chunk = engine.model.limits.max_rows
    speed = f"- {name}: {PROMPT / found:.0f} tokens/s"
    if not peer:
        return f"{speed}; {memory}"
    del engine
    timer = Timer(backend.device)
    cublas = PROMPT / chunk * linears_us(SHAPES[name], chunk, backend.device, timer) / 1e6
    return f"{speed}, {cublas / found:.0%} of the speed of f16 cuBLAS for the linears alone; {memory}"


def linears_us(shape: tuple[int, ...], num_tokens: int, device: torch.device, timer: Timer) -> float:
    """All layers' linears in f16 by cuBLAS, one chunk."""
    total = 0.0
    for K, N in linear_shapes(shape):
        matrix = torch.randn(N, K, device=device, dtype=torch.float16)
        x = torch.randn(num_tokens, K, device=device, dtype=torch.float16)
        total += timer.median_us(lambda m=matrix, x=x: torch.nn.functional.linear(x, m))
    return shape[2] * total


def peer_line(name: str, device: torch.device, timer: Timer, seconds: float) -> str:
    """The peer's 4-bit kernel for the linears of a step, nothing else of it: a bound for a model that uses it."""
    found = [int4pack_us(K, N, 1, device, timer) for K, N in linear_shapes(SHAPES[name])]
    if None in found:
        return f"- {name}: torch has no 4-bit kernel here"
    linears = SHAPES[name][2] * sum(found) / 1e6
    return (
        f"- {name}: torch's `_weight_int4pack_mm` for all linears of a step, one by one: {linears * 1e3:.2f} ms; "
        f"exl's whole step {seconds * 1e3:.2f} ms ({linears / seconds:.2f} times)"
    )


def linear_shapes(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    hidden, inter, _, heads, kv_heads, head_dim, _ = shape
    width = heads * head_dim
    return [(hidden, width + 2 * kv_heads * head_dim), (width, hidden), (hidden, 2 * inter), (inter, hidden)]


def stream_line(backend: Backend, name: str, copy_rate: float) -> str:
    """A model in VRAM of half its weights' size: what crosses the bus in a step, against a plain copy."""
    shape = SHAPES[name]
    resident = shape[2] // 2
    reset_peak(backend)
    options = {"vram": free_vram(backend), "context": PAGE_SIZE, "resident_layers": resident}
    with synthetic_engine(backend, shape, streams=True, **options) as engine:
        layers = [layout.num_bytes for layout in engine.model.layers]
        pinned_bytes = sum(layers[i] for i in engine.plan.placement.on_tier(Tier.PINNED))
        found = time_steps(engine, step_batch(0, 1, engine.config.vocab_size), 4)
        memory = peak_text(engine)
    share = pinned_bytes / found.seconds / copy_rate
    return (
        f"- {name}, {resident} of {len(layers)} layers in VRAM: {1 / found.seconds:.2f} tokens/s, "
        f"{pinned_bytes / found.seconds / 1e9:.2f} GB/s over the bus, {share:.0%} of a plain copy's; {memory}"
    )


def pinned_copy_rate(device: torch.device) -> float:
    """Bytes a second of large copies from page-locked memory."""
    buffer = HostBuffer(COPY_BYTES, "copied")
    buffer.array[::4096] = 1
    with pinned(buffer, device):
        source, target = torch.from_numpy(buffer.array), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return COPY_BYTES / statistics.median(seconds)


# ---- memory ---------------------------------------------------------------------------------------------------------


def free_vram(backend: Backend) -> int | str:
    """What a plan may take now."""
    if backend.device.type != "cuda":
        return "8GB"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(backend.device)
    return free


def reset_peak(backend: Backend) -> None:
    if backend.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(backend.device)


def peak_text(engine: Engine) -> str:
    """What torch's allocator reserved at most, against the plan's lines that it serves."""
    lines = [line for line in engine.plan.lines if line.device == "cuda:0" and not line.purpose.startswith("CUDA")]
    planned = sum(line.num_bytes for line in lines)
    if engine.device.type != "cuda":
        return f"{planned} bytes planned"
    found = torch.cuda.max_memory_reserved(engine.device)
    return f"{found / 1e9:.3f} GB reserved of {planned / 1e9:.3f} GB planned ({found / planned:.1%})"


# ---- launches -------------------------------------------------------------------------------------------------------


class CountingBackend(CudaBackend):
    """Counts what is launched, or captured."""

    num_launches = 0

    def start(self, work) -> None:
        super().start(work)
        self.num_launches += sum(isinstance(one, DriverLaunch) for one in work)


# ---- the report -----------------------------------------------------------------------------------------------------


def report(backend: CountingBackend, names: Sequence[str], kinds: Sequence[str]) -> Iterator[str]:
    """The file's lines, as they are measured."""
    torch.manual_seed(0)
    timer = Timer(backend.device)
    began = time.perf_counter()
    yield f"# {torch.cuda.get_device_name(backend.device)}: whole models"
    yield ""
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability {backend.arch / 10}, "
    yield f"{backend.num_multiprocessors} multiprocessors. 4 bits, groups of 128, symmetric, f16 head."
    yield ""
    roof, copy_rate = measure_roofs(backend, timer).read, pinned_copy_rate(backend.device)
    del timer
    yield f"- reading 2 GiB: {roof / 1e9:.0f} GB/s (the roof below)"
    yield f"- copying 1 GiB from pinned memory: {copy_rate / 1e9:.2f} GB/s"
    yield ""
    yield "## A decode step on the host"
    yield ""
    for name in names:
        yield from host_lines(backend, name)
    yield ""
    yield f"## Prompts of {PROMPT} tokens, and memory"
    yield ""
    for name in names:
        yield prefill_line(backend, name)
    yield ""
    yield "## Against a peer's kernel"
    yield ""
    for name in names:
        batch = step_batch(0, 1, SHAPES[name][-1])
        found, _ = counted_steps(backend, name, batch, {"context": PAGE_SIZE})
        yield peer_line(name, backend.device, Timer(backend.device), found.seconds)
    yield ""
    yield "## Streamed from pinned memory"
    yield ""
    yield stream_line(backend, names[-1], copy_rate)
    yield ""
    yield "## Decoding"
    yield ""
    yield "Share: bytes of weights and cache that a step reads, by its time, against the roof."
    yield ""
    yield "| model | cache | depth | batch | tokens/s | ms a step | share of the roof |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in decode_rows(backend, names, kinds, roof):
        yield row
        if time.perf_counter() - began > MOST_SECONDS:
            yield ""
            yield f"The rest was left out: {MOST_SECONDS} s were over."
            break
    yield ""
    yield f"All of this took {time.perf_counter() - began:.0f} s."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["1.1b", "7b", "13b"], help="shapes to measure")
    parser.add_argument("--kv-caches", nargs="+", choices=KINDS, default=list(KINDS), help="types of the cache")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the report")
    arguments = parser.parse_args()
    try:
        backend = CountingBackend()
    except KernelError as error:
        print(f"benchmarks/end_to_end.py needs a GPU: {error}", file=sys.stderr)
        return 1
    lines = []
    path = arguments.out / f"{gpu_name(backend)}-end-to-end.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in report(backend, arguments.models, arguments.kv_caches):
        print(line, flush=True)
        lines.append(line)
        path.write_text("\n".join(lines) + "\n")  # what was measured is kept, whatever comes
    print(f"written to {path}")
    return 0


def gpu_name(backend: Backend) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(backend.device)).strip("-").lower()


if __name__ == "__main__":
    sys.exit(main())
