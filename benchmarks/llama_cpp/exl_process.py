"""exl's side: loads a model through the public API and measures what standard input asks for.

    python -m benchmarks.llama_cpp.exl_process MODEL '{"threads": 2, "context": 512}'

One line of JSON in, one out: ``{"case": {...}, "repeats": 2}`` -> tokens per second of each repetition. The first line
out describes the loaded model. The figures are those of ``Completion``, so they contain what a user waits for: sampling
and text, which llama-bench's do not.
"""

from __future__ import annotations

import json
import sys

import exl
from benchmarks.llama_cpp.cases import Case

PROMPTS = 20  # tried for one that the model answers at full length


def measure(llm: exl.LLM, case: Case, repeats: int) -> list[float]:
    """Tokens per second of ``repeats`` runs, after one of the same kind that does not count."""
    if case.kind == "prefill":
        ids = token_ids(llm, case.tokens, 0)
        runs = [llm.generate(ids, max_tokens=1, temperature=0.0) for _ in range(1 + repeats)]
        return [case.tokens / run.prompt_seconds for run in runs[1:]]
    ids = answered_prompt(llm, case)
    runs = [decode(llm, ids, case) for _ in range(repeats)]
    return [run.tokens_per_second for run in runs]


def answered_prompt(llm: exl.LLM, case: Case) -> list[int]:
    """A prompt that fills the cache to ``case.depth``, whose answer does not end early. This is the warm-up, too: later
    requests find the prompt in the cache."""
    for i in range(PROMPTS):
        ids = token_ids(llm, case.depth + 1, i)
        if decode(llm, ids, case).num_tokens == case.tokens + 1:
            return ids
    raise RuntimeError(f"found no prompt of {case.depth + 1} tokens with an answer of {case.tokens + 1}")


def decode(llm: exl.LLM, ids: list[int], case: Case) -> exl.Completion:
    """The time of the first token is the prompt's."""
    return llm.generate(ids, max_tokens=case.tokens + 1, temperature=0.0, reuse_prefix=True)


def token_ids(llm: exl.LLM, count: int, start: int) -> list[int]:
    """Tokens without meaning, each different from its neighbours."""
    return [3 + (start + i) * 37 % (llm.config.vocab_size - 3) for i in range(count)]


def main() -> None:
    model, options = sys.argv[1], json.loads(sys.argv[2])
    with exl.load(model, device="cpu", progress=False, **options) as llm:
        print(json.dumps(repr(llm)), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(measure(llm, Case(**asked["case"]), asked["repeats"])), flush=True)


if __name__ == "__main__":
    main()
