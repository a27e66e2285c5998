"""Loading against a plain read of the same files, and its peak memory beyond what stays allocated.

python -m benchmarks.loading [--shape tinyllama-1.1b] [--layers 44] [--rounds 5] [--write NAME]

Each round measures these in turn, each time with the files dropped from the page cache (mincore must confirm it):

    read    the checkpoint's files, plainly                load    all layers resident, packed on the way
    write   packing into the packed file, all streamed
    packed  the packed file, plainly                       reload  all layers resident, from the packed file

and ``read cached`` and ``load cached``, the same with the checkpoint in the page cache. A plain read goes into new
memory as large as the file, with as many threads as compute, by 8 MiB; past the page cache where that is possible,
which is faster than through it. ``load`` is the time of ``load_weights``: a plain read opens no model.

Goals: load and reload at 0.9 of the speed of a plain read; above what stays allocated, peak memory of at most two
layers in the file's format and the block of codes being unpacked.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.disk import (
    drop_cached,
    has_direct,
    machine,
    read_into_memory_seconds,
    reset_peak,
    status_bytes,
    touch_memory,
)
from benchmarks.synthetic import run_on_synthetic
from exl.engine.build import EngineOptions, build_engine
from exl.memory.host import trim_heap
from exl.ops.base import Ops
from exl.ops.cpu_target import cpu_target
from exl.planning.from_headers import open_model
from exl.planning.plan import MemoryPlan
from exl.threads import thread_limit
from exl.weights.loader import ModelWeights, WeightPlaces, load_weights
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
        return self._plain_read(self.paths, cached=False)

    def plain_read_cached(self) -> float:
        return self._plain_read(self.paths, cached=True)

    def plain_read_packed(self) -> float:
        return self._plain_read([info.path for info in list_packed(self.packed_folder)], cached=False)

    def _plain_read(self, paths: list[Path], *, cached: bool) -> float:
        self._prepare(cached)
        return sum(
            read_into_memory_seconds(path, thread_limit(), direct=not cached and has_direct(path)) for path in paths
        )

    def _prepare(self, cached: bool) -> None:
        gc.collect()
        trim_heap()
        for path in [*self.paths, *(info.path for info in list_packed(self.packed_folder))]:
            drop_cached(path)
        if cached:
            for path in self.paths:
                read_through_cache(path)
        touch_memory(2 * max(self.num_bytes, self.packed_bytes))

    def _load(self, name: str, *, cached: bool = False, resident: bool = True, packed: bool = False) -> float:
        self._prepare(cached)
        before = status_bytes("VmRSS")
        reset_peak()
        options = EngineOptions(context=CONTEXT, device="cpu")
        seconds: list[float] = []
        with open_model(self.folder) as files:

            def load(ops: Ops, plan: MemoryPlan) -> ModelWeights:
                places = WeightPlaces(None if resident else (), packed_folder=self.packed_folder if packed else None)
                began = time.perf_counter()
                weights = load_weights(files, ops, places)
                seconds.append(time.perf_counter() - began)
                return weights

            engine = build_engine(files, options, None, load)
        stays = sum(engine.weights.slabs.values()) + engine.generator.runner.kv.slab.numel()
        self.peaks.setdefault(name, []).append(status_bytes("VmHWM") - before - stays)
        engine.close()
        return seconds[0]

    def load(self) -> float:
        return self._load("load")

    def load_cached(self) -> float:
        return self._load("load cached", cached=True)

    def write(self) -> float:
        shutil.rmtree(self.packed_folder, ignore_errors=True)
        return self._load("write", resident=False, packed=True)

    def reload(self) -> float:
        return self._load("reload", packed=True)


def read_through_cache(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def measure(folder: Path, packed_folder: Path, rounds: int) -> list[str]:
    loading = Loading(folder, packed_folder)
    steps: dict[str, tuple[Callable[[], float], int]] = {
        "read": (loading.plain_read, loading.num_bytes),
        "load": (loading.load, loading.num_bytes),
        "write": (loading.write, loading.num_bytes),
        "packed": (loading.plain_read_packed, loading.packed_bytes),
        "reload": (loading.reload, loading.packed_bytes),
        "read cached": (loading.plain_read_cached, loading.num_bytes),
        "load cached": (loading.load_cached, loading.num_bytes),
    }
    loading.load()  # once first, for torch's one-time allocations
    loading.peaks.clear()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (run, _) in steps.items():
            seconds[name].append(run())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"{machine()}; {thread_limit()} threads read plainly",
        f"{loading.num_bytes / 1e9:.3f} GB in the checkpoint, {loading.packed_bytes / 1e9:.3f} packed",
    ]
    for name, (_, num_bytes) in steps.items():
        lines.append(f"{name:<11} {median[name]:8.3f} s  {num_bytes / median[name] / 1e9:6.2f} GB/s")
    for one, other in (("load", "read"), ("reload", "packed"), ("load cached", "read cached")):
        lines.append(f"{one} / {other}: {median[other] / median[one]:.3f} of its speed")
    layers, block = loading.layer_file_bytes / 1e6, loading.block_bytes / 1e6
    for name, peaks in loading.peaks.items():
        lines.append(
            f"{name}: peak above what stays {max(peaks) / 1e6:.1f} MB; two layers of the file are {2 * layers:.1f} MB, "
            f"a block of codes {block:.1f} MB"
        )
    return lines


if __name__ == "__main__":
    run_on_synthetic("benchmarks.loading", __doc__, 5, measure)
