"""What speculation would accept, offline: a model's own texts are replayed with each drafter, for every draft length.

python -m benchmarks.speculation [--target FOLDER] [--draft FOLDER] [--chat FOLDER] [--prompts 20] [--tokens 200]
                                 [--write NAME]

The target writes texts, greedily and under seeds. The logits of both models at every position of a text tell all that a
run with drafts would do: while drafts are kept, the draft model sees the text itself. Four ways to draft and accept:

- greedy drafts, kept if they are the token: as often as rejection sampling keeps them;
- drafts drawn with the token's own uniform number (coupled), kept if they are the token: what exl does;
- drafts drawn freely, kept by rejection sampling (Leviathan et al., 2023): given that the text has token x, a draft was
  kept with probability min(1, q(x) / p(x)), so the expected number of passes follows without any draw;
- prompt lookup, on the texts and on summaries, kept if they are the token.

Each line gives tokens per pass of the target for drafts of 1, 2, 4 and 7 tokens. Seeded rows are at temperature 1 and
0.7, without filters. Beside them stands what other random sources that two models may share would keep; expectations
follow without any draw, as those of rejection sampling do. Times are not measured here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import exl
from benchmarks.report import RESULTS
from exl.engine.prompt_lookup import PromptLookup
from exl.engine.speculation import accepted
from exl.llm import LLM
from exl.philox import uniform
from exl.text.vocabulary import check_same_vocabulary
from exl.user_cache import chat_model_folder

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
STORIES = DATA / "tinystories-valid-30k.txt"
LENGTHS = (1, 2, 4, 7)
TEMPERATURES = (0.0, 0.7, 1.0)
PROMPT_WORDS = 12
SUMMARIES = 16
F64 = NDArray[np.float64]


@dataclass(eq=False)
class Text:
    """A prompt and what the target made of it."""

    ids: list[int]
    num_prompt: int
    temperature: float
    seed: int
    target: F64 = field(repr=False)  # [T, V] logits after the tokens that each generated one follows
    draft: F64 | None = field(default=None, repr=False)

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]

    def drawn(self, logits: F64) -> NDArray[np.bool_]:
        """Where a model with these logits would draw the text's token."""
        found = [
            draw(row, self.temperature, uniform(self.seed, step) if self.temperature else 0.0)
            for step, row in enumerate(logits)
        ]
        return np.array(found) == np.array(self.new_ids)


def softmax(logits: F64, temperature: float) -> F64:
    x = logits / temperature
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def draw(logits: F64, temperature: float, u: float) -> int:
    """As ``exl.sampling``: tokens by descending probability, ties by lower id; the first whose sum exceeds ``u``."""
    if temperature == 0.0:
        return int(np.argmax(logits))
    p = softmax(logits, temperature)
    order = np.argsort(-p, kind="stable")
    sums = np.cumsum(p[order])
    return int(order[min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(order) - 1)])


def expected_passes(kept: F64, length: int) -> float:
    """Passes for a text whose i-th token is kept with probability ``kept[i]`` if it is drafted and all before it in
    its pass were. A pass drafts ``length`` tokens at most, and gives one more than were kept."""
    n = len(kept)
    passes = np.zeros(n + 1)
    for start in range(n - 1, -1, -1):
        reach, passes[start] = 1.0, 1.0
        for i in range(start, min(start + length, n - 1)):
            passes[start] += reach * (1.0 - kept[i]) * passes[i + 1]
            reach *= kept[i]
        passes[start] += reach * passes[min(start + length, n - 1) + 1]
    return float(passes[0])


@dataclass(eq=False)
class _Sequence:
    ids: list[int]
    num_prompt: int


def lookup_passes(text: Text, length: int) -> float:
    """Passes with prompt lookup, which is run as it is."""
    lookup, sequence = PromptLookup(), _Sequence(text.ids[: text.num_prompt], text.num_prompt)
    passes = 0
    while len(sequence.ids) < len(text.ids):
        rest = text.ids[len(sequence.ids) :]
        (drafts,) = lookup.propose([(sequence, min(length, len(rest) - 1))])
        sequence.ids += rest[: accepted(drafts, rest) + 1]
        passes += 1
    return float(passes)


def rejection_sampling(p: F64, q: F64) -> F64:
    """By token: how often it is the token and a draft, freely drawn, that rejection sampling keeps."""
    return np.minimum(p, q)


def likeliest_first(p: F64, q: F64) -> F64:
    """By token: how often one number draws it from both, as ``draw`` does."""
    return _overlap(p, q, np.argsort(-p, kind="stable"), np.argsort(-q, kind="stable"))


def by_id(p: F64, q: F64) -> F64:
    """The same, where tokens have their places in [0, 1) by id."""
    return _overlap(p, q, np.arange(len(p)), np.arange(len(q)))


def _overlap(p: F64, q: F64, order_p: NDArray[np.intp], order_q: NDArray[np.intp]) -> F64:
    end_p, end_q = np.empty_like(p), np.empty_like(q)
    end_p[order_p], end_q[order_q] = np.cumsum(p[order_p]), np.cumsum(q[order_q])
    return np.maximum(0.0, np.minimum(end_p, end_q) - np.maximum(end_p - p, end_q - q))


def gumbel(p: F64, q: F64) -> F64:
    """The same, where each token has a noise of its own, as in the Gumbel-max trick: two races with common exponential
    clocks are won by x with probability 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratios = np.maximum(p / p[:, None], q / q[:, None])
        return np.nan_to_num(1.0 / ratios.sum(axis=1))


COUPLINGS: dict[str, Callable[[F64, F64], F64]] = {
    "rejection sampling": rejection_sampling,
    "one number, likeliest first": likeliest_first,
    "one number, by id": by_id,
    "a noise for each token": gumbel,
}


def kept_by(coupling: Callable[[F64, F64], F64]) -> Callable[[Text], F64]:
    """By position of a text: the probability that a draft was kept there, given that the text has the token it has."""

    def kept(text: Text) -> F64:
        rows = zip(
            softmax(text.target, text.temperature), softmax(text.draft, text.temperature), text.new_ids, strict=True
        )
        return np.array([coupling(p, q)[token_id] / p[token_id] for p, q, token_id in rows])

    return kept


def greedy(text: Text) -> F64:
    return (text.draft.argmax(axis=1) == np.array(text.new_ids)).astype(np.float64)


def coupled(text: Text) -> F64:
    return text.drawn(text.draft).astype(np.float64)


def write_text(llm: LLM, prompt: Sequence[int], num_tokens: int, temperature: float, seed: int) -> Text:
    made = llm.generate(list(prompt), max_tokens=num_tokens, temperature=temperature, seed=seed)
    ids = [*prompt, *made.token_ids]
    return Text(ids, len(prompt), temperature, seed, logits_before(llm, ids, len(prompt)))


def logits_before(llm: LLM, ids: Sequence[int], num_prompt: int) -> F64:
    return llm.logits(ids)[num_prompt - 1 : len(ids) - 1].double().numpy()


def line(name: str, texts: Sequence[Text], passes: Callable[[Text, int], float]) -> str:
    tokens = sum(len(text.new_ids) for text in texts)
    rates = [tokens / sum(passes(text, length) for text in texts) for length in LENGTHS]
    return f"  {name:42s}" + "".join(f"{rate:7.2f}" for rate in rates)


def by_position(kept: Callable[[Text], F64]) -> Callable[[Text, int], float]:
    known: dict[Text, F64] = {}

    def passes(text: Text, length: int) -> float:
        if text not in known:
            known[text] = kept(text)
        return expected_passes(known[text], length)

    return passes


def draft_model_lines(target: LLM, draft: LLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[str]:
    lines = []
    for temperature in TEMPERATURES:
        texts = [write_text(target, prompt, num_tokens, temperature, seed) for seed, prompt in enumerate(prompts)]
        texts = [text for text in texts if text.new_ids]
        for text in texts:
            text.draft = logits_before(draft, text.ids, text.num_prompt)
        same = statistics.mean(float(text.drawn(text.target).mean()) for text in texts)
        number = sum(len(text.new_ids) for text in texts)
        lines.append(f"temperature {temperature:g}: {number} tokens; replayed draws that are the text's: {same:.4f}")
        lines.append(line("draft model, greedy drafts", texts, by_position(greedy)))
        if temperature > 0:
            lines.append(line("draft model, coupled drafts", texts, by_position(coupled)))
            lines += [line(f"expected: {name}", texts, by_position(kept_by(f))) for name, f in COUPLINGS.items()]
        lines.append(line("prompt lookup", texts, lookup_passes))
    return lines


def summary_lines(llm: LLM, stories: Sequence[str], num_tokens: int, *, chats: bool) -> list[str]:
    """A chat model is asked for summaries. A model that only tells stories gets a story's first hundred words, and its
    beginning again."""
    room = llm.context - num_tokens
    texts = []
    for seed, story in enumerate(stories):
        asked = f"Summarize this story in a few sentences, keeping its words:\n\n{story}"
        words = story.split()
        again = " ".join([*words[:100], *words[:PROMPT_WORDS]])
        prompt = llm.chat_prompt([{"role": "user", "content": asked}]) if chats else llm.encode(again)
        if len(prompt) <= room:
            texts.append(write_text(llm, prompt, num_tokens, 0.0, seed))
    texts = [text for text in texts if text.new_ids]
    if not texts:
        return [f"{llm.folder.name}: no story fits into its context of {llm.context} tokens"]
    what = "summaries" if chats else "stories told again"
    return [
        f"{llm.folder.name}, greedy, {len(texts)} {what}, {sum(len(text.new_ids) for text in texts)} tokens",
        line("prompt lookup", texts, lookup_passes),
    ]


def report(options: argparse.Namespace) -> list[str]:
    stories = [story for story in STORIES.read_text(encoding="utf-8").splitlines() if story.strip()]
    stories = list({story.casefold(): story for story in stories}.values())
    lines = [f"tokens per pass of the target{'for drafts of':>19s}" + "".join(f"{n:7d}" for n in LENGTHS)]
    with exl.load(options.target, device="cpu") as target, exl.load(options.draft, device="cpu") as draft:
        check_same_vocabulary(target.tokenizer, draft.tokenizer)
        sentences = [sentence.strip() for story in stories for sentence in story.split(". ")]
        starts = [" ".join(sentence.split()[:PROMPT_WORDS]) for sentence in sentences if len(sentence.split()) > 4]
        prompts = [target.encode(start) for start in starts[:: max(1, len(starts) // options.prompts)]]
        lines += draft_model_lines(target, draft, prompts[: options.prompts], options.tokens)
        if options.chat is None:
            lines += summary_lines(target, stories[:SUMMARIES], min(options.tokens, 100), chats=False)
    if options.chat is not None:
        with exl.load(options.chat, device="cpu") as chat:
            lines += summary_lines(chat, stories[:SUMMARIES], options.tokens, chats=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DATA / "stories2M")
    parser.add_argument("--draft", type=Path, default=DATA / "stories260K")
    parser.add_argument(
        "--chat", type=Path, default=chat_model_folder(), help="writes summaries (default: make chat-model's)"
    )
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200, help="of each text")
    parser.add_argument("--write", metavar="NAME", help="keeps the report in benchmarks/results/NAME.txt")
    options = parser.parse_args()
    text = "\n".join(report(options))
    print(text)
    if options.write is not None:
        (RESULTS / f"{options.write}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
