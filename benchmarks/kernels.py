"""Speeds of linear and attention kernels on this machine's GPU, next to roofs and peers measured in the same run.

``python benchmarks/kernels.py`` takes under eight minutes, prints a report and writes it to
``benchmarks/results/<gpu>.md``. Needs this repository, torch and CuPy. Each figure is the median of events around
single launches, with the L2 cache flushed before each; weights and pages are random. Each line is written as soon as it
is known; a line that fails says so, and the others are still measured.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, installed or not

from benchmarks import report
from benchmarks.attention import attention_section
from benchmarks.guard import one_line
from benchmarks.machine import Machine, graph_gap_us, rate, share
from benchmarks.report import Measurement, Section
from benchmarks.timing import REPEATS, Timer
from exl.kernels.launch import Backend
from exl.kernels.linear import LinearScratch, make_scratch, multiply
from exl.kernels.linear_io import Output
from exl.kernels.weights import TiledWeight
from exl.layout.tiles import TileLayout

TOKENS = (1, 2, 4, 8, 16, 32, 64)
GROUP_SIZE = 128
SECONDS = {"linear": 240, "attention": 200}  # together under eight minutes
# A layer's linears, as a decode step launches them: name, K, N.
MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "1B": (("qkv", 2048, 2560), ("o", 2048, 2048), ("gate_up", 2048, 11264), ("down", 5632, 2048)),
    "7B": (("qkv", 4096, 12288), ("o", 4096, 4096), ("gate_up", 4096, 22016), ("down", 11008, 4096)),
    "13B": (("qkv", 5120, 15360), ("o", 5120, 5120), ("gate_up", 5120, 27648), ("down", 13824, 5120)),
    "70B": (("qkv", 8192, 10240), ("o", 8192, 8192), ("gate_up", 8192, 57344), ("down", 28672, 8192)),
}


def random_weight(layout: TileLayout, device: torch.device) -> TiledWeight:
    codes = torch.randint(-(2**31), 2**31, layout.codes_shape, dtype=torch.int32, device=device)
    qparams = torch.randint(0, 256, layout.qparams_shape, dtype=torch.uint8, device=device)
    qparams[..., : 32 * layout.block_units].view(torch.float16).fill_(0.01)  # scales come first
    return TiledWeight(layout, codes, qparams, None)


def weight_bytes(weight: TiledWeight) -> int:
    return sum(t.numel() * t.element_size() for t in (weight.codes, weight.qparams))


def exl_us(
    backend: Backend, weight: TiledWeight, num_tokens: int, N: int, scratch: LinearScratch, timer: Timer
) -> float:
    x = torch.randn(num_tokens, weight.layout.K, device=backend.device).half()
    y = torch.empty(num_tokens, N, dtype=torch.float16, device=backend.device)
    return timer.median_us(lambda: multiply(backend, weight, x, Output.store(y), scratch=scratch))


def int4pack_us(K: int, N: int, num_tokens: int, device: torch.device, timer: Timer) -> float | None:
    """Time of torch's own 4-bit kernel on the same shape; None if this build or GPU has none for it."""
    try:
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=device)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        scales = torch.ones(K // GROUP_SIZE, N, 2, dtype=torch.bfloat16, device=device)
        x = torch.randn(num_tokens, K, device=device).bfloat16()
        return timer.median_us(lambda: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales))
    except (RuntimeError, AttributeError) as error:
        print(f"torch's 4-bit kernel, {K} x {N}: {one_line(error)}", file=sys.stderr)
        return None


def cublas_us(matrix: torch.Tensor, num_tokens: int, timer: Timer) -> float:
    x = torch.randn(num_tokens, matrix.shape[1], device=matrix.device).half()
    return timer.median_us(lambda: torch.nn.functional.linear(x, matrix))


def linear_row(machine: Machine, model: str, linear: tuple[str, int, int], num_tokens: int, bits: int) -> str:
    """One line of the table; if a peer fails, only its cell is missing."""
    name, K, N = linear
    layout, timer = TileLayout(bits, K, N, GROUP_SIZE, False), machine.timer()
    weight = random_weight(layout, machine.device)
    us = exl_us(machine.backend, weight, num_tokens, N, make_scratch([layout], machine.backend), timer)
    peer = int4pack_us(K, N, num_tokens, machine.device, timer) if bits == 4 else None
    dense = torch.randn(N, K, device=machine.device, dtype=torch.float16)
    cublas = cublas_us(dense, num_tokens, timer) / us
    speeds = f"{us:.1f} | {share(weight_bytes(weight), us / 1e6, machine.read_roof())} | "
    speeds += f"{'-' if peer is None else f'{peer / us:.2f}'} | {cublas:.2f}"
    return f"| {model} {name} | {K} x {N} | {num_tokens} | {speeds} |"


def linear_section(
    machine: Machine,
    models: Sequence[str],
    bits: int,
    tokens: Sequence[int] = TOKENS,
    seconds: float = SECONDS["linear"],
) -> Section:
    """One line per token count and shape, one token first."""
    return Section(
        f"Linears of {bits} bits",
        (
            f"Groups of {GROUP_SIZE}, f16 activations. Share: bytes of weights, scales and zeros by the time, against",
            "the roof. Ratios above 1: exl is faster.",
            "",
            "| linear | K x N | tokens | us | share of the roof | vs `_weight_int4pack_mm` | vs f16 cuBLAS |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ),
        seconds,
        tuple(
            Measurement(
                f"{model} {linear[0]}, {num_tokens} tokens",
                partial(linear_row, machine, model, linear, num_tokens, bits),
            )
            for model in models
            for num_tokens in tokens
            for linear in MODELS[model]
        ),
    )


def roofs_section(machine: Machine, seconds: float = 60) -> Section:
    def gap(dependent: bool) -> str:
        if dependent and machine.own.arch < 90:
            return "- no programmatic dependent launch below compute capability 9.0"
        us = graph_gap_us(machine.own, dependent)
        how = ", with programmatic dependent launch" if dependent else ""
        return f"- from one graph node to the next{how}: {'no graphs here' if us is None else f'{us:.2f} us'}"

    size = f"{machine.read_bytes / 2**30:.3g} GiB"
    return Section(
        "Roofs",
        (),
        seconds,
        (
            Measurement("reading", lambda: f"- reading {size}: {rate(machine.read_roof())} (the roof below)"),
            Measurement("copying", lambda: f"- copying {size}, read and written: {rate(machine.copy_roof())}"),
            Measurement("gap", partial(gap, False)),
            Measurement("dependent gap", partial(gap, True)),
        ),
    )


PARTS = ("linear", "attention")


def kernels_report(machine: Machine, arguments: argparse.Namespace) -> tuple[str, Iterator[str]]:
    sections = [roofs_section(machine)]
    if "linear" in arguments.parts:
        sections.append(linear_section(machine, arguments.models, arguments.bits))
    if "attention" in arguments.parts:
        sections.append(attention_section(machine, seconds=SECONDS["attention"]))
    title = (
        f"# {machine.name}: kernels",
        "",
        report.describe(machine),
        f"Medians of {REPEATS} launches, L2 flushed before each.",
    )
    return "" if arguments.bits == 4 else f"-{arguments.bits}bits", report.report_lines(title, sections)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="shapes to measure")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")


def main() -> int:
    return report.main("kernels.py", __doc__, add_options, kernels_report)


if __name__ == "__main__":
    sys.exit(main())
