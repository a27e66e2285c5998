"""What is measured, and what comes out: a case, its runs by both programs, and the file that keeps them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LONG_PROMPT = 1024  # from here on a prompt is measured once a turn: it takes long enough


@dataclass(frozen=True)
class Case:
    """One test of llama-bench. "prefill": ``tokens`` of a prompt at once; "decode": one by one, after ``depth``."""

    kind: str
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.tokens:,}"
        return "decode" if not self.depth else f"decode at depth {self.depth:,}"

    @property
    def context(self) -> int:
        """Tokens in the cache at the end, and some to spare."""
        return self.depth + self.tokens + 8

    def repeats(self, most: int) -> int:
        return 1 if self.kind == "prefill" and self.tokens >= LONG_PROMPT else most


@dataclass(frozen=True)
class Row:
    """A case beside so many busy processes: tokens per second of each run, of all rounds."""

    model: str
    case: Case
    busy: int
    exl: tuple[float, ...] = ()
    llama_cpp: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """exl's median by llama.cpp's."""
        return statistics.median(self.exl) / statistics.median(self.llama_cpp)

    def with_runs(self, exl: Iterable[float], llama_cpp: Iterable[float]) -> Row:
        return Row(self.model, self.case, self.busy, (*self.exl, *exl), (*self.llama_cpp, *llama_cpp))


@dataclass(frozen=True)
class Comparison:
    """``models``: what each is for exl and for llama.cpp, in words. ``facts``: machine, versions, settings by name."""

    facts: dict[str, str]
    models: dict[str, str]
    rows: tuple[Row, ...]


def write(comparison: Comparison, path: Path) -> None:
    rows = []
    for row in comparison.rows:
        told = {"model": row.model, "test": row.case.name, **asdict(row.case), "busy_processes": row.busy}
        told["exl"], told["llama_cpp"] = _summary(row.exl), _summary(row.llama_cpp)
        rows.append({**told, "ratio": round(row.ratio, 3)})
    found = {"facts": comparison.facts, "models": comparison.models, "tokens_per_second": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Comparison:
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Row(
            row["model"],
            Case(row["kind"], row["tokens"], row["depth"]),
            row["busy_processes"],
            tuple(row["exl"]["runs"]),
            tuple(row["llama_cpp"]["runs"]),
        )
        for row in found["tokens_per_second"]
    ]
    return Comparison(found["facts"], found["models"], tuple(rows))


def _summary(runs: Sequence[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(runs), 3),
        "least": round(min(runs), 3),
        "most": round(max(runs), 3),
        "runs": list(runs),
    }
