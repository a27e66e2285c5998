"""Writes random GPTQ checkpoints in the shapes of real models: speed and memory do not depend on the weights' values.

python -m benchmarks.synthetic tinyllama-1.1b path/to/folder
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from exl.checkpoint.writer import safetensors_header, write_safetensors
from exl.planning.shapes import SHAPES, ModelShape, TensorEntry

ROOT = Path(__file__).parents[1]


def write_model(
    folder: Path, shape: ModelShape, *, bits: int = 4, group_size: int = 128, seed: int = 0, tokenizer: Path
) -> None:
    """Writes a model with random codes, different in each layer; f16 embedding and head."""
    entries = shape.tensors(bits, group_size)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", entries, _random_data(entries, bits, seed))
    _write_config(folder, shape, bits, group_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def write_headers(
    folder: Path, shape: ModelShape, *, bits: int = 4, group_size: int = 128, num_shards: int = 1
) -> None:
    """Writes as much of the model as a plan reads: headers and index are real, the weights are a hole in the file."""
    entries = shape.tensors(bits, group_size)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(num_shards):
        shard = entries[i * len(entries) // num_shards : (i + 1) * len(entries) // num_shards]
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors" if num_shards > 1 else "model.safetensors"
        header, sizes = safetensors_header(shard)
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(sizes))
        weight_map |= {tensor: name for tensor, _, _ in shard}
    if num_shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _write_config(folder, shape, bits, group_size)


def _write_config(folder: Path, shape: ModelShape, bits: int, group_size: int) -> None:
    (folder / "config.json").write_text(json.dumps(shape.config(bits, group_size), indent=1))


def _random_data(entries: Sequence[TensorEntry], bits: int, seed: int) -> Iterator[bytes]:
    # Symmetric v1 zeros store 2^(bits-1) - 1 in every field.
    zero_word = sum((2 ** (bits - 1) - 1) << shift for shift in range(0, 32, bits)) & 0xFFFFFFFF
    for i, (name, _, shape) in enumerate(entries):
        rng = np.random.default_rng([seed, i])
        if name.endswith("qweight"):
            yield rng.bytes(4 * int(np.prod(shape)))
        elif name.endswith("qzeros"):
            yield np.full(shape, zero_word, np.uint32).tobytes()
        elif name.endswith("scales"):
            yield (rng.random(shape, np.float32) * 0.004 + 0.002).astype(np.float16).tobytes()
        elif "norm" in name:
            yield np.ones(shape, np.float16).tobytes()
        else:
            yield (rng.random(shape, np.float32) * 0.04 - 0.02).astype(np.float16).tobytes()


Measure = Callable[[Path, Path, int], list[str]]  # model, packed folder, rounds -> lines to print


def run_on_synthetic(module: str, doc: str | None, rounds: int, measure: Measure) -> None:
    """The command line of a benchmark: measures a random model, prints the lines and can write them to a file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, default=44, help="number of layers, instead of the shape's (default: 44)")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--folder", type=Path, help="where the model is written and deleted again (default: the temporary folder)"
    )
    parser.add_argument("--write", metavar="NAME", help="write the report to benchmarks/results/NAME.txt, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        model = Path(name) / "model"
        shape = replace(SHAPES[args.shape], num_layers=args.layers)
        write_model(model, shape, tokenizer=ROOT / "tests" / "data" / "stories260K")
        lines = [f"python -m {module} --shape {args.shape} --layers {args.layers} --rounds {args.rounds}"]
        lines += measure(model, Path(name) / "packed", args.rounds)
    print("\n".join(lines))
    if args.write:
        path = ROOT / "benchmarks" / "results" / f"{args.write}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    tokenizer = ROOT / "tests" / "data" / "stories260K"
    write_model(args.folder, SHAPES[args.shape], bits=args.bits, group_size=args.group_size, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
