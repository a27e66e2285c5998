"""Many requests at once on the CPU, and what they cost those that run already.

    python -m benchmarks.throughput [--parts batch gaps single ram drafts] [--base CHECKOUT] [--quick] [--write NAME]

Models: stories2M of the tests, and random 4-bit weights in the shapes of a Llama of 1.1B. All answers are greedy.

- batch: tokens a second of 1, 4, 16 and 64 requests, all drawing from their first tokens on; beside it the roof, which
  is what a step reads (weights once, each sequence's cache) at the rate of a plain read of as many bytes. Reading
  bounds few sequences, arithmetic many.
- gaps: time between two tokens of a running request while a prompt of 2,000 tokens arrives, as its reader sees it;
  beside it the times of the same prompt's chunks and of decode steps alone, in the same round.
- single: one stream of this checkout and of another one (``--base``) in turn, each in a process of its own; and of
  each the host's microseconds a token: the request's time less that in passes and draws.
- ram: half of the 1.1B model's layers are in RAM, the others are read from the disk in each step: 16 requests, and one.
- drafts: stories260K drafts for stories2M, and prompt lookup where a text is told again, each with drafts of a fixed
  length, of the length that the engine chooses, and without.

All cases of a part are measured in turn, round by round. The figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import exl
from benchmarks.disk import machine
from benchmarks.end_to_end import step_bytes_read
from benchmarks.processor import instruction_sets
from benchmarks.report import RESULTS
from benchmarks.speculation import PROMPT_WORDS, STORIES
from benchmarks.synthetic import write_model
from exl.batch import PAGE_SIZE
from exl.bench import read_bandwidth
from exl.completion import Completion
from exl.engine.build import Engine, load_engine
from exl.engine.generator import Generator
from exl.engine.request import TokenRequest
from exl.llm import LLM
from exl.load_test import percentile, prompt_ids
from exl.ops.cpu_target import cpu_target
from exl.planning.from_headers import open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.shapes import SHAPES
from exl.sampling_params import SamplingParams
from exl.threads import usable_processors

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
CHILD = Path(__file__).with_name("single_stream_child.py")
SHORT_PROMPT = 8
Row = dict[str, object]


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    rounds: int = 5
    single_runs: int = 20
    sequences: tuple[int, ...] = (1, 4, 16, 64)
    tokens: int = 128  # of an answer of stories2M
    large_tokens: int = 32  # of an answer of the 1.1B model
    layers: int = 22  # of the 1.1B model
    arriving: int = 2000  # tokens of the prompt that arrives
    chunks: tuple[int, ...] = (128, 512)
    ram_tokens: int = 8
    texts: int = 8
    text_tokens: int = 200


QUICK = Amounts(rounds=1, single_runs=3, sequences=(1, 4), tokens=16, large_tokens=4, layers=2, arriving=600)
QUICK = replace(QUICK, ram_tokens=2, texts=1, text_tokens=24)


@dataclass(frozen=True)
class Subjects:
    small: Path  # stories2M
    draft: Path  # stories260K
    large: Path  # in the shapes of 1.1B
    base: Path | None  # another checkout
    amounts: Amounts

    @property
    def models(self) -> tuple[tuple[str, Path, int], ...]:
        """Name, folder, tokens of an answer."""
        return ("stories2M", self.small, self.amounts.tokens), ("1.1B", self.large, self.amounts.large_tokens)


# ---- numbers


def spread(values: Sequence[float]) -> float:
    """Of the middle half of the values, in proportion to the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def milliseconds(values: Sequence[float]) -> Row:
    return {
        "p50_ms": round(1e3 * percentile(values, 50), 2),
        "p99_ms": round(1e3 * percentile(values, 99), 2),
        "max_ms": round(1e3 * max(values), 2),
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown; all rows have the keys of the first."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- requests


def whole_pages(num_tokens: int) -> int:
    """Tokens of the pages for so many: each sequence has its own."""
    return -(-num_tokens // PAGE_SIZE) * PAGE_SIZE


def request_of(engine: Engine, length: int, which: int, num_tokens: int) -> TokenRequest:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
    return TokenRequest(prompt_ids(length, which, engine.config.vocab_size), params, reuse_prefix=False)


@contextmanager
def engine_of(folder: Path, **options: object) -> Iterator[Engine]:
    """Its answers end at no token."""
    engine = load_engine(folder, EngineOptions(device="cpu", **options))
    try:
        engine.generator.eos_ids = frozenset()
        yield engine
    finally:
        engine.close()


def batch_speed(engine: Engine, num_sequences: int, num_tokens: int) -> float:
    """Tokens a second of so many requests, from the first token to the last."""
    with ExitStack() as stack:
        handles = [
            stack.enter_context(engine.generator.submit(request_of(engine, SHORT_PROMPT, i, num_tokens), inline=True))
            for i in range(num_sequences)
        ]
        answers = [answer for handle in handles for answer in handle.result()]
    seconds = max(answer.last for answer in answers) - min(answer.first for answer in answers)
    return sum(len(answer.token_ids) - 1 for answer in answers) / seconds


def batch_part(subjects: Subjects) -> list[Row]:
    amounts, rows = subjects.amounts, []
    most = max(amounts.sequences)
    for name, folder, num_tokens in subjects.models:
        room = SHORT_PROMPT + num_tokens
        context = whole_pages(room)
        with engine_of(folder, context=context, max_sequences=most, cache_tokens=most * context) as engine:
            speeds: dict[int, list[float]] = defaultdict(list)
            roofs: dict[int, list[float]] = defaultdict(list)
            for count in amounts.sequences:
                batch_speed(engine, count, 2 + num_tokens // 8)  # does not count
            for _ in range(amounts.rounds):
                for count in amounts.sequences:
                    speeds[count].append(batch_speed(engine, count, num_tokens))
                    num_bytes = step_bytes_read(engine, room - num_tokens // 2, count)
                    roofs[count].append(count * read_bandwidth("cpu", num_bytes) / num_bytes)
        one = statistics.median(speeds[amounts.sequences[0]])
        for count in amounts.sequences:
            speed, roof = statistics.median(speeds[count]), statistics.median(roofs[count])
            rows.append(
                {
                    "model": name,
                    "requests": count,
                    "tokens_per_second": round(speed, 1),
                    "times_one": round(speed / one, 2),
                    "roof": round(roof, 1),
                    "share_of_roof": round(speed / roof, 3),
                    "rounds": [round(value, 1) for value in speeds[count]],
                }
            )
    return rows


# ---- a prompt arrives


def gaps_while_arriving(generator: Generator, running: TokenRequest, arriving: TokenRequest) -> list[float]:
    """Seconds between two tokens, as the reader of ``running`` gets them, from the arrival until the other's first."""
    with generator.submit(running) as reading:
        for _ in range(8):
            reading.next_event()
        gaps, before = [], time.perf_counter()
        with generator.submit(arriving) as other:
            while other.answers[0].first == 0.0 and reading.next_event() is not None:
                now = time.perf_counter()
                gaps.append(now - before)
                before = now
            other.result()
        reading.cancel()
        reading.result()
    return gaps


def alone(generator: Generator, ids: Sequence[int], chunk: int, num_steps: int = 32) -> tuple[list[float], list[float]]:
    """Seconds of each chunk of a prompt, and of decode steps at a small depth."""

    def timed(new: Sequence[int]) -> float:
        began = time.perf_counter()
        generator.extend(sequence, new)
        return time.perf_counter() - began

    found: list[list[float]] = []
    for first, later in (([], [ids[i : i + chunk] for i in range(0, len(ids), chunk)]), (ids[:16], [[7]] * num_steps)):
        sequence = generator.begin(len(first) + sum(map(len, later)))
        try:
            if first:
                generator.extend(sequence, first)
            found.append([timed(new) for new in later])
        finally:
            generator.end(sequence)
    return found[0], found[1]


def gaps_part(subjects: Subjects) -> list[Row]:
    amounts, rows = subjects.amounts, []
    for chunk in amounts.chunks:
        options = {"context": amounts.arriving + 48, "cache_tokens": 2 * amounts.arriving + 512, "max_sequences": 4}
        with engine_of(subjects.large, prefill_chunk=chunk, **options) as engine:
            running = request_of(engine, SHORT_PROMPT, 0, amounts.arriving)
            arriving = request_of(engine, amounts.arriving, 1, 2)
            alone(engine.generator, arriving.prompt_ids, chunk)  # does not count
            found: dict[str, list[float]] = defaultdict(list)
            for _ in range(amounts.rounds):
                found["between tokens"] += gaps_while_arriving(engine.generator, running, arriving)
                chunks, steps = engine.generator.seat.apart(
                    lambda: alone(engine.generator, arriving.prompt_ids, chunk)  # noqa: B023, called at once
                )
                found["a chunk alone"] += chunks
                found["a step alone"] += steps
        rows += [
            {"prefill_chunk": chunk, "what": what, "number": len(values), **milliseconds(values)}
            for what, values in found.items()
        ]
    return rows


# ---- one stream, of two checkouts


class Stream:
    """A checkout's process with a model loaded. Between requests it waits for input, and computes nothing."""

    def __init__(self, checkout: Path, model: Path, options: Row) -> None:
        command = [sys.executable, "-c", CHILD.read_text(encoding="utf-8"), str(model), json.dumps(options)]
        self._process = subprocess.Popen(
            command,
            cwd=model,  # a folder without modules
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(str(self._answer()))
        if checkout.resolve() not in found.resolve().parents:
            self.close()
            raise SystemExit(f"--base: found exl in {found}, expected it in {checkout}")

    def run(self, prompt: Sequence[int], num_tokens: int) -> tuple[float, float]:
        """Seconds of a request; and of those, per token, outside passes and draws."""
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        seconds, device, count = self._answer()
        if count != num_tokens:
            raise SystemExit(f"a stream of {num_tokens} tokens: found {count}")
        return seconds, (seconds - device) / count

    def _answer(self) -> object:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a stream's process ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()  # its loop ends with its input
        self._process.wait()
        self._process.stdout.close()


def checkout_commit(checkout: Path) -> str:
    """The commit that is checked out there, shortened; "?" where git does not tell."""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "?"


def single_part(subjects: Subjects) -> list[Row]:
    rows = []
    checkouts = {"now": ROOT} | ({} if subjects.base is None else {"base": subjects.base})
    for name, model, num_tokens in subjects.models:
        context = -(-(SHORT_PROMPT + num_tokens) // 16) * 16
        prompt = prompt_ids(SHORT_PROMPT, 0, 500)
        runs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        with ExitStack() as stack:
            streams = {}
            for which, checkout in checkouts.items():
                streams[which] = Stream(checkout, model, {"device": "cpu", "context": context})
                stack.callback(streams[which].close)
                streams[which].run(prompt, num_tokens)  # does not count
            for i in range(subjects.amounts.single_runs):
                for which in sorted(streams, reverse=bool(i % 2)):
                    runs[which].append(streams[which].run(prompt, num_tokens))
        speeds = {which: [num_tokens / seconds for seconds, _ in found] for which, found in runs.items()}
        base = statistics.median(speeds["base" if "base" in speeds else "now"])
        for which, found in runs.items():
            speed = statistics.median(speeds[which])
            rows.append(
                {
                    "model": name,
                    "checkout": which,
                    "runs": len(found),
                    "tokens_per_second": round(speed, 1),
                    "of_base": round(speed / base, 4),
                    "spread": round(spread(speeds[which]), 4),
                    "host_us_a_token": round(1e6 * statistics.median(host for _, host in found), 1),
                }
            )
    return rows


# ---- half of the layers on the disk


def half_budget(folder: Path, options: Row) -> int:
    """The RAM that a plan with half of the layers in it takes."""
    with open_model(folder) as files:
        resident = files.config.num_layers // 2
        return plan_model(files, EngineOptions(resident_layers=resident, **options), cpu_target())[0].num_bytes


def ram_part(subjects: Subjects) -> list[Row]:
    amounts = subjects.amounts
    context = whole_pages(SHORT_PROMPT + amounts.ram_tokens)
    options = {"context": context, "max_sequences": 16, "cache_tokens": 16 * context}
    ram = half_budget(subjects.large, options)
    speeds: dict[int, list[float]] = defaultdict(list)
    with engine_of(subjects.large, ram=ram, packed_folder=subjects.large / "packed", **options) as engine:
        num_streamed = engine.plan.placement.num_streamed
        batch_speed(engine, 1, 2)  # the first reads also verify checksums
        for _ in range(amounts.rounds):
            for count in (1, 16):
                speeds[count].append(batch_speed(engine, count, amounts.ram_tokens))
    one = statistics.median(speeds[1])
    return [
        {
            "ram": ram,
            "layers_on_disk": num_streamed,
            "requests": count,
            "tokens_per_second": round(statistics.median(found), 2),
            "times_one": round(statistics.median(found) / one, 2),
            "rounds": [round(value, 2) for value in found],
        }
        for count, found in speeds.items()
    ]


# ---- drafts


def drafts_rows(llm: LLM, what: str, drafter: str, prompts: Sequence[str], amounts: Amounts) -> list[Row]:
    """Each way to draft, on the same prompts. The texts are the same."""
    ways: dict[str, Row] = {
        "none": {"speculate": False},
        "4": {"speculate": drafter, "draft_tokens": 4},
        "chosen": {"speculate": drafter},
    }
    made: dict[str, list[Completion]] = defaultdict(list)
    speeds: dict[str, list[float]] = defaultdict(list)
    for i in range(amounts.rounds + 1):
        for way, options in ways.items():
            found = [
                llm.generate(
                    prompt,
                    max_tokens=amounts.text_tokens,
                    temperature=0.0,
                    reuse_prefix=False,
                    ignore_eos=True,
                    **options,
                )
                for prompt in prompts
            ]
            if i > 0:  # the first round does not count
                made[way] = found
                speeds[way].append(sum(one.num_tokens - 1 for one in found) / sum(one.decode_seconds for one in found))
    plain = statistics.median(speeds["none"])
    return [
        {
            "what": what,
            "drafts": way,
            "tokens_per_second": round(statistics.median(speeds[way]), 1),
            "times_none": round(statistics.median(speeds[way]) / plain, 3),
            "accepted_a_step": round(accepted_a_step(found), 3),
            "accepted_of_drafted": round(
                sum(x.num_accepted for x in found) / max(1, sum(x.num_drafted for x in found)), 3
            ),
            "same_texts": [x.token_ids for x in found] == [x.token_ids for x in made["none"]],
        }
        for way, found in made.items()
    ]


def accepted_a_step(made: Sequence[Completion]) -> float:
    """A step gives one token more than it accepts."""
    num_accepted = sum(one.num_accepted for one in made)
    return num_accepted / max(1, sum(one.num_tokens for one in made) - num_accepted)


def drafts_part(subjects: Subjects) -> list[Row]:
    amounts = subjects.amounts
    stories = [story.split() for story in STORIES.read_text(encoding="utf-8").splitlines() if story.strip()]
    starts = [" ".join(words[:PROMPT_WORDS]) for words in stories[: amounts.texts]]
    again = [" ".join([*words[:100], *words[:PROMPT_WORDS]]) for words in stories if len(words) >= 100]
    with exl.load(subjects.small, device="cpu", draft=subjects.draft, context=512, progress=False) as llm:
        rows = drafts_rows(llm, "stories260K for stories2M", "draft", starts, amounts)
        return rows + drafts_rows(llm, "a story told again", "prompt", again[: amounts.texts], amounts)


PARTS: dict[str, Callable[[Subjects], list[Row]]] = {
    "batch": batch_part,
    "gaps": gaps_part,
    "single": single_part,
    "ram": ram_part,
    "drafts": drafts_part,
}


def measure(subjects: Subjects, parts: Sequence[str], path: Path | None) -> None:
    """Prints each part when it is known, and writes all that are known."""
    facts = {"machine": machine(), "instructions": instruction_sets(), "processors": usable_processors()}
    facts |= {} if subjects.base is None else {"base": checkout_commit(subjects.base)}
    found: dict[str, object] = {**facts, "amounts": vars(subjects.amounts), "parts": {}}
    print(", ".join(map(str, facts.values())))
    for part in parts:
        rows = PARTS[part](subjects)
        found["parts"][part] = rows
        print(f"\n{part}\n\n{table(rows)}", flush=True)
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="another checkout, for single")
    parser.add_argument("--quick", action="store_true", help="little of everything, and two layers of the large model")
    parser.add_argument(
        "--folder", type=Path, help="where the large model is written and deleted again (default: the temporary folder)"
    )
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.json, too")
    args = parser.parse_args()
    amounts = QUICK if args.quick else Amounts()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        large = Path(name) / "model"
        if set(args.parts) != {"drafts"}:
            shape = replace(SHAPES["tinyllama-1.1b"], num_layers=amounts.layers)
            write_model(large, shape, tokenizer=DATA / "stories260K")
        subjects = Subjects(DATA / "stories2M", DATA / "stories260K", large, args.base, amounts)
        measure(subjects, args.parts, RESULTS / f"{args.write}.json" if args.write else None)


if __name__ == "__main__":
    main()
