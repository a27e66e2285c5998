"""Scores of continuations against transformers' log-probabilities in float64, whatever the cache has of the context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import exl
from exl.engine.build import load_engine
from exl.errors import ConfigError
from exl.planning.options import EngineOptions
from exl.scoring import submit_score
from tests.model.cpu_targets import with_both
from tests.model.cuda_engines import some_ids
from tests.model.hf_models import CASES, build, prefill_logits, save

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
TOLERANCE = 2e-4  # as for logits in test_against_transformers.py
STORY = "Once upon a time there was a little dog who lived in a big house. He liked to run and play with his ball. "


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float64).eval()


@pytest.fixture
def load():
    models = []

    def loaded(**options) -> exl.LLM:
        models.append(exl.load(STORIES, device="cpu", kv_cache="f32", progress=False, **options))
        return models[-1]

    yield loaded
    for model in models:
        model.close()


@torch.no_grad()
def expected(reference, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    ids = torch.tensor([[*context, *continuation][:-1]])  # with "dynamic" RoPE the last token would change the others
    rows = torch.log_softmax(prefill_logits(reference, ids[0].tolist()).double(), 1)[len(context) - 1 :]
    values = [float(row[token_id]) for row, token_id in zip(rows, continuation, strict=True)]
    return values, rows.argmax(1).tolist() == continuation


def check(found, reference, context, continuation) -> None:
    values, is_greedy = expected(reference, context, continuation)
    assert found.logprobs == pytest.approx(values, abs=TOLERANCE)
    assert found.total == pytest.approx(sum(values), abs=TOLERANCE * len(values))
    assert found.is_greedy == is_greedy


def test_choices_after_one_context(load, reference):
    """Many at once, with the context computed once; each as it is alone, bit by bit."""
    llm = load(prefill_chunk=64, max_sequences=4)
    context = llm.encode(STORY * 3)
    greedy = list(llm.generate(context, 5, temperature=0).token_ids)
    ends = [
        greedy,
        *(llm.tokenizer.encode(text, bos=False) for text in ("One day, he", "The", "Mom and dad said")),
        [7],
    ]
    found = llm.score([(context, end) for end in ends])
    for score, end in zip(found, ends, strict=True):
        check(score, reference, context, end)
    assert [score.is_greedy for score in found[:3]] == [True, False, False]
    assert len(context) > 100
    assert min(score.num_reused_tokens for score in found[1:]) >= 64
    assert max(score.num_reused_tokens for score in found) < len(context)
    alone = load(prefill_chunk=64)
    for score, end in zip(found, ends, strict=True):
        (other,) = alone.score([(context, end)])
        assert other.logprobs == score.logprobs
    with load(prefill_chunk=64).submit_score(context, ends[1]) as handle:
        assert handle.result().logprobs == found[1].logprobs


@with_both
@pytest.mark.parametrize("name", ["llama-dynamic", "mistral", "qwen2-window", "qwen3"])
def test_families_and_windows(name, cpu, tmp_path):
    """Three continuations of one prompt, the second from what the first has left; each alone in an empty engine."""
    model = build(next(case for case in CASES if case.name == name))
    folder, ids = save(model, tmp_path), some_ids(100)
    options = EngineOptions(context=160, kv_cache="f32", prefill_chunk=32)
    engine = load_engine(folder, options, cpu=cpu)
    ends = [[5, 9, 11], [5], [7, 5, 9, 11, 13, 2, 3]]
    for end in ends:
        found = submit_score(engine.generator, ids, end, inline=True).result(60)
        check(found, model.double(), ids, end)
        fresh = load_engine(folder, options, cpu=cpu)
        assert submit_score(fresh.generator, ids, end, inline=True).result(60).logprobs == found.logprobs
        fresh.close()
    engine.close()


def test_the_rows_of_a_long_continuation_are_not_taken_from_the_cache(load, reference):
    """The cache has the whole text; all but the first token is scored all the same."""
    llm = load(context=256)
    ids = llm.encode(STORY * 3)
    (first,) = llm.score([(ids[:1], ids[1:])])
    (again,) = llm.score([(ids[:1], ids[1:])])
    (later,) = llm.score([(ids[:90], ids[90:])])
    check(first, reference, ids[:1], ids[1:])
    assert again.logprobs == first.logprobs
    assert again.num_reused_tokens == 0
    assert 64 <= later.num_reused_tokens <= 89  # the row of the last token before the first that is scored is wanted
    assert later.logprobs == first.logprobs[89:]


def test_a_full_context_and_one_token_more(load, reference):
    """The last token is only predicted: it takes no room."""
    llm = load(context=64)
    ids = llm.encode(STORY * 3)[:65]
    (found,) = llm.score([(ids[:60], ids[60:])])
    check(found, reference, ids[:60], ids[60:])
    with pytest.raises(ConfigError, match="found 65 tokens, the context holds 64"):
        llm.score([(ids[:60], [*ids[60:], 5])])


@pytest.mark.parametrize(
    ("context", "continuation", "words"),
    [
        ([], [5], "context: found no tokens"),
        ([5], [], "continuation: found no tokens"),
        ([5], [512], "found token id 512, expected an integer from 0 to 511"),
    ],
)
def test_bad_pairs(load, context, continuation, words):
    llm = load()
    for ask in (lambda: llm.score([(context, continuation)]), lambda: llm.submit_score(context, continuation)):
        with pytest.raises(ConfigError, match=words):
            ask()
