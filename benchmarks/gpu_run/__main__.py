"""The first minutes on a GPU: one command that does not stop at a failure.

python -m benchmarks.gpu_run --out DIR --seconds 480 [--kernel-cache FOLDER] [--stages facts,smoke,...]
python -m benchmarks.gpu_run --out DIR --dry-run              all stages on the host shim, without a GPU
python -m benchmarks.gpu_run --precompile 90 --out FOLDER     compiles kernels ahead of time, for another machine

DIR gets summary.md (a page), summary.json, results.jsonl (every check, test and figure, as soon as it is known) and
log.txt. Stages: facts, compile, smoke, kernels, models, numbers, reruns.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu_run.runner import RESULTS, Run, Stage, run_stages

ROOT = Path(__file__).resolve().parents[2]
# Shares of 480 seconds. A stage's unused time goes to later stages; a stage that hangs never takes theirs.
SECONDS = {"facts": 15, "compile": 20, "smoke": 40, "kernels": 135, "models": 85, "numbers": 150, "reruns": 25}
END_SECONDS = 5.0  # for the last summary


def make_stages(
    names: list[str], out: Path, seconds: float, *, dry_run: bool = False, kernel_cache: Path | None = None
) -> list[Stage]:
    """The stages, each with its share of ``seconds``."""
    scale = (seconds - END_SECONDS) / sum(SECONDS[name] for name in names)
    cache = () if kernel_cache is None else ("--kernel-cache", str(kernel_cache))
    results = ("--results", str(out / RESULTS))
    stages = []
    for name in names:
        if name == "facts":
            module, more = "benchmarks.gpu_run.facts", ()
        elif name == "compile":
            module = "benchmarks.gpu_run.precompile"
            more = ("--seconds", "{seconds}", "--processes", str(os.cpu_count() or 1))
        else:
            module, more = "benchmarks.gpu_run.stage", (name, "--seconds", "{seconds}")
        if dry_run and name != "facts":
            more += ("--dry-run",)
        stages.append(Stage(name, (sys.executable, "-m", module, *more, *results, *cache), SECONDS[name] * scale))
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, or for compiled kernels")
    parser.add_argument("--seconds", type=float, default=480, help="time for all stages together (default: 480)")
    parser.add_argument("--stages", default=",".join(SECONDS), help=f"some of {','.join(SECONDS)}")
    parser.add_argument("--kernel-cache", type=Path, help="folder of compiled kernels (default: the user's cache)")
    parser.add_argument("--dry-run", action="store_true", help="run on the host shim with small shapes")
    parser.add_argument("--precompile", type=int, metavar="ARCH", help="only compile, for 90 or 120")
    parser.add_argument("--nvrtc", type=Path, metavar="LIBRARY", help="libnvrtc.so to compile with")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes for --precompile")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.precompile is not None:
        from benchmarks.gpu_run.precompile import command

        return command(arguments.precompile, out, arguments.nvrtc, arguments.processes)
    names = [name.strip() for name in arguments.stages.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECONDS]
    if unknown or not names:
        parser.error(f"--stages: found {arguments.stages!r}, expected some of {','.join(SECONDS)}")
    if arguments.seconds < 10 * len(names):
        parser.error(f"--seconds: found {arguments.seconds:g}, expected {10 * len(names)} or more for these stages")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # so that a summary is written
    cache = None if arguments.kernel_cache is None else arguments.kernel_cache.resolve()
    stages = make_stages(names, out, arguments.seconds, dry_run=arguments.dry_run, kernel_cache=cache)
    title = "gpu_run, dry: the host shim instead of a GPU" if arguments.dry_run else "gpu_run"
    run_stages(Run(out, arguments.seconds - END_SECONDS, title), stages, ROOT)
    print((out / "summary.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
