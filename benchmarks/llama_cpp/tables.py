"""A comparison as Markdown: the whole table of a run, and the README's section."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.llama_cpp.cases import Comparison, Row

BUSY = {0: "idle", 1: "beside one busy process", 2: "beside two"}


def report(comparison: Comparison) -> str:
    """Facts, models, and one line per case and load with the spread of its runs."""
    lines = [f"- {name}: {value}" for name, value in comparison.facts.items()]
    lines += [f"- {name}: {about}" for name, about in comparison.models.items()]
    lines += ["", "Tokens per second: median (least to most).", ""]
    lines += ["| model | test | busy processes | exl | llama.cpp | exl / llama.cpp |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in comparison.rows:
        cells = (row.model, row.case.name, str(row.busy), spread(row.exl), spread(row.llama_cpp), times(row.ratio))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme_section(comparison: Comparison) -> str:
    """What is measured, and one line per model and case: medians of both and their ratio, a column per load."""
    loads = sorted({row.busy for row in comparison.rows})
    found = {(row.model, row.case, row.busy): row for row in comparison.rows}
    lines = [
        "Tokens per second, exl / llama.cpp, medians of one run in which the two took turns, with "
        f"{comparison.facts['threads']} threads each, on {comparison.facts['machine']}. "
        f"llama.cpp is {comparison.facts['llama.cpp']}.",
        "",
        *(f"- {name}: {about}." for name, about in comparison.models.items()),
        "",
        f"| | {' | '.join(busy_words(load) for load in loads)} |",
        f"| --- |{' ---: |' * len(loads)}",
    ]
    for model, case in dict.fromkeys((row.model, row.case) for row in comparison.rows):
        cells = [_pair(found.get((model, case, load))) for load in loads]
        lines.append(f"| {model}, {case.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def busy_words(count: int) -> str:
    return BUSY.get(count, f"beside {count}")


def spread(runs: Sequence[float]) -> str:
    """``40.7 (39.9 to 41.2)``"""
    return f"{speed(statistics.median(runs))} ({speed(min(runs))} to {speed(max(runs))})"


def speed(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 0.995 else f"{ratio:.2f}x"


def _pair(row: Row | None) -> str:
    if row is None:
        return "-"
    exl, llama_cpp = (speed(statistics.median(runs)) for runs in (row.exl, row.llama_cpp))
    return f"{exl} / {llama_cpp} ({times(row.ratio)})"
