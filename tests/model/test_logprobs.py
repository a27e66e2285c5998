"""Log-probabilities of generated tokens against transformers, and results that they must not change."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

import exl
from exl.sampling import likeliest
from exl.text.logprobs import TokenLogprob

STORIES = Path(__file__).parents[1] / "data" / "stories260K"
TOLERANCE = 2e-4  # as for logits in test_against_transformers.py


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES, kv_cache="f32") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@torch.no_grad()
def expected_rows(reference, prompt_ids, token_ids) -> torch.Tensor:
    """transformers' log-softmax, f64 [tokens, V], before each of ``token_ids``."""
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    logits = reference(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        # Sampling options must not change the reported probabilities.
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4, "seed": 3},
    ],
    ids=["greedy", "sampled"],
)
def test_equal_to_transformers(llm, reference, options):
    prompt = llm.encode("Once upon a time there was a")
    done = llm.generate(prompt, 40, top_logprobs=5, **options)
    rows = expected_rows(reference, prompt, done.token_ids)
    assert len(done.logprobs) == done.num_tokens == 40
    for record, token_id, row in zip(done.logprobs, done.token_ids, rows, strict=True):
        assert record.token_id == token_id
        assert abs(record.logprob - float(row[token_id])) <= TOLERANCE
        assert record.probability == pytest.approx(math.exp(record.logprob))
        assert len(record.alternatives) == 5
        found = [other.logprob for other in record.alternatives]
        assert found == sorted(found, reverse=True)
        for other, value in zip(record.alternatives, row.topk(5).values.tolist(), strict=True):
            assert abs(other.logprob - value) <= TOLERANCE
            assert abs(other.logprob - float(row[other.token_id])) <= TOLERANCE
    likeliest_ids = tuple(record.alternatives[0].token_id for record in done.logprobs)
    assert (likeliest_ids == done.token_ids) == (options["temperature"] == 0)


def test_a_distribution(llm):
    vocab_size = llm.config.vocab_size
    (record,) = llm.generate("One day", 1, temperature=0, top_logprobs=vocab_size).logprobs
    assert sorted(other.token_id for other in record.alternatives) == list(range(vocab_size))
    assert math.fsum(other.probability for other in record.alternatives) == pytest.approx(1, abs=1e-12)


def test_nothing_else_changes(llm):
    asked = {"temperature": 0.9, "top_k": 40, "seed": 3, "max_tokens": 30, "repetition_penalty": 1.2}
    plain, told = llm.generate("One day", **asked), llm.generate("One day", top_logprobs=3, **asked)
    assert plain.logprobs is None
    assert (told.text, told.token_ids) == (plain.text, plain.token_ids)
    own = llm.generate("One day", top_logprobs=0, **asked).logprobs
    assert [record.logprob for record in own] == [record.logprob for record in told.logprobs]
    assert all(record.alternatives == () for record in own)


def test_the_stream_has_the_tokens_so_far(llm):
    stream = llm.stream("One day", 12, temperature=0, top_logprobs=2)
    lengths = [len(stream.logprobs) for _ in stream]
    assert lengths == sorted(lengths)
    assert 0 < lengths[0] < lengths[-1] <= 12
    assert stream.logprobs == stream.completion.logprobs
    plain = llm.stream("One day", 2)
    assert plain.logprobs is None
    plain.close()


def test_the_end_of_sequence_is_no_token_of_the_text(llm):
    done = llm.generate("The end.", max_tokens=500, temperature=1.0, seed=2, top_logprobs=1)
    assert done.finish_reason == "stop"
    assert len(done.logprobs) == done.num_tokens


def test_bytes_add_up_to_the_text(llm):
    done = llm.generate("One day", 20, temperature=0, top_logprobs=1)
    assert b"".join(record.token_bytes for record in done.logprobs).decode() == done.text


def test_text_of_tokens_that_are_no_characters(llm):
    vocab = range(llm.tokenizer.vocab_size)
    byte_id = next(i for i in vocab if llm.tokenizer.id_to_token(i) == "<0xC3>")
    record = TokenLogprob.of([(byte_id, -1.0), (1, -2.0), (llm.tokenizer.vocab_size + 5, -9.0)], llm.tokenizer)
    assert (record.token_bytes, record.text) == (b"\xc3", "\ufffd")
    assert [other.text for other in record.alternatives] == ["<s>", ""]
    assert repr(record) == f"TokenLogprob({byte_id}, '\ufffd', -1.000, 2 alternatives)"


def test_chats_and_lists(llm):
    chat = llm.chat()
    done = chat.send("Hello.", 4, temperature=0, top_logprobs=2)
    assert len(done.logprobs) == done.num_tokens
    stream = chat.stream_retry(4, temperature=0, top_logprobs=2)
    assert "".join(stream) == stream.completion.text
    assert stream.logprobs == stream.completion.logprobs
    assert [len(done.logprobs) for done in llm.generate(["One", "Two"], 3, top_logprobs=1)] == [3, 3]


@pytest.mark.parametrize("value", [-1, 1.5, True, "5", 513])
def test_bad_numbers(llm, value):
    with pytest.raises(exl.ConfigError, match=r"top_logprobs: found .*, expected None or an integer from 0 to 512"):
        llm.stream("One day", 5, top_logprobs=value)


def test_equals_come_by_rising_id_and_forbidden_tokens_not_at_all():
    row = torch.tensor([0.0, 2.0, -torch.inf, 2.0, 1.0, 2.0], dtype=torch.float64)
    assert [i for i, _ in likeliest(row, 2)] == [1, 3]
    assert [i for i, _ in likeliest(row, 6)] == [1, 3, 5, 4, 0]
    assert likeliest(row, 0) == []
