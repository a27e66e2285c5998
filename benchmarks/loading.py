"""Loading against a plain read of the same files, and its peak memory beyond what stays allocated.

python -m benchmarks.loading [--shape tinyllama-1.1b] [--layers 44] [--rounds 3] [--write NAME]

Each round measures these in turn, each time with the files dropped from the page cache (mincore must confirm it):

    read    the checkpoint's files, plainly                load    all layers resident, packed on the way
    write   packing into the packed file, all streamed
    packed  the packed file, plainly                       reload  all layers resident, from the packed file

Goals: load at 0.9 of the speed of a plain read; above what stays allocated, peak memory of at most two layers in the
file's format and the block of codes being unpacked.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.disk import drop_cached, has_direct, machine, plain_read_seconds, reset_peak, status_bytes
from benchmarks.synthetic import run_on_synthetic
from exl.engine.build import EngineOptions, load_engine
from exl.memory.host import trim_heap
from exl.ops.torch_ops import cpu_target
from exl.planning.from_headers import open_model
from exl.weights.packed_store import list_packed

ROOT = Path(__file__).parents[1]
CONTEXT = 64  # tokens: a small cache, so that almost all memory is weights
UNPACKED_COLUMNS = 1024


class Loading:
    def __init__(self, folder: Path, packed_folder: Path) -> None:
        self.folder, self.packed_folder = folder, packed_folder
        with open_model(folder) as files:
            self.num_bytes = sum(files.checkpoint.files.values())
            self.paths = [files.folder / name for name in files.checkpoint.files]
            self.layer_file_bytes = files.layer_file_bytes
            self.packed_bytes = files.manifest.layouts(cpu_target()).num_bytes
            self.block_bytes = UNPACKED_COLUMNS * max(files.config.hidden_size, files.config.intermediate_size)
        self.peaks: dict[str, list[int]] = {}

    def plain_read(self) -> float:
        for path in self.paths:
            drop_cached(path)
        return sum(plain_read_seconds(path, [(0, path.stat().st_size)], direct=False) for path in self.paths)

    def plain_read_packed(self) -> float:
        (info,) = list_packed(self.packed_folder)
        drop_cached(info.path)
        return plain_read_seconds(info.path, [(0, info.num_bytes)], direct=has_direct(info.path))

    def _load(self, name: str, **options) -> float:
        gc.collect()
        trim_heap()
        for path in [*self.paths, *(info.path for info in list_packed(self.packed_folder))]:
            drop_cached(path)
        before = status_bytes("VmRSS")
        reset_peak()
        began = time.perf_counter()
        engine = load_engine(self.folder, EngineOptions(context=CONTEXT, **options))
        seconds = time.perf_counter() - began
        stays = sum(engine.weights.slabs.values()) + engine.generator.runner.kv.slab.numel()
        self.peaks.setdefault(name, []).append(status_bytes("VmHWM") - before - stays)
        engine.close()
        return seconds

    def load(self) -> float:
        return self._load("load")

    def write(self) -> float:
        shutil.rmtree(self.packed_folder, ignore_errors=True)
        return self._load("write", resident_layers=0, packed_folder=self.packed_folder)

    def reload(self) -> float:
        return self._load("reload", packed_folder=self.packed_folder)


def measure(folder: Path, packed_folder: Path, rounds: int) -> list[str]:
    loading = Loading(folder, packed_folder)
    steps: dict[str, tuple[Callable[[], float], int]] = {
        "read": (loading.plain_read, loading.num_bytes),
        "load": (loading.load, loading.num_bytes),
        "write": (loading.write, loading.num_bytes),
        "packed": (loading.plain_read_packed, loading.packed_bytes),
        "reload": (loading.reload, loading.packed_bytes),
    }
    loading.load()  # once first, for torch's one-time allocations
    loading.peaks.clear()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (run, _) in steps.items():
            seconds[name].append(run())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [machine(), f"{loading.num_bytes / 1e9:.3f} GB in the checkpoint, {loading.packed_bytes / 1e9:.3f} packed"]
    for name, (_, num_bytes) in steps.items():
        lines.append(f"{name:<7} {median[name]:8.3f} s  {num_bytes / median[name] / 1e9:6.2f} GB/s")
    lines.append(f"load / read: {median['read'] / median['load']:.3f} of its speed")
    lines.append(f"reload / packed: {median['packed'] / median['reload']:.3f} of its speed")
    layers, block = loading.layer_file_bytes / 1e6, loading.block_bytes / 1e6
    for name, peaks in loading.peaks.items():
        lines.append(
            f"{name}: peak above what stays {max(peaks) / 1e6:.1f} MB; two layers of the file are {2 * layers:.1f} MB, "
            f"a block of codes {block:.1f} MB"
        )
    return lines


if __name__ == "__main__":
    run_on_synthetic("benchmarks.loading", __doc__, 3, measure)
