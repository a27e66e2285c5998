"""Tokens a second of clients that stream from a server, over those of the same requests to the bare engine."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.client import Address, stream
from benchmarks.serving.process import server_process
from exl.load_test import prompt_ids

SHORT_PROMPT = 8


@dataclass(frozen=True)
class Subject:
    name: str
    model: Path
    vocab_size: int
    num_tokens: int


def prompts_of(subject: Subject, num_clients: int) -> list[list[int]]:
    return [prompt_ids(SHORT_PROMPT, i, subject.vocab_size) for i in range(num_clients)]


async def served_round(address: Address, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """Tokens a second of all, from the first connection to the end of the last stream."""
    body: dict[str, Any] = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, "reuse_prefix": False}
    began = time.perf_counter()
    answers = await asyncio.gather(*(stream(address, {**body, "prompt": prompt}) for prompt in prompts))
    seconds = time.perf_counter() - began
    for answer in answers:
        if answer.usage is None or answer.usage["completion_tokens"] != num_tokens:
            raise RuntimeError(f"an answer of {num_tokens} tokens was expected, found {answer}")
    return len(prompts) * num_tokens / seconds


@contextmanager
def bare_engine(model: Path, options: Mapping[str, object]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.serving.bare_child", str(model), json.dumps(options)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        yield child
    finally:
        child.stdin.close()
        child.wait()


def bare_round(child: subprocess.Popen[str], prompts: Sequence[list[int]], num_tokens: int) -> float:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
    child.stdin.flush()
    return float(json.loads(child.stdout.readline())["tokens_per_second"])


def overhead_row(subject: Subject, num_clients: int, rounds: int) -> dict[str, Any]:
    """Bare engine and server are both loaded, and take turns."""
    context = 64 * -(-(SHORT_PROMPT + subject.num_tokens) // 64)
    options = {"context": context, "max_sequences": num_clients, "cache_tokens": num_clients * context}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    prompts = prompts_of(subject, num_clients)
    bare: list[float] = []
    served: list[float] = []
    with bare_engine(subject.model, options) as child, server_process(subject.model, arguments) as server:
        for i in range(rounds + 1):
            found = (
                bare_round(child, prompts, subject.num_tokens),
                asyncio.run(served_round(server.address, prompts, subject.num_tokens)),
            )
            if i > 0:  # the first does not count
                bare.append(found[0])
                served.append(found[1])
    ratios = [after / before for before, after in zip(bare, served, strict=True)]
    return {
        "model": subject.name,
        "clients": num_clients,
        "bare_tokens_per_second": round(statistics.median(bare), 1),
        "served_tokens_per_second": round(statistics.median(served), 1),
        "served_over_bare": round(statistics.median(ratios), 4),
        "rounds": [round(ratio, 4) for ratio in ratios],
    }
