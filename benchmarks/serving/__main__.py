"""A server's cost over the bare engine, and whether it holds under clients that come, leave and send rubbish.

    python -m benchmarks.serving [--parts overhead stress] [--seconds 300] [--clients 64] [--quick] [--write NAME]

- overhead: 16 clients stream from a server, and the same requests go to the bare engine, in turn, both in processes of
  their own; in the shapes of a Llama of 1.1B with random 4-bit weights, and with stories2M. The clients run on the same
  processors, in a process that does little more than to split lines.
- stress: 64 clients stream from stories2M for five minutes; a third of the streams are cut by their client at a random
  piece, a tenth of the requests are rubbish. Every whole stream must be the text that its request has alone, every cut
  one its beginning; pages, threads, open files and memory must come back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.disk import machine
from benchmarks.report import RESULTS
from benchmarks.serving.overhead import Subject, overhead_row
from benchmarks.serving.process import server_process
from benchmarks.serving.stress import Report, known_requests, run_stress
from benchmarks.synthetic import write_model
from exl.planning.shapes import SHAPES

DATA = Path(__file__).parents[2] / "tests" / "data"
STORIES = DATA / "tinystories-valid-30k.txt"
PARTS = ("overhead", "stress")
NUM_KNOWN = 200
CACHE_TOKENS = 64 * 512


def overhead(quick: bool) -> list[dict[str, Any]]:
    shape = replace(SHAPES["tinyllama-1.1b"], num_layers=2) if quick else SHAPES["tinyllama-1.1b"]
    rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as name:
        large = Path(name) / "model"
        write_model(large, shape, tokenizer=DATA / "stories260K")
        return [
            overhead_row(Subject("1.1B", large, 512, 8 if quick else 120), 16, rounds),
            overhead_row(Subject("stories2M", DATA / "stories2M", 512, 32 if quick else 400), 16, rounds),
        ]


def stress(seconds: float, num_clients: int) -> dict[str, Any]:
    texts = [text for text in STORIES.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]
    known = known_requests(DATA / "stories2M", NUM_KNOWN, 0, texts)
    options = ("--max-sequences", str(num_clients), "--cache-tokens", str(CACHE_TOKENS))
    with server_process(DATA / "stories2M", options) as server:
        report = asyncio.run(run_stress(server, known, num_clients, seconds, 0, _tell))
    for text in report.wrong[:10]:
        print(f"WRONG: {text}", file=sys.stderr)
    return {"clients": num_clients, **report.row()}


def _tell(report: Report) -> None:
    print(f"  {dict(report.counts)}, {len(report.wrong)} wrong", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="two layers of the large model, one round")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.json, too")
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    if "overhead" in args.parts:
        found["overhead"] = overhead(args.quick)
    if "stress" in args.parts:
        found["stress"] = stress(args.seconds, args.clients)
    text = json.dumps(found, indent=1)
    print(text)
    if args.write:
        (RESULTS / f"{args.write}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
