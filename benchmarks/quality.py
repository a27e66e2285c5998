"""How far quantized models, cache types and llama.cpp's files are from a dense model, on the same tokens: one table.

    python -m benchmarks.quality SPEC.json [--work build/quality] [--llama build/llama] [--json NAME]

SPEC.json says what is compared with what; paths are relative to it, options are keywords of ``exl.load``:

    {"title": "stories2M",
     "reference": {"folder": "stories2M", "options": {"kv_cache": "f32", "arithmetic": "f32"}},
     "text": "valid.txt", "window": 512, "limit": 40, "overlap": true,
     "rows": [{"label": "4 bits", "folder": "stories2M-4bit", "options": {"kv_cache": "f32"}},
              {"label": "q8 cache", "folder": "stories2M", "options": {"kv_cache": "q8"}},
              {"label": "llama.cpp Q4_0", "quantize": "Q4_0"},
              {"label": "llama.cpp Q8_0, q8_0 cache", "quantize": "Q8_0", "llama_options": ["-ctk", "q8_0"]},
              {"label": "a file", "gguf": "model.gguf"}]}

The text is cut as ``exl.evaluate.read_chunks`` does; of chats in a ``.jsonl`` file, rendered by the model's template,
all tokens are joined and cut alike. With "overlap" the same windows follow once more, half a window later, so that what
the first only read is predicted, too: about twice the positions from a short text. The reference's predictions are
recorded once, in ``--work``, and an interrupted run goes on there. A row with "quantize" is the reference's weights,
written as GGUF in f32 and quantized by llama-quantize, as llama-perplexity reads it: it gets the reference's
predictions and the token ids in its own format, so that tokenizers and texts cannot differ. ``python -m
scripts.build_llama_bench --program llama-perplexity`` (and ``llama-quantize``) builds both in ``--llama``. llama.cpp
prints six decimals, and its format rounds log-probabilities to 1.2e-4 nats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import exl
from benchmarks.disk import machine
from benchmarks.llama_cpp import perplexity
from benchmarks.llama_cpp.dense_gguf import write_dense_gguf
from benchmarks.llama_cpp.programs import ProgramError
from benchmarks.report import RESULTS
from exl.errors import ConfigError, ExlError
from exl.evaluate import Passage, Recording, evaluate, read_chunks, record_predictions
from exl.evaluation.passages import WINDOW, cut_chunks
from exl.text.chats import read_chats
from exl.threads import thread_limit
from exl.user_text import read_text

ROOT = Path(__file__).resolve().parents[1]
_KINDS = ("folder", "quantize", "gguf")


@dataclass(frozen=True)
class Row:
    """One line of the table; exactly one of ``_KINDS`` says what is measured."""

    label: str
    folder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None  # a type of llama-quantize
    gguf: str | None = None
    llama_options: Sequence[str] = ()  # of llama-perplexity

    def __post_init__(self) -> None:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ConfigError(f"row {self.label!r}: found {given}, expected one of {', '.join(_KINDS)}")
        if (self.options and self.folder is None) or (self.llama_options and self.folder is not None):
            raise ConfigError(f"row {self.label!r}: found options of the other program")


@dataclass(frozen=True)
class Spec:
    title: str
    reference: Row
    text: str
    rows: tuple[Row, ...]
    window: int = WINDOW
    limit: int | None = None
    overlap: bool = False

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Raises ``ConfigError``."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            reference = Row("reference", **values.pop("reference"))
            return cls(reference=reference, rows=tuple(Row(**row) for row in values.pop("rows")), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Work:
    """Where files are: the spec's own folder, what is made, llama.cpp's programs."""

    spec: Spec
    base: Path
    folder: Path
    llama: Path

    def path(self, name: str) -> Path:
        return self.base / name

    def load(self, row: Row) -> exl.LLM:
        options = {"context": self.spec.window, "progress": False, **row.options}
        return exl.load(self.path(row.folder), **options)

    def program(self, name: str) -> Path:
        path = self.llama / name
        if not path.is_file():
            raise ConfigError(f"{path}: is not there: python -m scripts.build_llama_bench --program {name}")
        return path

    @property
    def recording(self) -> Path:
        return self.folder / f"{self.spec.title}.predictions"


def passages(spec: Spec, text: Path, llm: exl.LLM) -> list[Passage]:
    """The windows of ``text``. Raises ``ConfigError``."""
    if text.suffix != ".jsonl":
        found = read_chunks(text, llm.tokenizer, spec.window)
        ids = llm.tokenizer.encode(read_text(text, f"text: {text}").removesuffix("\n")) if spec.overlap else []
    else:
        ids = [token_id for chat in read_chats(text, llm.tokenizer, "text") for token_id in chat]
        found = cut_chunks(ids, llm.tokenizer.encode(""), spec.window)
    if spec.overlap:
        found += cut_chunks(ids[spec.window // 2 :], llm.tokenizer.encode(""), spec.window)
    return found[: spec.limit]


def record(work: Work) -> dict[str, float]:
    """The reference's predictions, if they are not there, and its loss."""
    with work.load(work.spec.reference) as llm:
        some = passages(work.spec, work.path(work.spec.text), llm)
        record_predictions(llm, some, work.recording)
        found = evaluate(llm, some)
    return {"loss": found.loss, "loss_error": found.loss_error, "tokens": found.num_tokens}


def measure(work: Work, row: Row) -> dict[str, float]:
    """The row's figures, by the names of ``Comparison``; and ``megabytes``, of the weights' files."""
    if row.folder is None:
        return _by_llama(work, row)
    folder = work.path(row.folder)
    with Recording(work.recording) as reference, work.load(row) as llm:
        found = evaluate(llm, reference.passages, reference)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"loss": found.loss, "loss_error": found.loss_error, "megabytes": size / 1e6} | vars(found.against)


def _by_llama(work: Work, row: Row) -> dict[str, float]:
    base = work.folder / f"{work.spec.title}.logits"
    with Recording(work.recording) as reference:
        perplexity.write_base(base, reference, work.spec.window)
        exact = np.concatenate([reference.losses(i) for i in range(len(reference.passages))])
        digest = reference.model["tensors"]
    model = _quantized(work, row.quantize, digest) if row.gguf is None else work.path(row.gguf)
    found = perplexity.measure(
        work.program("llama-perplexity"), model, base, work.spec.window, thread_limit(None), row.llama_options
    )
    return {**found, "loss_difference": found["loss"] - float(exact.mean()), "megabytes": model.stat().st_size / 1e6}


def _quantized(work: Work, kind: str, digest: str) -> Path:
    """The reference's weights as GGUF of a type; made if it is not there. ``digest``: of these weights, so that a file
    of others under the same title is not taken for theirs."""
    dense, made = (work.folder / f"{work.spec.title}-{digest[:12]}-{name}.gguf" for name in ("f32", kind))
    for path in (dense, made):
        if path.is_file():
            continue
        part = path.with_suffix(".part")
        if path == dense:
            write_dense_gguf(work.path(work.spec.reference.folder), part)
        else:
            command = [str(part) for part in (work.program("llama-quantize"), dense, part, kind)]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise ProgramError(f"llama-quantize {kind}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        part.rename(path)
    return made


def table(title: str, reference: Mapping[str, float], rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown. KL divergences in nats, of which percentiles over positions."""
    lines = [
        "| model | MB | loss | difference | KL | median | 99 % | 99.9 % | same top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {title}, the reference | | {reference['loss']:.4f} ± {reference['loss_error']:.4f} | | | | | | |",
    ]
    for label, row in rows.items():
        paired = row.get("loss_difference_error")  # llama-perplexity's own is not of the exact losses
        cells = [
            f"{row['megabytes']:.1f}",
            f"{row['loss']:.4f}",
            f"{row['loss_difference']:+.4f}" + (f" ± {paired:.4f}" if paired is not None else ""),
            f"{row['kl_mean']:.3g} ± {row['kl_error']:.1g}",
            *(f"{row[name]:.3g}" for name in ("kl_median", "kl_99th", "kl_99_9th")),
            f"{100 * row['top1_agreement']:.2f} %",
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="default: build/quality")
    parser.add_argument("--llama", type=Path, default=ROOT / "build" / "llama", help="default: build/llama")
    parser.add_argument("--json", metavar="NAME", help="write benchmarks/results/NAME.json and NAME.md, too")
    args = parser.parse_args(argv)
    try:
        spec = Spec.read(args.spec)
        work = Work(spec, args.spec.resolve().parent, args.work.resolve(), args.llama.resolve())
        work.folder.mkdir(parents=True, exist_ok=True)
        reference, rows = record(work), {}
        for row in spec.rows:
            rows[row.label] = measure(work, row)
            print(f"{row.label}: KL {rows[row.label]['kl_mean']:.6f}", file=sys.stderr, flush=True)
            if args.json:  # what is measured is kept, whatever the next row does
                found = {"machine": machine(), "title": spec.title, "reference": reference, "rows": rows}
                (RESULTS / f"{args.json}.json").write_text(json.dumps(found, indent=1) + "\n")
                (RESULTS / f"{args.json}.md").write_text(table(spec.title, reference, rows) + "\n")
    except (ExlError, ProgramError) as error:
        sys.exit(f"error: {error}")
    print(table(spec.title, reference, rows))


if __name__ == "__main__":
    main()
