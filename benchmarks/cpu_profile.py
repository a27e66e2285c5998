"""Where the time of a decode step, or of a prompt, goes on the CPU: seconds by kernel.

    python -m benchmarks.cpu_profile MODEL [--depth 0] [--prompt 0] [--steps 10] [--exl arithmetic=int8 ...]

Runs the stages of a step one after another on one thread and adds up the processor's time, so that other processes
disturb little. With ``--prompt N`` one prompt of N tokens instead of decode steps.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exl.cpu_kernels.library import Library
from exl.cpu_kernels.pool import Pool, Program
from exl.engine.build import Engine, load_engine
from exl.planning.options import EngineOptions


@dataclass
class Spent:
    seconds: float = 0.0
    num_stages: int = 0
    num_chunks: int = 0


@contextmanager
def timed_stages(library: Library) -> Iterator[dict[int, Spent]]:
    """While it is open, stages run on the calling thread, and their time is added up by the address of their kernel."""
    spent: dict[int, Spent] = defaultdict(Spent)

    def run(pool: Pool, program: Program) -> None:
        for kernel, args, num_chunks in program.table[:, :3].tolist():
            began = time.thread_time()
            library.invoke(kernel, args, num_chunks)
            found = spent[kernel]
            found.seconds += time.thread_time() - began
            found.num_stages += 1
            found.num_chunks += num_chunks

    before, Pool.run = Pool.run, run
    try:
        yield spent
    finally:
        Pool.run = before


def decode(engine: Engine, depth: int, count: int) -> dict[int, Spent]:
    generator, library = engine.generator, engine.generator.runner.decoder.ops.library
    ids = [3 + i * 37 % (engine.config.vocab_size - 3) for i in range(depth + count + 4)]
    sequence = generator.begin(len(ids))
    if depth:
        generator.extend(sequence, ids[:depth])
    for token_id in ids[depth : depth + 4]:  # plainly, then captured
        generator.extend(sequence, [token_id])
    with timed_stages(library) as spent:
        for token_id in ids[depth + 4 :]:
            generator.extend(sequence, [token_id])
    generator.end(sequence)
    return spent


def prompt(engine: Engine, depth: int, count: int) -> dict[int, Spent]:
    generator, library = engine.generator, engine.generator.runner.decoder.ops.library
    ids = [3 + i * 37 % (engine.config.vocab_size - 3) for i in range(depth + count)]
    for _ in range(2):  # the first compiles what is missing
        sequence = generator.begin(len(ids))
        if depth:
            generator.extend(sequence, ids[:depth])
        with timed_stages(library) as spent:
            generator.extend(sequence, ids[depth:])
        generator.end(sequence)
    return spent


def table(spent: dict[int, Spent], library: Library, count: int) -> str:
    total = sum(found.seconds for found in spent.values())
    lines = ["| kernel | ms | share | stages | chunks |", "| --- | ---: | ---: | ---: | ---: |"]
    for kernel, found in sorted(spent.items(), key=lambda item: -item[1].seconds):
        lines.append(
            f"| {library.name_of(kernel)} | {1000 * found.seconds / count:.3f} | {100 * found.seconds / total:.1f} % "
            f"| {found.num_stages / count:.0f} | {found.num_chunks / count:.0f} |"
        )
    lines.append(f"| all | {1000 * total / count:.3f} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--exl", nargs="*", default=[], metavar="NAME=VALUE", help="options of exl.load")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.exl)
    context = args.depth + max(args.prompt, args.steps) + 64
    engine = load_engine(args.model, EngineOptions(device="cpu", threads=1, context=context, **options))
    library = engine.generator.runner.decoder.ops.library
    count = 1 if args.prompt else args.steps
    spent = prompt(engine, args.depth, args.prompt) if args.prompt else decode(engine, args.depth, args.steps)
    print(table(spent, library, count))
    engine.close()


if __name__ == "__main__":
    main()
