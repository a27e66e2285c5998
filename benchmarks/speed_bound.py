"""The bound of a plan's speed against measured tokens a second, for a model on the CPU whose layers partly stream.

python -m benchmarks.speed_bound [--shape tinyllama-1.1b] [--layers 44] [--rounds 5] [--write NAME]

A model of random 4-bit weights is loaded under three budgets of RAM: for all layers, for half of them, for none. Each
round measures in turn the two roofs (a read-only pass over memory; a plain read of the streamed bytes past the page
cache, into as much memory as the stream has) and the time of a token. The bound is what
``exl plan --ram-speed ROOF --disk ROOF`` says with these roofs.

A measured speed above its bound would be a fault of the bound, or a roof that other programs held down.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from benchmarks.disk import cold_read_seconds, layer_ranges, machine
from benchmarks.streaming import decode
from benchmarks.synthetic import run_on_synthetic
from exl.bench import read_bandwidth
from exl.engine.build import Engine, EngineOptions, load_engine
from exl.ops.cpu_target import cpu_target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.speed import Speeds
from exl.planning.traffic import token_bytes
from exl.weights.packed_store import list_packed

CONTEXT = 128


def budgets(folder: Path) -> list[int]:
    """The RAM that plans with no, half and all layers resident take."""
    with open_model(folder) as files:
        num_layers, target = files.config.num_layers, cpu_target()
        tried = [
            EngineOptions(context=CONTEXT, resident_layers=resident) for resident in (0, num_layers // 2, num_layers)
        ]
        return [plan_model(files, options, target)[0].num_bytes for options in tried]


def streamed_ranges(packed_folder: Path, engine: Engine) -> tuple[Path, list[tuple[int, int]]]:
    """The packed file, and where in it the streamed layers are."""
    (info,) = list_packed(packed_folder)
    resident = set(engine.plan.placement.resident)
    return info.path, [layer for i, layer in enumerate(layer_ranges(info.path)) if i not in resident]


def measure_one(folder: Path, packed_folder: Path, ram: int, rounds: int) -> list[str]:
    engine = load_engine(folder, EngineOptions(context=CONTEXT, ram=ram, packed_folder=packed_folder, device="cpu"))
    try:
        num_streamed = engine.plan.placement.num_streamed
        path, ranges = streamed_ranges(packed_folder, engine) if num_streamed else (None, [])
        decode(engine)  # the first reads also verify checksums
        found: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            memory = read_bandwidth("cpu")
            if num_streamed:
                engine.weights.source.wait_until_idle()
            disk = 0.0
            if path is not None:
                buffer_bytes = engine.weights.slabs["stream buffers"]
                disk = sum(size for _, size in ranges) / cold_read_seconds(path, ranges, buffer_bytes)
            found.append((memory, disk, 1 / decode(engine)))
        token = token_bytes(engine.model, engine.plan, 0)

        def least_seconds(memory: float, disk: float) -> float:
            return token.seconds(Speeds(ram=int(memory), disk=int(disk) or None))

        by_round = [speed * least_seconds(memory, disk) for memory, disk, speed in found]
        memory, disk, speed = (statistics.median(values) for values in zip(*found, strict=True))
        bound = 1 / least_seconds(memory, disk)
        roofs = f"RAM {memory / 1e9:.2f} GB/s" + (f", disk {disk / 1e9:.2f} GB/s" if num_streamed else "")
        return [
            f"ram={ram}: {engine.plan.verdict}",
            f"  a token reads {token.describe()}; roofs: {roofs}",
            f"  bound {bound:.2f} tokens/s, measured {speed:.2f}: {speed / bound:.3f} of the medians; by round "
            + " ".join(f"{share:.3f}" for share in by_round),
        ]
    finally:
        engine.close()


def measure(folder: Path, packed_folder: Path, rounds: int) -> list[str]:
    lines = [time.strftime("%Y-%m-%d"), machine()]
    for ram in budgets(folder):
        lines += measure_one(folder, packed_folder, ram, rounds)
    return lines


if __name__ == "__main__":
    run_on_synthetic("benchmarks.speed_bound", __doc__, 5, measure)
