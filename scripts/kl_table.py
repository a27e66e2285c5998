"""The table of losses and divergences in docs/formats.md: SmolLM2-135M-Instruct and stories2M at 8 to 2 bits.

    python -m scripts.kl_table FOLDER

Quantizes each model into FOLDER, by the recipe of `make chat` but for bits and text, and measures it against the
dense model, as `exl eval --against` does. 3.5 bits are the average of widths that are measured to be best. What FOLDER
has already is not made again, and an interrupted run goes on where it was. About half an hour on two idle cores for the
five of SmolLM2; stories2M takes a minute.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import exl
from exl.commands.common import WorkBar
from exl.evaluate import evaluate, read_documents
from exl.quantize.run import quantize
from scripts.chat_model import CHATS, RECIPE
from scripts.fetch_smollm2 import fetch

DATA = Path(__file__).parents[1] / "tests" / "data"
BITS, WINDOW = (8, 4, 3.5, 3, 2), 512
# Models compute in f32, with an f32 cache.
LOADING = {"context": WINDOW, "kv_cache": "f32", "arithmetic": "f32"}


@dataclass(frozen=True)
class Subject:
    name: str
    dense: Path
    calibration: Path
    num_samples: int
    text: Path  # that the model has not seen in calibration


def subjects() -> list[Subject]:
    chats, stories = DATA / "chats-valid.jsonl", DATA / "tinystories-valid-30k.txt"
    calibration = DATA / "calibration" / "stories2M.txt"
    return [
        Subject("SmolLM2-135M-Instruct", fetch(), CHATS, RECIPE.num_samples, chats),
        Subject("stories2M", DATA / "stories2M", calibration, 128, stories),
    ]


def make(subject: Subject, bits: float, folder: Path) -> Path:
    """The quantized model's folder, made if it is not there."""
    made = folder / f"{subject.name}-{bits}bit"
    if not (made / "config.json").is_file():
        width = {"bits": bits} if isinstance(bits, int) else {"bits": None, "target_bits": bits}
        options = replace(RECIPE, **width, calibration=subject.calibration, num_samples=subject.num_samples)
        with WorkBar(made.name) as bar:
            quantize(subject.dense, made, options, bar.update)
    return made


def row(subject: Subject, bits: float, folder: Path, dense: exl.LLM) -> str:
    with exl.load(make(subject, bits, folder), **LOADING) as llm:
        found = evaluate(llm, read_documents(subject.text, llm.tokenizer, window=WINDOW), dense)
    other = found.against
    cells = [bits, f"{found.loss:.4f}", f"{other.kl_mean:.4f}", f"{other.kl_99th:.3f}", f"{other.top1_agreement:.1%}"]
    return f"| {subject.name} | " + " | ".join(map(str, cells)) + " |"


def dense_row(subject: Subject, dense: exl.LLM) -> str:
    found = evaluate(dense, read_documents(subject.text, dense.tokenizer, window=WINDOW))
    return f"| {subject.name} | dense | {found.loss:.4f} | | | |"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.kl_table FOLDER")
    folder = Path(sys.argv[1])
    print("| model | bits | loss | KL | KL, 99th percentile | same top-1 token |")
    print("| --- " * 6 + "|")
    for subject in subjects():
        with exl.load(subject.dense, **LOADING) as dense:
            print(dense_row(subject, dense), flush=True)
            for bits in BITS:
                print(row(subject, bits, folder, dense), flush=True)


if __name__ == "__main__":
    main()
