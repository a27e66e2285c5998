"""The engine without a server, in a process of its own: for each line on standard input one round, told as JSON."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import exl
from exl.llm import LLM


def one_round(llm: LLM, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Tokens a second of all requests, from the first submission to the end of the last."""
    began = time.perf_counter()
    with ExitStack() as stack:
        handles = [
            stack.enter_context(
                llm.submit(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True, reuse_prefix=False)
            )
            for prompt in prompts
        ]
        num_generated = sum(handle.result().num_tokens for handle in handles)
    return {"tokens_per_second": num_generated / (time.perf_counter() - began)}


def main() -> None:
    options = json.loads(sys.argv[2])
    with exl.load(Path(sys.argv[1]), "cpu", progress=False, **options) as llm:
        print("{}", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(one_round(llm, asked["prompts"], asked["num_tokens"])), flush=True)


if __name__ == "__main__":
    main()
