"""One stage in its own process: ``python -m benchmarks.gpu_run.stage NAME --results FILE --seconds S``.

Drives the workers of a stage; imports neither torch nor exl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_run.driver import Job, drive
from benchmarks.gpu_run.summary import GOOD
from benchmarks.gpu_run.worker import Place, append, read_records

MARGIN_SECONDS = 3.0  # a stage ends itself this much before its limit, when it would be killed
MOST_RERUNS = 12
# Tests of a dry run: a few of the shim, with kernels that other tests compile as well.
DRY_TESTS = {
    "kernels": ("tests/kernels/test_gpu_launch.py", "-m", "not gpu", "-k", "race and not addresses"),
    "models": ("tests/model/test_cuda_steps.py", "-m", "not gpu", "-k", "five_launches or staging_is_one_copy"),
}
TESTS = {"kernels": "tests/kernels", "models": "tests/model"}
ITEM_SECONDS = {"smoke": 30, "kernels": 60, "models": 60, "numbers": 60}


@dataclass(frozen=True)
class Options:
    results: Path
    seconds: float
    dry_run: bool
    kernel_cache: Path | None

    @property
    def deadline(self) -> float:
        return time.monotonic() + max(1.0, self.seconds - MARGIN_SECONDS)

    def words(self) -> list[str]:
        """The same options as words of a worker's command line."""
        cache = [] if self.kernel_cache is None else ["--kernel-cache", str(self.kernel_cache)]
        return cache + (["--dry-run"] if self.dry_run else [])


def num_test_workers(dry_run: bool) -> int:
    """Number of test workers: one if the GPU serves only one process at a time."""
    if dry_run or compute_mode().startswith("Exclusive"):
        return 1
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def compute_mode() -> str:
    """``Default``, ``Exclusive_Process``, ...; "" if nvidia-smi does not report it."""
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def one_thread() -> dict[str, str]:
    """Environment that limits each library to one thread, because several processes compute references at once."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def pytest_command(place: Place, options: Options, selection: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.host.gpu_plugin", "-p", "no:faulthandler", "--place"]
    command += [str(place), "-q", "--no-header", "-rN", "--tb=short", *selection]
    if options.kernel_cache is not None:
        command += ["--kernel-cache", str(options.kernel_cache)]
    return command


def tests_job(stage: str, options: Options) -> Job:
    selection = DRY_TESTS[stage] if options.dry_run else (TESTS[stage], "-m", "gpu", "--require-gpu")
    return Job(
        stage,
        options.results,
        lambda place: pytest_command(place, options, selection),
        num_test_workers(options.dry_run),
        ITEM_SECONDS[stage],
        environment=one_thread(),
    )


def module_job(
    stage: str, module: str, options: Options, *more: str, environment: Mapping[str, str] | None = None
) -> Job:
    """A job whose items one of our modules runs, with one worker at a time."""
    return Job(
        stage,
        options.results,
        lambda place: [sys.executable, "-m", module, "--place", str(place), *options.words(), *more],
        1,
        ITEM_SECONDS["numbers" if module.endswith("numbers") else "smoke"],
        environment=environment,
    )


def first_failures(records: Sequence[dict], stages: Sequence[str]) -> list[str]:
    failed = [r for r in records if r.get("event") == "end" and r.get("stage") in stages and r["outcome"] not in GOOD]
    return list(dict.fromkeys(r["item"] for r in failed if not r["item"].startswith("collecting ")))[:MOST_RERUNS]


def reruns(options: Options) -> None:
    """Runs the first failures again, waiting for each launch, so that an error appears at the launch that causes it."""
    records, _ = read_records(options.results)
    checks, tests = first_failures(records, ("smoke",)), first_failures(records, ("kernels", "models"))
    deadline, blocking = options.deadline, {**one_thread(), "CUDA_LAUNCH_BLOCKING": "1"}
    if not checks and not tests:
        append(options.results, stage="reruns", item=None, event="note", text="nothing had failed")
    if checks:
        only = ("--only", json.dumps(checks))
        drive(module_job("reruns", "benchmarks.gpu_run.smoke", options, *only, environment=blocking), deadline)
    if tests:
        with tempfile.TemporaryDirectory() as folder:
            only = Path(folder) / "items.json"
            only.write_text(json.dumps(tests))
            files = dict.fromkeys(item.split("::")[0] for item in tests)
            more = () if options.dry_run else ("--require-gpu",)
            selection = (*files, "--only-items", str(only), *more)
            job = Job(
                "reruns",
                options.results,
                lambda place: pytest_command(place, options, selection),
                min(4, num_test_workers(options.dry_run)),
                ITEM_SECONDS["kernels"],
                environment=blocking,
            )
            drive(job, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("smoke", "kernels", "models", "numbers", "reruns"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--kernel-cache", type=Path)
    arguments = vars(parser.parse_args())
    name = arguments.pop("name")
    options = Options(**arguments)
    if name == "reruns":
        reruns(options)
    elif name in TESTS:
        drive(tests_job(name, options), options.deadline)
    else:
        drive(module_job(name, f"benchmarks.gpu_run.{name}", options), options.deadline)


if __name__ == "__main__":
    main()
