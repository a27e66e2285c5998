"""Speed of prompts and of generation, against what the memory allows, and memory against the plan.

Names are llama-bench's: pp512 is a prompt of 512 tokens, tg128 the generation of 128, both after ``depth`` tokens that
are in the cache already. Nothing but the model runs: token ids in, greedy token ids out.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exl.batch import PAGE_SIZE
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import Engine, choose_device, load_engine
from exl.errors import ConfigError
from exl.load_test import LoadFigures, LoadTest, measured_adapter, prompt_ids, run_load
from exl.memory.host import proc_bytes, trim_heap
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan
from exl.planning.traffic import model_bytes_a_token
from exl.progress import Progress
from exl.request_options import SPECULATE
from exl.sampling_params import SamplingParams
from exl.threads import thread_limit
from exl.units import format_bytes

ROOF_BYTES = 1 << 28  # the roof is measured on this many, far more than the caches hold
GPU_ROOF_BYTES = 1 << 30
ROOF_PASSES = 8
MOST_PASSES = 64  # of a memory that is much smaller


@dataclass(frozen=True)
class BenchResult:
    """One test, after a warm-up that does not count."""

    name: str  # "pp512", "tg128", with "@d4096" at a depth; "16 x pp512+tg128" of requests at once
    num_tokens: int
    seconds: tuple[float, ...]  # of each repetition
    bytes_a_token: int | None = None  # read to generate one token: weights, and the cache at half way
    load: LoadFigures | None = None  # of requests at once

    @property
    def speeds(self) -> tuple[float, ...]:
        return tuple(self.num_tokens / seconds for seconds in self.seconds)

    @property
    def mean(self) -> float:
        """Tokens per second."""
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """Of the sample; 0 for a single repetition."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0


@dataclass(frozen=True)
class Subject:
    """What was measured, as llama-bench's rows name it, so that rows of several runs can stand in one table."""

    model: str
    size: int  # bytes of all weights as they are packed
    bits: str  # "4"; of a model that is not quantized its type: "f16"
    device: str  # "cpu", or the GPU's name
    threads: int  # of the CPU, at most; fewer compute while others use the processors
    cache: str  # type of the KV cache


@dataclass(frozen=True)
class BenchReport:
    subject: Subject
    plan: MemoryPlan
    results: tuple[BenchResult, ...]
    roof: float  # bytes per second of a read-only pass over memory, with the same threads, in the same run
    # Resident memory above that before loading, None if the system does not tell; on a GPU what torch has reserved.
    peak_bytes: int | None
    decode_steps: str | None = None  # how they ran, see ``LLM.decode_steps``

    def share_of_roof(self, result: BenchResult) -> float | None:
        if result.bytes_a_token is None:
            return None
        return result.bytes_a_token * result.mean / self.roof


def run_bench(
    folder: Path,
    options: EngineOptions,
    num_prompt: int = 512,
    num_generated: int = 128,
    depth: int = 0,
    repeats: int = 5,
    progress: Progress | None = None,
    name: str | None = None,
    concurrency: int | None = None,
    speculate: str | None = None,
) -> BenchReport:
    """Loads the model and measures it; 0 tokens leave a test out. ``options.context`` must hold depth and tokens; None
    is exactly that many. ``name``: what rows call the model; None: the folder's name. ``concurrency``: instead of both
    tests, so many requests at once, each with a prompt and an answer; ``speculate``: with drafts, by whom. The
    first adapter of ``options.lora`` applies to all of it. Raises ``ConfigError``, and what loading raises."""
    for option, value, least in (
        ("pp", num_prompt, 0),
        ("tg", num_generated, 0),
        ("depth", depth, 0),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ConfigError(f"{option}: found {value}, expected {least} or more")
    load = _load_test(options, num_prompt, num_generated, depth, concurrency, speculate)
    needed = depth + max(num_prompt, num_generated + 2) if load is None else num_prompt + num_generated
    if options.context is None:
        options = replace(options, context=needed)
    if load is not None and options.cache_tokens is None:  # room for all that run at once
        pages = -(-needed // PAGE_SIZE) + 1
        options = replace(options, cache_tokens=min(load.concurrency, options.max_sequences) * pages * PAGE_SIZE)
    elif options.cache_tokens is None and isinstance(options.context, int):  # no page is given back of what is measured
        options = replace(options, cache_tokens=options.context)
    options, backend = choose_device(options)
    if backend is None:
        _run_tiny()
    roof = read_bandwidth("cpu" if backend is None else backend.device)
    before = _reset_peak() if backend is None else 0
    engine = load_engine(folder, options, progress, backend)
    try:
        if engine.generator.context < needed:
            raise ConfigError(f"context: found {engine.generator.context}, expected {needed} tokens or more")
        results = _load_results(engine, load, repeats) if load is not None else []
        tests: list[tuple[str, int, Callable[[], float], int | None]] = []
        at = f"@d{depth}" if depth else ""
        if num_prompt and load is None:
            tests.append((f"pp{num_prompt}{at}", num_prompt, lambda: _prompt(engine, depth, num_prompt), None))
        if num_generated and load is None:
            num_bytes = model_bytes_a_token(engine.model, depth + num_generated // 2)
            num_bytes += sum(adapter.num_bytes for adapter in engine.model.adapters[:1])
            tests.append(
                (f"tg{num_generated}{at}", num_generated, lambda: _generate(engine, depth, num_generated), num_bytes)
            )
        for test, count, run, num_bytes in tests:
            run()
            results.append(BenchResult(test, count, tuple(run() for _ in range(repeats)), num_bytes))
        peak = None if before is None else _peak(engine) - before
        shown = model_name(None, folder) if name is None else name
        shown = " + ".join(filter(None, (shown, measured_adapter(engine))))
        subject = _subject(engine, shown, thread_limit(options.threads))
        return BenchReport(subject, engine.plan, tuple(results), roof, peak, engine.decode_steps)
    finally:
        engine.close()


def _load_test(
    options: EngineOptions,
    num_prompt: int,
    num_generated: int,
    depth: int,
    concurrency: int | None,
    speculate: str | None,
) -> LoadTest | None:
    """None: no requests at once are asked for. Raises ``ConfigError``."""
    if options.draft is not None and speculate is None:
        speculate = "draft"
    if concurrency is None:
        if speculate is not None:
            raise ConfigError(f"speculate: found {speculate!r} without concurrency, expected both")
        return None
    if speculate is not None and speculate not in SPECULATE:
        raise ConfigError(f"speculate: found {speculate!r}, expected {' or '.join(map(repr, SPECULATE))}")
    if speculate == "draft" and options.draft is None:
        raise ConfigError("speculate: found 'draft' without a draft model, expected draft, too")
    if depth:
        raise ConfigError(f"depth: found {depth} with concurrency, expected 0: a longer prompt, pp, is the same")
    return LoadTest(concurrency, num_prompt, num_generated, speculate)


def _load_results(engine: Engine, test: LoadTest, repeats: int) -> list[BenchResult]:
    run_load(engine, test)  # does not count
    runs = [run_load(engine, test) for _ in range(repeats)]
    seconds = tuple(run.seconds for run in runs)
    return [BenchResult(test.name, test.num_tokens, seconds, load=LoadFigures.of(test, runs))]


def model_name(model: str | None, folder: Path) -> str:
    """What rows call a model: a repository's id, else the name of its folder or file."""
    is_repository = model is not None and not Path(model).expanduser().exists()
    return model if is_repository else folder.resolve().stem if folder.is_file() else folder.resolve().name


def _subject(engine: Engine, name: str, threads: int) -> Subject:
    model = engine.model
    (table,) = model.embed.linears["embed"]
    on_gpu = engine.device.type == "cuda"
    return Subject(
        model=name,
        size=sum(blob.num_bytes for blob in (model.embed, *model.layers, model.head)),
        bits=table.spec.dtype if engine.quant is None else str(engine.quant.bits),
        device=torch.cuda.get_device_name(engine.device) if on_gpu else engine.device.type,
        threads=threads,
        cache=model.kv_layout.kind,
    )


def _prompt(engine: Engine, depth: int, count: int) -> float:
    generator, ids = engine.generator, _ids(engine, depth + count)
    sequence = generator.begin(depth + count, measured_adapter(engine))
    try:
        if depth:
            generator.extend(sequence, ids[:depth])
        engine.synchronize()
        began = time.perf_counter()
        generator.extend(sequence, ids[depth:])
        engine.synchronize()
        return time.perf_counter() - began
    finally:
        generator.end(sequence)


def _generate(engine: Engine, depth: int, count: int) -> float:
    """Seconds from the first token that the generator yields to the last, as a caller sees them."""
    generator = engine.generator
    eos_ids, generator.eos_ids = generator.eos_ids, frozenset()
    params = SamplingParams(max_tokens=count + 1, temperature=0.0)
    answer = generator.stream(_ids(engine, depth + 1), params, lora=measured_adapter(engine))
    try:
        next(answer)
        began = time.perf_counter()
        for _ in answer:
            pass
        return time.perf_counter() - began
    finally:
        answer.close()
        generator.eos_ids = eos_ids


def _ids(engine: Engine, count: int) -> list[int]:
    return prompt_ids(count, 0, engine.config.vocab_size)


def read_bandwidth(device: torch.device | str = "cpu", num_bytes: int | None = None) -> float:
    """Bytes per second of the fastest of some read-only passes over memory, on a CPU with torch's threads.
    ``num_bytes``: what a pass reads (default: far more than the caches hold)."""
    on_gpu = torch.device(device).type == "cuda"
    num_bytes = num_bytes or (GPU_ROOF_BYTES if on_gpu else ROOF_BYTES)
    memory = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    passes = [_pass_seconds(memory) for _ in range(max(ROOF_PASSES, min(MOST_PASSES, ROOF_BYTES // num_bytes)))]
    if on_gpu:
        del memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return num_bytes / min(passes)


def _pass_seconds(memory: torch.Tensor) -> float:
    if not memory.is_cuda:
        began = time.perf_counter()
        memory.sum()
        return time.perf_counter() - began
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    memory.sum()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _peak(engine: Engine) -> int:
    """The peak of resident memory; on a GPU, of what torch has reserved there."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_reserved(engine.device)
    return _status_bytes("VmHWM")


def _run_tiny() -> None:
    """Makes torch allocate what it allocates once and keeps: that is in no plan."""
    engine = load_engine(BUNDLED_MODEL, EngineOptions(context=64, device="cpu"))
    try:
        _generate(engine, 8, 4)
    finally:
        engine.close()
    gc.collect()
    trim_heap()


def _reset_peak() -> int | None:
    """Resident memory now; the peak is counted from here on. None if the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    found = proc_bytes("self/status", field)
    if found is None:
        raise ConfigError(f"/proc/self/status: found no {field}")
    return found


def rows_of(report: BenchReport) -> list[dict[str, object]]:
    """One row per test, for tables and files; each says what it measured."""
    rows = []
    for result in report.results:
        share = report.share_of_roof(result)
        rows.append(
            {
                **vars(report.subject),
                "test": result.name,
                "tokens_per_second": round(result.mean, 2),
                "deviation": round(result.deviation, 2),
                "repeats": len(result.seconds),
                "share_of_roof": None if share is None else round(share, 3),
                **({} if result.load is None else result.load.row()),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """The same as a Markdown table, with llama-bench's columns; of requests at once also what each waits for."""
    names, loaded = ["model", "size", "bits", "device", "threads", "cache", "test", "t/s"], {}
    if any("first_p50_ms" in row for row in rows):
        loaded = {"first ms": "first", "next ms": "between"}
    drafted = any(row.get("accepted_per_step") is not None for row in rows)
    names += [*(f"{name}, p50 / p99" for name in loaded), *(["accepted a step"] if drafted else [])]
    aligned = ["---", "---:", "---:", "---", "---:", "---", *["---:"] * (len(names) - 6)]
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join(aligned)} |"]
    for row in rows:
        cells = [str(row["model"]).replace("|", "\\|"), format_bytes(row["size"])]
        cells += [str(row[name]) for name in ("bits", "device", "threads", "cache", "test")]
        speed = f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}"
        cells.append(speed)
        cells += [" / ".join(_shown(row[f"{key}_p{percent}_ms"]) for percent in (50, 99)) for key in loaded.values()]
        cells += [_shown(row["accepted_per_step"])] if drafted else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.2f}"
