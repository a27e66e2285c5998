"""Streamed layers against their two lower bounds: the disk's time for the same bytes, and the arithmetic's time.

python -m benchmarks.streaming [--shape tinyllama-1.1b] [--layers 44] [--rounds 5] [--write NAME]

A model of random 4-bit weights (more than 1 GB by default) is loaded twice, all resident and all streamed. Each round
measures in turn: a plain read of the streamed bytes, a pass with resident layers, a pass with streamed layers. The
plain read and the stream both bypass the page cache (O_DIRECT), and fill as much memory again and again. If O_DIRECT is
not available, both use the page cache after the file was dropped from it, which mincore must confirm.

Goal: max(read, compute) / streamed pass >= 0.9.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.disk import (
    cached_share,
    disk_bytes_read,
    drop_cached,
    has_direct,
    layer_ranges,
    machine,
    plain_read_seconds,
)
from benchmarks.synthetic import run_on_synthetic
from exl.engine.build import Engine, EngineOptions, load_engine
from exl.weights.packed_store import list_packed

ROOT = Path(__file__).parents[1]
NUM_PROMPT = 512
CONTEXT = 1024


def prefill(engine: Engine) -> float:
    """Seconds of one layer-major pass over 512 tokens: one window."""
    ids = [3 + i * 37 % (engine.config.vocab_size - 3) for i in range(NUM_PROMPT)]
    sequence = engine.generator.begin(NUM_PROMPT)
    began = time.perf_counter()
    engine.generator.extend(sequence, ids)
    seconds = time.perf_counter() - began
    engine.generator.end(sequence)
    return seconds


def decode(engine: Engine, num_tokens: int = 4) -> float:
    """Seconds per one-token pass, over several consecutive passes, because reading continues from pass to pass."""
    sequence = engine.generator.begin(num_tokens + 1)
    engine.generator.extend(sequence, [5])
    began = time.perf_counter()
    for _ in range(num_tokens):
        engine.generator.extend(sequence, [7])
    seconds = (time.perf_counter() - began) / num_tokens
    engine.generator.end(sequence)
    return seconds


class Comparison:
    def __init__(self, resident: Engine, streamed: Engine, packed: Path) -> None:
        self.resident, self.streamed, self.packed = resident, streamed, packed
        self.ranges = layer_ranges(packed)
        self.num_bytes = sum(size for _, size in self.ranges)
        self.direct = has_direct(packed)

    def cold(self) -> None:
        self.streamed.weights.source.wait_until_idle()
        if not self.direct:
            drop_cached(self.packed)

    def run(self, name: str, run_pass: Callable[[Engine], float], rounds: int) -> list[str]:
        run_pass(self.resident)
        run_pass(self.streamed)  # the first reads also verify checksums
        reads, computes, passes = [], [], []
        for _ in range(rounds):
            self.cold()
            buffer_bytes = self.streamed.weights.slabs["stream buffers"]
            reads.append(plain_read_seconds(self.packed, self.ranges, direct=self.direct, buffer_bytes=buffer_bytes))
            computes.append(run_pass(self.resident))
            self.cold()
            passes.append(run_pass(self.streamed))
        read, compute, streamed = map(statistics.median, (reads, computes, passes))
        ratios = [max(r, c) / s for r, c, s in zip(reads, computes, passes, strict=True)]
        return [
            f"{name}: plain read {read:.3f} s ({self.num_bytes / read / 1e9:.2f} GB/s), resident pass {compute:.3f} s, "
            f"streamed pass {streamed:.3f} s",
            f"  max(read, compute) / streamed: {max(read, compute) / streamed:.3f} of the medians; by round "
            + " ".join(f"{ratio:.3f}" for ratio in ratios),
        ]

    def count_reads(self) -> list[str]:
        source = self.streamed.weights.source
        self.cold()
        before, told = disk_bytes_read(), source.stats.bytes_read
        prefill(self.streamed)
        source.wait_until_idle()
        found = disk_bytes_read() - before
        return [
            f"a prefill of {NUM_PROMPT} tokens: {found} bytes from the disk by /proc/self/io, "
            f"{found / self.num_bytes:.4f} of the streamed layers' {self.num_bytes}; "
            f"the stream counted {source.stats.bytes_read - told}",
        ]


def measure(folder: Path, packed_folder: Path, rounds: int) -> list[str]:
    options = {"context": CONTEXT, "packed_folder": packed_folder}
    streamed = load_engine(folder, EngineOptions(resident_layers=0, **options))
    resident = load_engine(folder, EngineOptions(**options))
    try:
        (info,) = list_packed(packed_folder)
        both = Comparison(resident, streamed, info.path)
        lines = [
            machine(),
            f"{len(both.ranges)} layers, {both.num_bytes / 1e9:.3f} GB, "
            + ("O_DIRECT on both sides" if both.direct else "page cache emptied before both sides, by mincore"),
        ]
        lines += both.run("decode, 1 token", decode, rounds)
        lines += both.run(f"prefill, {NUM_PROMPT} tokens", prefill, rounds)
        lines += both.count_reads()
        lines.append(f"share of the packed file in the page cache afterwards: {cached_share(info.path):.4f}")
        return lines
    finally:
        streamed.close()
        resident.close()


if __name__ == "__main__":
    run_on_synthetic("benchmarks.streaming", __doc__, 5, measure)
