"""Whole models on this machine's GPU in one run: decoding, prompts, memory against the plan, streamed layers.

``python benchmarks/end_to_end.py`` takes under eight minutes, prints a report and writes it to
``benchmarks/results/<gpu>-end-to-end.md``. Needs this repository, torch and CuPy; no checkpoint: random 4-bit weights
(groups of 128, symmetric) in the shapes of Llama models are made on the device. Every share is of a roof that is
measured in the same run: a read-only pass over memory, f16 cuBLAS for the same linears, a copy from pinned memory.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, installed or not

from benchmarks import report
from benchmarks.kernels import int4pack_us
from benchmarks.machine import Machine, rate, share
from benchmarks.report import Measurement, Section
from benchmarks.synthetic import write_headers
from benchmarks.timing import Timer
from exl.batch import PAGE_SIZE, ForwardBatch
from exl.engine.build import Engine, build_engine
from exl.errors import MemoryBudgetError
from exl.kernels.launch import Backend
from exl.layout.layers import LayerLayout
from exl.ops.base import Ops, view_field, view_segments
from exl.planning import shapes
from exl.planning.from_headers import open_model
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan, Tier
from exl.planning.shapes import ModelShape
from exl.planning.traffic import model_bytes_a_token
from exl.weights.loader import ModelWeights
from exl.weights.placement import DeviceWeights

SHAPES: dict[str, ModelShape] = dict(shapes.SHAPES)  # a dry run adds a small one
MODELS = ["tinyllama-1.1b", "llama-2-7b", "llama-2-13b"]  # measured if nothing else is asked for
DEPTHS, BATCHES = (0, 4096, 32768), (1, 4, 16)
KINDS = ("f16", "q8", "k8v4", "q4")
REPEATS = 20
PROMPT = 2048
# Together under eight minutes, including compilation if the kernel cache is cold.
SECONDS = {"decode": 240, "host": 60, "prompt": 60, "peer": 40, "stream": 60}


# ---- models of random weights ---------------------------------------------------------------------------------------


def random_weights(layouts: Sequence[LayerLayout], ops: Ops, plan: MemoryPlan, streams: bool) -> ModelWeights:
    """Random weights in the loader's blobs and places. Raises ``MemoryBudgetError`` if layers would have to be
    streamed and that was not requested."""
    if plan.placement.num_streamed and not streams:
        raise MemoryBudgetError("not all layers fit")
    with ExitStack() as stack:
        placement = plan.placement
        in_host = placement.on_tier(Tier.PINNED)
        memory = DeviceWeights(
            layouts, placement.resident, in_host, plan.num_buffers, ops.device, stack, placement.embed
        )
        filled: torch.Tensor | None = None  # a pinned layer: random numbers are slow on the host
        for i in memory.in_memory:
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
    """Fills in codes of all values, small scales, norms of one: sums stay finite, and speed depends on nothing else."""
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
    shape: ModelShape,
    *,
    dependent: bool = True,
    graphs: bool = True,
    streams: bool = False,
    **options,
) -> Iterator[Engine]:
    """A model of this shape; ``options`` are those of ``EngineOptions``. Raises ``MemoryBudgetError``."""
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
    """The batch of one decode step: sequences with ``depth`` tokens in the cache, each on its own pages."""
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
    seconds: float  # from one step's end to the next, with the device never idle
    host_seconds: float  # host time until a step is launched


def time_steps(engine: Engine, batch: ForwardBatch, repeats: int = REPEATS) -> StepTime:
    """Median over rounds of consecutive steps, after a first, eager step and a second, captured one."""
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
    for _ in range(repeats):  # each starts on an idle device, or the host would wait for room in the queue
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
    """Bytes that a step reads: the weights once, and each sequence's cache."""
    weights = model_bytes_a_token(engine.model, 0)
    return weights + num_sequences * (model_bytes_a_token(engine.model, depth + 1) - weights)


def decode_row(machine: Machine, name: str, kind: str, depth: int, num_sequences: int) -> str:
    """One row of the decoding table; it says so if there is no room for the case."""
    label, backend = f"| {name} | {kind} | {depth} | {num_sequences}", machine.backend
    options = {"kv_cache": kind, "max_sequences": num_sequences, "context": depth + PAGE_SIZE}
    options |= {"cache_tokens": num_sequences * (depth + PAGE_SIZE), "prefill_chunk": 64, "prefill_window": 64}
    try:
        with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), **options) as engine:
            found = time_steps(engine, step_batch(depth, num_sequences, engine.config.vocab_size))
            read, how = step_bytes_read(engine, depth, num_sequences), engine.decode_steps
    except MemoryBudgetError:
        return f"{label} | does not fit | | | |"
    speed, of_roof = num_sequences / found.seconds, share(read, found.seconds, machine.read_roof())
    return f"{label} | {speed:.1f} | {found.seconds * 1e3:.2f} | {of_roof} | {how} |"


def host_line(machine: Machine, name: str, graphs: bool) -> str:
    """Host time of a decode step, and the gain by dependent launches."""
    backend, batch, times = machine.backend, step_batch(0, 1, SHAPES[name].vocab_size), {}
    for dependent in (False, True):
        options = {"context": PAGE_SIZE, "dependent": dependent, "graphs": graphs}
        with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), **options) as engine:
            before = backend.num_launches
            forward(engine, [batch])
            launches = backend.num_launches - before
            times[dependent], how = time_steps(engine, batch), engine.decode_steps
    plain, found = times[False], times[True]
    return (
        f"- {name}, {launches} launches a step, {how}: {found.seconds * 1e3:.3f} ms a step, "
        f"{found.host_seconds * 1e6:.0f} us of them on the host; without dependent launches "
        f"{plain.seconds * 1e3:.3f} ms ({plain.seconds / found.seconds:.2f} times)"
    )


def prefill_line(machine: Machine, name: str) -> str:
    """A prompt's time against its linears in f16 by cuBLAS, and the reserved memory against the plan."""
    backend = machine.backend
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
    del engine
    speed = f"- {name}, a prompt of {PROMPT} tokens: {PROMPT / found:.0f} tokens/s"
    if machine.device.type != "cuda":
        return f"{speed}; {memory}"
    cublas = PROMPT / chunk * linears_us(SHAPES[name], chunk, machine.device, machine.timer()) / 1e6
    return f"{speed}, {cublas / found:.0%} of the speed of f16 cuBLAS for the linears alone; {memory}"


def linears_us(shape: ModelShape, num_tokens: int, device: torch.device, timer: Timer) -> float:
    """Time of all layers' linears in f16 by cuBLAS, for one chunk."""
    total = 0.0
    for K, N in linear_shapes(shape):
        matrix = torch.randn(N, K, device=device, dtype=torch.float16)
        x = torch.randn(num_tokens, K, device=device, dtype=torch.float16)
        total += timer.median_us(lambda m=matrix, x=x: torch.nn.functional.linear(x, m))
    return shape.num_layers * total


def peer_line(machine: Machine, name: str) -> str:
    """Time of the peer's 4-bit kernel for a step's linears alone: a lower bound for any model that uses it."""
    backend = machine.backend
    with synthetic_engine(backend, SHAPES[name], vram=free_vram(backend), context=PAGE_SIZE) as engine:
        seconds = time_steps(engine, step_batch(0, 1, engine.config.vocab_size)).seconds
    found = [int4pack_us(K, N, 1, machine.device, machine.timer()) for K, N in linear_shapes(SHAPES[name])]
    if None in found:
        return f"- {name}: torch has no 4-bit kernel here"
    linears = SHAPES[name].num_layers * sum(found) / 1e6
    return (
        f"- {name}: torch's `_weight_int4pack_mm` for all linears of a step, one by one: {linears * 1e3:.2f} ms; "
        f"exl's whole step {seconds * 1e3:.2f} ms ({linears / seconds:.2f} times)"
    )


def linear_shapes(shape: ModelShape) -> list[tuple[int, int]]:
    """Of a layer's launches: inputs, outputs."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return [(hidden, width + 2 * kv_width), (width, hidden), (hidden, 2 * inter), (inter, hidden)]


def stream_line(machine: Machine, name: str) -> str:
    """A model with VRAM for half of its weights: the rate of bytes over the bus in a step, against a plain copy."""
    shape, backend = SHAPES[name], machine.backend
    resident = shape.num_layers // 2
    reset_peak(backend)
    options = {"vram": free_vram(backend), "context": PAGE_SIZE, "resident_layers": resident}
    with synthetic_engine(backend, shape, streams=True, **options) as engine:
        layers = [layout.num_bytes for layout in engine.model.layers]
        pinned_bytes = sum(layers[i] for i in engine.plan.placement.on_tier(Tier.PINNED))
        found = time_steps(engine, step_batch(0, 1, engine.config.vocab_size), 4)
        memory, how = peak_text(engine), engine.decode_steps
    return (
        f"- {name}, {resident} of {len(layers)} layers in VRAM, {how}: {1 / found.seconds:.2f} tokens/s, "
        f"{pinned_bytes / found.seconds / 1e9:.2f} GB/s over the bus, "
        f"{share(pinned_bytes, found.seconds, machine.pinned_roof())} of a plain copy's; {memory}"
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


def free_vram(backend: Backend) -> int | str:
    """VRAM that a plan may use now."""
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
    """The peak that torch's allocator reserved, against the plan's lines that it serves."""
    lines = [line for line in engine.plan.lines if line.device == "cuda:0" and not line.purpose.startswith("CUDA")]
    planned = sum(line.num_bytes for line in lines)
    if engine.device.type != "cuda":
        return f"{planned} bytes planned"
    found = torch.cuda.max_memory_reserved(engine.device)
    return f"{found / 1e9:.3f} GB reserved of {planned / 1e9:.3f} GB planned ({found / planned:.1%})"


# ---- the report -----------------------------------------------------------------------------------------------------


def decode_section(
    machine: Machine,
    names: Sequence[str],
    kinds: Sequence[str] = KINDS,
    depths: Sequence[int] = DEPTHS,
    batches: Sequence[int] = BATCHES,
    seconds: float = SECONDS["decode"],
    title: str = "Decoding",
) -> Section:
    """One line per model, cache type, depth and batch."""
    return Section(
        title,
        (
            "Share: bytes of weights and cache that a step reads, by its time, against the roof.",
            "",
            "| model | cache | depth | batch | tokens/s | ms a step | share of the roof | how |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ),
        seconds,
        tuple(
            Measurement(
                f"{name} {kind}, depth {depth}, batch {batch}", partial(decode_row, machine, name, kind, depth, batch)
            )
            for name in names
            for kind in kinds
            for depth in depths
            for batch in batches
        ),
    )


def host_section(machine: Machine, names: Sequence[str], seconds: float = SECONDS["host"]) -> Section:
    return Section(
        "A decode step on the host",
        (),
        seconds,
        tuple(
            Measurement(f"{name}, {'graph' if graphs else 'eager'}", partial(host_line, machine, name, graphs))
            for name in names
            for graphs in (True, False)
        ),
    )


def prompt_section(machine: Machine, names: Sequence[str], seconds: float = SECONDS["prompt"]) -> Section:
    measurements = (Measurement(name, partial(prefill_line, machine, name)) for name in names)
    return Section("Prompts, and memory", (), seconds, tuple(measurements))


def peer_section(machine: Machine, names: Sequence[str], seconds: float = SECONDS["peer"]) -> Section:
    measurements = (Measurement(name, partial(peer_line, machine, name)) for name in names)
    return Section("Against a peer's kernel", (), seconds, tuple(measurements))


def stream_section(machine: Machine, name: str, seconds: float = SECONDS["stream"]) -> Section:
    return Section(
        "Streamed from pinned memory",
        (),
        seconds,
        (
            Measurement("plain copy", lambda: f"- copying from pinned memory: {rate(machine.pinned_roof())}"),
            Measurement(name, partial(stream_line, machine, name)),
        ),
    )


def models_report(machine: Machine, arguments: argparse.Namespace) -> tuple[str, Iterator[str]]:
    names = arguments.models
    sections = (
        decode_section(machine, names, arguments.kv_caches),
        host_section(machine, names),
        prompt_section(machine, names),
        peer_section(machine, names),
        stream_section(machine, names[-1]),
    )
    title = (
        f"# {machine.name}: whole models",
        "",
        report.describe(machine),
        "4 bits, groups of 128, symmetric, f16 head.",
        "",
        f"- reading {machine.read_bytes / 2**30:.3g} GiB: {rate(machine.read_roof())} (the roof below)",
    )
    return "-end-to-end", report.report_lines(title, sections)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS, help="shapes to measure")
    parser.add_argument("--kv-caches", nargs="+", choices=KINDS, default=list(KINDS), help="types of the cache")


def main() -> int:
    return report.main("end_to_end.py", __doc__, add_options, models_report)


if __name__ == "__main__":
    sys.exit(main())
