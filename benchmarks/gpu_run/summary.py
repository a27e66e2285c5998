"""Writes ``summary.json`` and ``summary.md`` from the stages' ``results.jsonl``. Imports neither torch nor exl."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_run.worker import read_records

if TYPE_CHECKING:
    from benchmarks.gpu_run.runner import Run

MOST_FAILURES = 40  # at most, on the page; the JSON file has all
GOOD = ("passed", "skipped")


def collect(run: Run) -> dict:
    """Collects all results so far."""
    records, _ = read_records(run.out / "results.jsonl")
    stages = []
    for told in run.stages:
        mine = [record for record in records if record.get("stage") == told["name"]]
        ends = {record["item"]: record for record in mine if record.get("event") == "end"}
        open_items = [r["item"] for r in mine if r.get("event") == "begin" and r["item"] not in ends]
        stages.append(
            {
                **told,
                "counts": dict(Counter(record["outcome"] for record in ends.values())),
                "failures": [_short(record) for record in ends.values() if record["outcome"] not in GOOD],
                "begun and not ended": open_items,
                "notes": [record["text"] for record in mine if record.get("event") == "note"],
                "lines": [_line(record) for record in ends.values() if "section" in record or told["name"] == "smoke"],
            }
        )
    facts = {record["item"]: record["text"] for record in records if record.get("event") == "fact"}
    return {
        "title": run.title,
        "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.began_at)),
        "seconds": round(time.monotonic() - run.began, 1),
        "budget": run.seconds,
        "facts": facts,
        "stages": stages,
    }


def _short(record: dict) -> dict:
    kept = ("item", "outcome", "seconds", "text", "sticky")
    return {name: record[name] for name in kept if record.get(name) is not None}


def _line(record: dict) -> dict:
    kept = ("item", "outcome", "seconds", "text", "section", "head")
    return {name: record[name] for name in kept if record.get(name) is not None}


def markdown(told: dict) -> str:
    """The summary as one page of Markdown."""
    lines = [f"# {told['title']}", ""]
    lines += [f"{told['began']}, {told['seconds']:.0f} s of {told['budget']:.0f} s.", ""]
    lines += ["| stage | how it ended | s | of at most | items |", "| --- | --- | ---: | ---: | --- |"]
    for stage in told["stages"]:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(stage["counts"].items()))
        lines.append(
            f"| {stage['name']} | {stage['status']} | {stage['seconds']:.0f} | {stage['limit']:.0f} | {counts or '-'} |"
        )
    if told["facts"]:
        lines += ["", "## Facts", ""]
        lines += [f"- {name}: {_one(text)}" for name, text in told["facts"].items()]
    for stage in told["stages"]:
        lines += _stage_lines(stage)
    return "\n".join(lines) + "\n"


def _stage_lines(stage: dict) -> list[str]:
    lines: list[str] = []
    if stage["name"] == "smoke":
        lines += [f"- {line['outcome']}: {line['item']}: {_one(line.get('text', ''))}" for line in stage["lines"]]
    else:
        lines += [f"- {_failure(failure)}" for failure in stage["failures"][:MOST_FAILURES]]
        if len(stage["failures"]) > MOST_FAILURES:
            lines.append(f"- {len(stage['failures']) - MOST_FAILURES} more are in summary.json")
    lines += [f"- begun and not ended: {item}" for item in stage["begun and not ended"][:8]]
    lines += [f"- note: {_one(note)}" for note in stage["notes"][:8]]
    if stage.get("log"):
        lines += ["", "The end of its output:", "", "```", *stage["log"].strip().splitlines()[-12:], "```"]
    if stage["name"] != "smoke":
        lines += _report_lines(stage["lines"])
    return ["", f"## {stage['name']}: {stage['status']}", "", *lines] if lines else []


def _report_lines(measured: list[dict]) -> list[str]:
    """Lines by section, each with its table's head, in the order of the first measurement."""
    lines, sections = [], dict.fromkeys(line["section"] for line in measured if line["outcome"] == "passed")
    for section in sections:
        mine = [line for line in measured if line["section"] == section and line["outcome"] == "passed"]
        lines += ["", f"### {section}", "", *mine[0].get("head", ()), *(line["text"] for line in mine)]
    return lines


def _failure(failure: dict) -> str:
    sticky = " (the worker left: its context was lost)" if "sticky" in failure else ""
    return f"{failure['outcome']}: `{failure['item']}`{sticky}: {_last(failure.get('text', ''))}"


def _one(text: str, most: int = 400) -> str:
    return " ".join(text.split())[:most]


def _last(text: str) -> str:
    """The most informative line of a failure: pytest's last error line, otherwise the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return _one((errors or lines or [""])[0 if errors else -1], 240)


def write_summary(run: Run) -> None:
    told = collect(run)
    _replace(run.out / "summary.json", json.dumps(told, indent=1) + "\n")
    _replace(run.out / "summary.md", markdown(told))


def _replace(path: Path, text: str) -> None:
    """Writes the file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
