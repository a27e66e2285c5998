"""Reports measured line by line: each line is written as soon as it is known, and a failure costs only its own line."""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.guard import device_error, one_line
from benchmarks.machine import Machine, gpu_machine
from exl.errors import KernelError

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Measurement:
    name: str  # unique in its section
    run: Callable[[], str]  # -> one or more lines


@dataclass(frozen=True)
class Section:
    title: str
    head: tuple[str, ...]  # lines above them: heading, head of the table
    seconds: float  # no line is begun after this time
    measurements: tuple[Measurement, ...]


def failed_line(name: str, error: BaseException, head: Sequence[str]) -> str:
    """Replaces a line that failed; a table row if the section's lines are rows."""
    text = f"{name}: failed: {one_line(error)}"
    if head and head[-1].startswith("|"):
        return f"| {text.replace('|', '/')} |" + " |" * (head[-1].count("|") - 2)
    return f"- {text}"


def report_lines(
    title: Sequence[str], sections: Sequence[Section], clock: Callable[[], float] = time.perf_counter
) -> Iterator[str]:
    """Yields the report's lines as they are measured. Stops after an error that destroys the device's context."""
    began = clock()
    yield from title
    for section in sections:
        yield from ("", f"## {section.title}", "")
        if section.head:
            yield from section.head
        section_began = clock()
        for i, measurement in enumerate(section.measurements):
            if clock() - section_began > section.seconds:
                left = len(section.measurements) - i
                yield from ("", f"{left} more were left out: the {section.seconds:.0f} s for them were over.")
                break
            try:
                yield measurement.run()
            except Exception as error:
                traceback.print_exc()
                yield failed_line(measurement.name, error, section.head)
                broken = device_error()
                if broken is not None:
                    yield from ("", f"The rest was left out: the GPU's context is lost ({broken}).")
                    return
    yield from ("", f"All of this took {clock() - began:.0f} s.")


def write_report(path: Path, lines: Iterator[str]) -> None:
    """Prints each line and rewrites the file after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    print(f"written to {path}")


def describe(machine: Machine) -> str:
    backend = machine.backend
    return (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability {backend.arch / 10}, "
        f"{backend.num_multiprocessors} multiprocessors."
    )


def main(
    script: str,
    doc: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    report: Callable[[Machine, argparse.Namespace], tuple[str, Iterator[str]]],
) -> int:
    """The command line of a benchmark. ``report`` returns the end of the file's name, and the lines."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report")
    arguments = parser.parse_args()
    try:
        machine = gpu_machine()
    except KernelError as error:
        print(f"benchmarks/{script} needs a GPU: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    suffix, lines = report(machine, arguments)
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine.name).strip("-").lower()
    write_report(arguments.out / f"{name}{suffix}.md", lines)
    return 0
