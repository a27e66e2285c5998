"""exl against llama.cpp on this machine's CPU, in one run: tokens per second of decoding and of prompts.

    python -m scripts.build_llama_bench                       # once; prints the path of llama-bench
    python benchmarks/compare_llama_cpp.py --llama-bench PATH [--quick] [--json NAME]
    python benchmarks/compare_llama_cpp.py --readme FILE      # the README's section from a result, nothing is measured

Two models: a Llama of 1.1B weights (random ones: speed does not depend on them), and SmolLM2-135M-Instruct. Each round
goes through all loads (idle, beside one and two busy processes, which are plain Python loops) and all cases; each case
is measured by exl and at once by llama.cpp, so that what else the machine does meets both. Both use the same number of
threads, an f16 cache and their own defaults, and each measurement follows one that does not count. Without --quick a
run takes some two hours, most of them while llama.cpp reads prompts of 4,096 tokens beside two busy processes.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository, installed or not

from benchmarks.contention import busy
from benchmarks.llama_cpp import tables
from benchmarks.llama_cpp.cases import LONG_PROMPT, Case, Comparison, Row, read, write
from benchmarks.llama_cpp.models import MODELS, Subject, prepare
from benchmarks.llama_cpp.programs import ExlProcess, LlamaBench, ProgramError
from benchmarks.llama_cpp.random_gguf import HEADS
from benchmarks.processor import instruction_sets, processor_name
from exl.errors import ExlError
from exl.threads import thread_limit

RESULTS = HERE / "results"
FULL = {
    "depths": (0, 1024, 4096), "prompts": (128, 512, 2048), "busy": (0, 1, 2), "tokens": 64, "rounds": 3,
    "busy_rounds": 3, "repeats": 2,
}  # fmt: skip
QUICK = {
    "depths": (0, 1024), "prompts": (128,), "busy": (0, 2), "tokens": 16, "rounds": 1,
    "busy_rounds": 1, "repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured of each model."""

    cases: tuple[Case, ...]
    loads: tuple[int, ...]
    rounds: int
    busy_rounds: int  # the first ones, which are measured beside busy processes, too
    repeats: int  # of one measurement

    @property
    def context(self) -> int:
        return max(case.context for case in self.cases)

    def loads_in(self, i: int) -> tuple[int, ...]:
        """Of round ``i``."""
        return tuple(load for load in self.loads if load == 0 or i < self.busy_rounds)


def compare(subject: Subject, exl: ExlProcess, llama: LlamaBench, plan: Plan) -> Iterator[tuple[Row, dict[str, str]]]:
    """Yields each row again whenever it has new runs, and llama-bench's words about itself."""
    rows: dict[tuple[Case, int], Row] = {}
    for i in range(plan.rounds):
        for load in plan.loads_in(i):
            with busy(load):
                for case in plan.cases:
                    repeats = case.repeats(plan.repeats)
                    own = exl.measure(case, repeats)
                    other = llama.measure(case, repeats)
                    row = rows.get((case, load), Row(subject.name, case, load)).with_runs(own, other.speeds)
                    rows[case, load] = row
                    told = f"{tables.spread(own)}, llama.cpp {tables.spread(other.speeds)}"
                    print(
                        f"round {i + 1}, {subject.name}, {case.name}, {tables.busy_words(load)}: exl {told}",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield row, other.facts


def run(args: argparse.Namespace, plan: Plan) -> Comparison:
    """Measures, and saves after each measurement if a file was asked for."""
    threads = thread_limit(args.threads)
    facts = {
        "machine": f"{processor_name()}, {os.cpu_count()} processors, {instruction_sets()}",
        "load average before": ", ".join(f"{value:.2f}" for value in os.getloadavg()),
        "threads": str(threads),
        "rounds": f"{plan.rounds}, beside busy processes {plan.busy_rounds}",
        "runs": f"{plan.repeats} of each test in a round, one of prompts of {LONG_PROMPT:,} or more",
        "decode": f"{args.tokens} tokens",
    }
    models: dict[str, str] = {}
    rows: dict[tuple[str, Case, int], Row] = {}
    subjects = [prepare(name, args.folder.resolve(), args.head, args.smollm2) for name in args.models]
    for subject in subjects:
        models[subject.name] = subject.about
        options = {"threads": threads, "context": plan.context, **dict(args.exl)}
        llama = LlamaBench(args.llama_bench, subject.gguf, threads, ("-fa", args.flash_attention))
        with ExlProcess(subject.exl_folder, options) as exl:
            facts[f"exl, {subject.name}"] = exl.description
            for row, told in compare(subject, exl, llama, plan):
                facts["llama.cpp"] = f"{args.llama_build} of commit {told['build']}"
                facts[f"llama.cpp, {subject.name}"] = f"{told['weights']} of weights, cache {told['cache']}"
                rows[row.model, row.case, row.busy] = row
                found = Comparison(facts, models, tuple(rows.values()))
                if args.json:
                    write(found, RESULTS / f"{args.json}.json")
    return found


def option(text: str) -> tuple[str, object]:
    """``NAME=VALUE``, a value of JSON or else a word."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.readme:
        print(tables.readme_section(read(args.readme)))
        return
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cases = [Case("decode", args.tokens, depth) for depth in args.depths]
    cases += [Case("prefill", tokens) for tokens in args.prompts]
    plan = Plan(tuple(cases), tuple(args.busy), args.rounds, min(args.rounds, args.busy_rounds), args.repeats)
    try:
        found = run(args, plan)
    except (ExlError, ProgramError) as error:
        sys.exit(f"error: {error}")
    print(tables.report(found))
    if args.json:
        print(f"written to {RESULTS / args.json}.json", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    do = found.add_mutually_exclusive_group(required=True)
    do.add_argument("--llama-bench", type=Path, metavar="PATH", help="the program to compare with")
    do.add_argument("--readme", type=Path, metavar="FILE", help="print the README's section from a --json result")
    found.add_argument(
        "--quick", action="store_true", help="a short run: what is not given is taken from a shorter list"
    )
    found.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    found.add_argument("--depths", nargs="*", type=int, help="of decoding (default: 0 1024 4096)")
    found.add_argument("--prompts", nargs="*", type=int, help="tokens of prompts (default: 128 512 2048)")
    found.add_argument("--busy", nargs="+", type=int, help="busy processes beside (default: 0 1 2)")
    found.add_argument("--tokens", type=int, help="generated to measure decoding (default: 64)")
    found.add_argument("--rounds", type=int, help="default: 3")
    found.add_argument("--busy-rounds", type=int, help="of those, how many beside busy processes, too (default: 3)")
    found.add_argument("--repeats", type=int, help="runs per measurement (default: 2; long prompts once)")
    found.add_argument("--threads", type=int, help="of both programs (default: all that the process may use)")
    found.add_argument("--head", choices=HEADS, default="q6_k", help="of the 1.1B's GGUF file (default: q6_k)")
    found.add_argument(
        "--smollm2", type=Path, metavar="FOLDER", help="in 4 bits, groups of 64 (default: scripts.chat_model's)"
    )
    found.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto", help="llama.cpp's -fa")
    found.add_argument(
        "--exl", type=option, action="append", default=[], metavar="NAME=VALUE", help="another keyword of exl.load"
    )
    found.add_argument(
        "--llama-build",
        default="a native Release build",
        metavar="WORDS",
        help="how llama-bench was built, for the table",
    )
    found.add_argument(
        "--folder", type=Path, default=HERE.parent / "build" / "llama", help="of the models (default: build/llama)"
    )
    found.add_argument("--json", metavar="NAME", help="write benchmarks/results/NAME.json, too")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # or the busy processes would go on
    main()
