"""The tables of losses and divergences in docs/formats.md: SmolLM2-135M-Instruct and stories2M by exl's quantizer at 8,
4, 3.5, 3 and 2 bits, by llama.cpp's, by GPTQModel's, and with each type of cache, against the dense model.

    python -m scripts.kl_table FOLDER [--model stories2M] [--llama build/llama] [--gptqmodel PYTHON] [--json PREFIX]

Quantizes each model into FOLDER, by the recipe of `make chat` but for bits and text, writes the list of what is
compared, FOLDER/NAME.json, and measures it with ``benchmarks/quality.py``, which says what must be in ``--llama``.
PYTHON is that of a virtual environment with ``pip install gptqmodel``: GPTQModel gets the sequences that exl is
calibrated with, the same bits and groups; without PYTHON its rows are left out. What FOLDER has already is not made
again, and an interrupted run goes on where it was. ``--json``: benchmarks/results/PREFIX-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.quantizing import LOADING, WINDOW, run_child, write_token_ids
from exl.commands.common import WorkBar, say
from exl.quantize.run import quantize
from exl.threads import thread_limit
from scripts.chat_model import CHATS, RECIPE
from scripts.fetch_smollm2 import fetch

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
BITS = (8, 4, 3.5, 3, 2)
LLAMA_TYPES = ("Q8_0", "Q4_K_M", "Q4_0")
CACHES = ("f16", "q8", "k8v4", "q4")
LLAMA_CACHES = ("f16", "q8_0", "q4_0")
GPTQMODEL = {
    "GPTQModel, 4 bits": {},
    "GPTQModel, 4 bits, asymmetric": {"sym": False},
    "GPTQModel, 3 bits": {"bits": 3},
}
SMALL_GROUPS = 32  # llama.cpp's blocks
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    name: str
    dense: Path
    calibration: Path
    num_samples: int
    text: Path  # that the model has not seen in calibration


def subjects(name: str | None) -> list[Subject]:
    """All, or that of a name."""
    found = []
    if name in (None, "stories2M"):
        calibration = DATA / "calibration" / "stories2M.txt"
        stories = DATA / "tinystories-valid-30k.txt"
        found.append(Subject("stories2M", DATA / "stories2M", calibration, 128, stories))
    if name in (None, "SmolLM2-135M-Instruct"):
        chats = DATA / "chats-valid.jsonl"
        found.append(Subject("SmolLM2-135M-Instruct", fetch(), CHATS, RECIPE.num_samples, chats))
    return found


def make(subject: Subject, bits: float, folder: Path, **more: Any) -> Path:
    """The folder of the model by exl, made if it is not there. ``more``: of its options."""
    made = folder / "-".join([f"{subject.name}-{bits}bit", *(f"{name}={value}" for name, value in more.items())])
    if not (made / "config.json").is_file():
        width = {"bits": bits} if isinstance(bits, int) else {"bits": None, "target_bits": bits}
        texts = {"calibration": subject.calibration, "num_samples": subject.num_samples}
        options = replace(RECIPE, **texts, **width, **more)
        with WorkBar(made.name) as bar:
            quantize(subject.dense, made, options, bar.update)
    return made


def make_gptqmodel(subject: Subject, settings: dict[str, Any], folder: Path, python: str) -> Path:
    """The folder of the model by GPTQModel, made if it is not there, of the same sequences one by one."""
    made = folder / "-".join([subject.name, "gptqmodel", *(f"{name}={value}" for name, value in settings.items())])
    if not (made / "config.json").is_file():
        ids = folder / f"{subject.name}-ids.json"
        write_token_ids(subject.dense, ids, subject.calibration, subject.num_samples, RECIPE.seq_len)
        shared = {"bits": 4, "group_size": RECIPE.group_size, **settings}
        child = {"shared": shared, "exl": {}, "token_ids": str(ids), "batch_size": 1}
        part = made.with_name(f"{made.name}.part")  # a run that is stopped leaves no folder that looks whole
        took = run_child(python, "gptqmodel", subject.dense, part, child, thread_limit(None))
        part.rename(made)
        say(f"{made.name}: GPTQModel {took['version']}, {took['seconds']:.0f} s")
    return made


def by_exl(label: str, folder: Path, **options: Any) -> Row:
    return {"label": label, "folder": str(folder), "options": {**LOADING, **options}}


def by_llama(label: str, kind: str, cache: str = "f32", *options: str) -> Row:
    """``options``: more of llama-perplexity's."""
    return {"label": label, "quantize": kind, "llama_options": ["-ctk", cache, "-ctv", cache, *options]}


def rows(subject: Subject, folder: Path, gptqmodel: str | None) -> list[Row]:
    """What is compared, all of it made."""
    found = [by_exl(f"exl, {bits} bits", make(subject, bits, folder)) for bits in BITS]
    small = {"group_size": SMALL_GROUPS}
    found.insert(2, by_exl(f"exl, 4 bits, groups of {SMALL_GROUPS}", make(subject, 4, folder, **small)))
    # llama.cpp rounds activations, too.
    found += [
        by_exl(f"exl, {bits} bits, arithmetic int8", make(subject, bits, folder), arithmetic="int8")
        for bits in BITS[:2]
    ]
    if gptqmodel is not None:
        for label, settings in GPTQMODEL.items():
            found.append(by_exl(label, make_gptqmodel(subject, settings, folder, gptqmodel)))
    found += [by_llama(f"llama.cpp, {kind}", kind) for kind in LLAMA_TYPES]
    found += [by_exl(f"exl, {cache} cache", subject.dense, kv_cache=cache) for cache in CACHES]
    # llama.cpp quantizes the cache of v only with its flash attention.
    found += [by_llama(f"llama.cpp, {cache} cache", "F32", cache, "-fa", "on") for cache in LLAMA_CACHES]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--model", choices=["stories2M", "SmolLM2-135M-Instruct"], help="default: both")
    parser.add_argument("--llama", default=str(ROOT / "build" / "llama"), help="default: build/llama")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--json", metavar="PREFIX")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for subject in subjects(args.model):
        spec = {
            "title": subject.name,
            "reference": {"folder": str(subject.dense), "options": LOADING},
            "text": str(subject.text),
            "window": WINDOW,
            "overlap": True,
            "rows": rows(subject, folder, args.gptqmodel),
        }
        path = folder / f"{subject.name}.json"
        path.write_text(json.dumps(spec, indent=1) + "\n")
        named = ["--json", f"{args.json}-{subject.name.lower()}"] if args.json else []
        quality.main([str(path), "--work", str(folder / "work"), "--llama", args.llama, *named])


if __name__ == "__main__":
    main()
