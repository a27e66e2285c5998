"""Generation beside other work: tokens per second idle, beside one busy process and beside two, in one run.

python -m benchmarks.contention [--seconds 8] [--rounds 3] [--write NAME]

Two models: one in the shapes of SmolLM2-135M with random 4-bit weights, and the one that ships with exl. Each round
measures all loads in turn, each after a second of generation that does not count, so that what else the machine does
meets all of them. Each is measured with the number of threads that follows the time (exl's default) and, to compare,
with all of them fixed. A busy process is a plain Python loop. Medians of the rounds, and their ratios to idle; with
--write also as JSON in benchmarks/results/NAME.json.

Goal: at least 25 % of idle beside two busy processes on two processors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.disk import machine
from benchmarks.synthetic import write_model
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions
from exl.planning.shapes import SHAPES
from exl.threads import Threads, usable_processors

ROOT = Path(__file__).parents[1]
LOADS = (0, 1, 2)
CONTEXT = 512
MOST_STEPS = CONTEXT - 16


class AllThreads(Threads):
    """Always as many as may be used, as before the number followed the time."""

    def measured(self, kind: str, units: float) -> AbstractContextManager[None]:
        return self.all()

    def like(self, kind: str) -> AbstractContextManager[None]:
        return self.all()


@contextmanager
def busy(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def speed(engine: Engine, seconds: float) -> float:
    """Tokens per second of decode steps, for at least so many seconds and one step."""
    generator, steps, took = engine.generator, 0, 0.0
    while took < seconds:
        sequence = generator.begin(CONTEXT)
        generator.extend(sequence, [5] * 8)
        began = time.perf_counter()
        for _ in range(MOST_STEPS):
            generator.extend(sequence, [7])
            steps += 1
            if took + time.perf_counter() - began >= seconds:
                break
        took += time.perf_counter() - began
        generator.end(sequence)
    return steps / took


def measure(name: str, folder: Path, rounds: int, seconds: float) -> list[dict[str, object]]:
    engine = load_engine(folder, EngineOptions(device="cpu", context=CONTEXT))
    ops = engine.generator.runner.decoder.ops
    choosing = ops.threads
    speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
    try:
        for _ in range(rounds):
            for load in LOADS:
                with busy(load):
                    for mode, threads in (("chosen", choosing), ("all", AllThreads(choosing.limit))):
                        ops.threads = threads
                        speed(engine, 1.0)
                        speeds[mode, load].append(speed(engine, seconds))
    finally:
        engine.close()
    rows = []
    for (mode, load), values in speeds.items():
        median, idle = statistics.median(values), statistics.median(speeds[mode, 0])
        rows.append(
            {
                "model": name,
                "threads": mode,
                "busy_processes": load,
                "tokens_per_second": round(median, 2),
                "of_idle": round(median / idle, 3),
                "rounds": [round(value, 2) for value in values],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of generation per measurement (default: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.json, too")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name)
        write_model(model, SHAPES["smollm2-135m"], group_size=64, tokenizer=ROOT / "tests" / "data" / "stories260K")
        rows = measure("SmolLM2-135M shapes, 4 bits", model, args.rounds, args.seconds)
        rows += measure("the model in exl", BUNDLED_MODEL, args.rounds, args.seconds)
    print(f"{before}; {usable_processors()} processors may be used")
    for row in rows:
        print(
            f"{row['model']:<28} {row['threads']:<7} {row['busy_processes']} busy: "
            f"{row['tokens_per_second']:8.2f} tokens/s, {row['of_idle']:.0%} of idle  {row['rounds']}"
        )
    if args.write:
        path = ROOT / "benchmarks" / "results" / f"{args.write}.json"
        report = {"machine": before, "processors": usable_processors(), "seconds": args.seconds, "results": rows}
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
