"""Quantizing SmolLM2-135M-Instruct to 4 bits: exl and GPTQModel in turn, on the same machine and the same tokens.

python -m benchmarks.quantizing --gptqmodel PYTHON [--layers 30] [--rounds 5] [--threads 2] [--write NAME]

PYTHON is that of a virtual environment with ``pip install gptqmodel``; without it exl is measured alone. Both get the
sequences that exl makes of 64 times 256 tokens of chats, groups of 64, the same damping; the rest is as each comes.
exl runs twice: aiming at each linear's own dense outputs, as GPTQModel does, and, its default, at the whole dense
model's, which runs two models side by side.

Losses are those of the last round's files, all run by exl in f32: of held-out chats, and the KL divergence from the
dense model. They are left out with fewer layers than the model has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import exl
from benchmarks.disk import machine
from benchmarks.processor import instruction_sets
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config_reader import read_json
from exl.checkpoint.writer import write_safetensors
from exl.evaluate import evaluate, read_documents
from exl.quantize.calibration import read_calibration
from exl.text.tokenizer import Tokenizer
from scripts.chat_model import CHATS
from scripts.fetch_smollm2 import fetch

ROOT = Path(__file__).parents[1]
CHILD = ROOT / "benchmarks" / "quantizing_child.py"
HELD_OUT = ROOT / "tests" / "data" / "chats-valid.jsonl"
NUM_SAMPLES, SEQ_LEN = 64, 256
WINDOW = 512
# Models compute in f32, with an f32 cache.
LOADING = {"context": WINDOW, "kv_cache": "f32", "arithmetic": "f32"}
SHARED = {"bits": 4, "group_size": 64}
TEXT = {"calibration": str(CHATS), "num_samples": NUM_SAMPLES, "seq_len": SEQ_LEN}
# What is measured: its name, the quantizer, and exl's options.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "exl, linear by linear": ("exl", {**TEXT, "match_dense": False}),
    "exl, as it comes": ("exl", TEXT),
    "GPTQModel, as it comes": ("gptqmodel", {}),
}


def cut(source: Path, folder: Path, num_layers: int) -> Path:
    """The model's first layers."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.json.index"))
    prefixes = tuple(f"model.layers.{i}." for i in range(num_layers))
    with Checkpoint.open(source) as checkpoint:
        kept = {
            name: info
            for name, info in checkpoint.tensors.items()
            if not name.startswith("model.layers.") or name.startswith(prefixes)
        }
        entries = [(name, info.dtype, info.shape) for name, info in kept.items()]
        write_safetensors(folder / "model.safetensors", entries, map(checkpoint.read, kept), {"format": "pt"})
    config = {**read_json(source / "config.json"), "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_token_ids(source: Path, path: Path, calibration: Path, num_samples: int, seq_len: int) -> list[int]:
    """The sequences that exl is calibrated with; their lengths."""
    sequences = read_calibration(calibration, Tokenizer.from_folder(source), num_samples, seq_len, "auto")
    path.write_text(json.dumps([ids.tolist() for ids in sequences]))
    return list(map(len, sequences))


def run_child(python: str, quantizer: str, source: Path, out: Path, settings: dict[str, Any], threads: int) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    # GPTQModel refuses to start with fewer than two workers, its own default on two processors.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": str(max(2, threads))}
    environment["PYTHONPATH"] = str(ROOT) if quantizer == "exl" else ""
    # From standard input: as a file, it would put this folder, whose modules have common names, on the child's path.
    command = [python, "-", quantizer, str(source), str(out), json.dumps(settings)]
    code = CHILD.read_text(encoding="utf-8")
    done = subprocess.run(command, env=environment, cwd=out.parent, input=code, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{quantizer} ended with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quality(out: Path, dense: exl.LLM) -> str:
    with exl.load(out, **LOADING) as llm:
        found = evaluate(llm, read_documents(HELD_OUT, llm.tokenizer, window=WINDOW), dense)
    return f"loss {found.loss:.4f}, KL {found.against.kl_mean:.4f}, same top-1 {found.against.top1_agreement:.1%}"


def measure(folder: Path, gptqmodel: str | None, num_layers: int | None, rounds: int, threads: int) -> list[str]:
    dense = fetch()
    source = dense if num_layers is None else cut(dense, folder / "dense", num_layers)
    lengths = write_token_ids(source, folder / "ids.json", CHATS, NUM_SAMPLES, SEQ_LEN)
    runs = {name: how for name, how in RUNS.items() if how[0] == "exl" or gptqmodel is not None}
    results: dict[str, list[dict]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (quantizer, options) in runs.items():
            settings = {"shared": SHARED, "exl": options, "token_ids": str(folder / "ids.json"), "batch_size": 8}
            python = sys.executable if quantizer == "exl" else gptqmodel
            results[name].append(run_child(python, quantizer, source, folder / name, settings, threads))
    lines = [f"{machine()}, {instruction_sets()}", f"{len(lengths)} sequences, {sum(lengths)} tokens"]
    median = {name: statistics.median(run["seconds"] for run in found) for name, found in results.items()}
    for name, found in results.items():
        seconds = [run["seconds"] for run in found]
        processor = statistics.median(run["processor_seconds"] for run in found)
        lines.append(
            f"{name:<24} {median[name]:7.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {processor:.1f} s of "
            f"processors; version {found[0]['version']}"
        )
    for name in [name for name in runs if gptqmodel is not None and runs[name][0] == "exl"]:
        lines.append(f"{name}: {median[name] / median['GPTQModel, as it comes']:.2f} of GPTQModel's time")
    if num_layers is None:
        with exl.load(dense, **LOADING) as llm:
            lines += [f"{name:<24} {quality(folder / name, llm)}" for name in runs]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--layers", type=int, help="only the first layers (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", metavar="NAME", help="write the report to benchmarks/results/NAME.txt, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), args.gptqmodel, args.layers, args.rounds, args.threads)
    print("\n".join(lines))
    if args.write:
        path = ROOT / "benchmarks" / "results" / f"{args.write}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
