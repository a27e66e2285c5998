"""Speeds of linear and attention kernels on this machine's GPU, beside the roofs and peers measured in the same run.

``python benchmarks/kernels.py`` is made to take under eight minutes, prints a report and writes it to
``benchmarks/results/<gpu>.md``. Needs this repository, torch and CuPy. Each figure is the median of events around
single launches, with the L2 cache flushed before each; weights and pages are random.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, installed or not

from benchmarks.attention import attention_rows
from benchmarks.timing import REPEATS, Timer
from exl.errors import KernelError
from exl.kernels.args import ptr, u64
from exl.kernels.launch import Backend, CudaBackend, launch
from exl.kernels.linear import Scratch, TiledWeight, make_scratch, project
from exl.kernels.spec import KernelSpec
from exl.kernels.tile_layout import TileLayout

TOKENS = (1, 2, 4, 8, 16, 32, 64)
GROUP_SIZE = 128
READ_BYTES = 2 * 2**30
GRAPH_NODES = 512
# Linears of a layer as a decode step launches them: name, K, N.
MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "1B": (("qkv", 2048, 2560), ("o", 2048, 2048), ("gate_up", 2048, 11264), ("down", 5632, 2048)),
    "7B": (("qkv", 4096, 12288), ("o", 4096, 4096), ("gate_up", 4096, 22016), ("down", 11008, 4096)),
    "13B": (("qkv", 5120, 15360), ("o", 5120, 5120), ("gate_up", 5120, 27648), ("down", 13824, 5120)),
    "70B": (("qkv", 8192, 10240), ("o", 8192, 8192), ("gate_up", 8192, 57344), ("down", 28672, 8192)),
}


@dataclass(frozen=True)
class Roofs:
    """Bytes a second, and microseconds from one node of a graph to the next."""

    read: float
    copy: float
    gap_us: float
    dependent_gap_us: float | None  # sm_90 and up


def measure_roofs(backend: Backend, timer: Timer) -> Roofs:
    own = CudaBackend(backend.device, sources=HERE / "cuda")
    src = torch.empty(READ_BYTES, dtype=torch.uint8, device=backend.device).random_()
    word = torch.zeros(1, dtype=torch.int32, device=backend.device)
    read_all = own.load(KernelSpec("bandwidth.cu", "read_all", {}, own.arch))
    args = [ptr(src), ptr(word), u64(READ_BYTES // 16)]
    read_us = timer.median_us(lambda: launch(read_all, (4 * own.num_multiprocessors,), (512,), args))
    dst = torch.empty_like(src)
    copy_us = timer.median_us(lambda: dst.copy_(src))
    gap = graph_gap_us(own, word, dependent=False)
    dependent = graph_gap_us(own, word, dependent=True) if own.arch >= 90 else None
    return Roofs(READ_BYTES / read_us * 1e6, 2 * READ_BYTES / copy_us * 1e6, gap, dependent)


def graph_gap_us(backend: Backend, counter: torch.Tensor, dependent: bool) -> float:
    """Time of a long chain of the smallest kernel in one graph, a node."""
    touch = backend.load(KernelSpec("bandwidth.cu", "touch", {}, backend.arch))
    graph = torch.cuda.CUDAGraph()
    launch(touch, (1,), (32,), [ptr(counter)])  # its module is there before anything is captured
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_NODES):
            launch(touch, (1,), (32,), [ptr(counter)], dependent=dependent)
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / GRAPH_NODES)
    return statistics.median(times)


def random_weight(layout: TileLayout, device: torch.device) -> TiledWeight:
    codes = torch.randint(-(2**31), 2**31, layout.codes_shape, dtype=torch.int32, device=device)
    qparams = torch.randint(0, 256, layout.qparams_shape, dtype=torch.uint8, device=device)
    qparams[..., : 32 * layout.block_units].view(torch.float16).fill_(0.01)  # scales come first
    return TiledWeight(layout, codes, qparams, None)


def weight_bytes(weight: TiledWeight) -> int:
    return sum(t.numel() * t.element_size() for t in (weight.codes, weight.qparams))


def exl_us(backend: Backend, weight: TiledWeight, num_tokens: int, N: int, scratch: Scratch, timer: Timer) -> float:
    x = torch.randn(num_tokens, weight.layout.K, device=backend.device).half()
    y = torch.empty(num_tokens, N, dtype=torch.float16, device=backend.device)
    return timer.median_us(lambda: project(backend, weight, x, y, scratch=scratch))


def int4pack_us(K: int, N: int, num_tokens: int, device: torch.device, timer: Timer) -> float | None:
    """torch's own 4-bit kernel on the same shape; None where this build or GPU has none for it."""
    try:
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.ones(K // GROUP_SIZE, N, 2, dtype=torch.bfloat16, device=device)
        x = torch.randn(num_tokens, K, device=device).bfloat16()
        return timer.median_us(lambda: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales))
    except (RuntimeError, AttributeError):
        return None


def cublas_us(matrix: torch.Tensor, num_tokens: int, timer: Timer) -> float:
    x = torch.randn(num_tokens, matrix.shape[1], device=matrix.device).half()
    return timer.median_us(lambda: torch.nn.functional.linear(x, matrix))


def linear_rows(backend: Backend, timer: Timer, roofs: Roofs, models: list[str], bits: int) -> Iterator[str]:
    """One line of the table for each shape and token count."""
    for model in models:
        for name, K, N in MODELS[model]:
            layout = TileLayout(bits, K, N, GROUP_SIZE, False)
            weight = random_weight(layout, backend.device)
            scratch = make_scratch([layout], backend)
            dense = torch.randn(N, K, device=backend.device, dtype=torch.float16)
            for num_tokens in TOKENS:
                us = exl_us(backend, weight, num_tokens, N, scratch, timer)
                share = weight_bytes(weight) / us * 1e6 / roofs.read
                peer = int4pack_us(K, N, num_tokens, backend.device, timer) if bits == 4 else None
                peer_text = "-" if peer is None else f"{peer / us:.2f}"
                cublas = cublas_us(dense, num_tokens, timer) / us
                speeds = f"{us:.1f} | {share:.0%} | {peer_text} | {cublas:.2f}"
                yield f"| {model} {name} | {K} x {N} | {num_tokens} | {speeds} |"


PARTS = ("linear", "attention")


def report(backend: Backend, models: list[str], bits: int, parts: list[str]) -> Iterator[str]:
    """The file's lines, as they are measured."""
    torch.manual_seed(0)
    timer = Timer(backend.device)
    properties = torch.cuda.get_device_properties(backend.device)
    yield f"# {properties.name}: kernels"
    yield ""
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability {backend.arch / 10}, "
    yield f"{backend.num_multiprocessors} multiprocessors. Medians of {REPEATS} launches, L2 flushed before each."
    yield ""
    roofs = measure_roofs(backend, timer)
    yield f"- reading 2 GiB: {roofs.read / 1e9:.0f} GB/s (the roof below)"
    yield f"- copying 2 GiB, read and written: {roofs.copy / 1e9:.0f} GB/s"
    yield f"- from one graph node to the next: {roofs.gap_us:.2f} us"
    if roofs.dependent_gap_us is not None:
        yield f"- the same with programmatic dependent launch: {roofs.dependent_gap_us:.2f} us"
    if "linear" in parts:
        yield from linear_report(backend, timer, roofs, models, bits)
    if "attention" in parts:
        yield ""
        yield from attention_rows(backend, timer, roofs.read)


def linear_report(backend: Backend, timer: Timer, roofs: Roofs, models: list[str], bits: int) -> Iterator[str]:
    yield ""
    yield f"{bits} bits, groups of {GROUP_SIZE}, f16 activations. Share: bytes of weights, scales and zeros by the"
    yield "time, against the roof. Ratios above 1: exl is faster."
    yield ""
    yield "| linear | K x N | tokens | us | share of the roof | vs `_weight_int4pack_mm` | vs f16 cuBLAS |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from linear_rows(backend, timer, roofs, models, bits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="shapes to measure")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the report")
    arguments = parser.parse_args()
    try:
        backend = CudaBackend()
    except KernelError as error:
        print(f"benchmarks/kernels.py needs a GPU: {error}", file=sys.stderr)
        return 1
    lines = []
    for line in report(backend, arguments.models, arguments.bits, arguments.parts):
        print(line, flush=True)
        lines.append(line)
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(backend.device)).strip("-").lower()
    suffix = "" if arguments.bits == 4 else f"-{arguments.bits}bits"
    path = arguments.out / f"{name}{suffix}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
