"""What a request can ask for beside sampling, through the whole model: choices, drafts, constraints, banned strings,
caches in files. Each text is held against what the request gives without it, or against what it asks for."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import exl
from exl.engine.build import load_engine
from exl.engine.request import TokenRequest
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from exl.text.logprobs import TokenLogprob
from tests.host.backends import make_backend

DATA = Path(__file__).parents[1] / "data"
STORIES, SMALL = DATA / "stories2M", DATA / "stories260K"
WORDS = ("One day", "The dog", "Lily and Tom", "Once upon a time", "Her mom said", "He was", "In the park,", "Then")


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES, draft=SMALL, context=512, cache_tokens=2048, device="cpu") as model:
        yield model


def prompts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(count)]


# ---- choices


def test_choice_0_is_the_answer_of_n_1_and_the_others_are_requests_of_their_own(llm):
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 5}
    many = llm.generate("One day", n=4, **options)
    assert many.choices[0].text == many.text == llm.generate("One day", **options).text
    assert len({choice.text for choice in many.choices}) == 4
    for choice in many.choices:
        assert llm.generate("One day", **options | {"seed": choice.seed}).token_ids == choice.token_ids
    assert many.choices[1].num_reused_tokens == many.num_prompt_tokens  # the prompt was computed once


def test_best_of_ranks_by_the_mean_log_probability(llm):
    options = {"max_tokens": 20, "temperature": 1.2, "seed": 3}
    best = llm.generate("One day", n=2, best_of=6, **options)
    means = {}
    for choice in llm.generate("One day", n=6, top_logprobs=0, **options).choices:
        assert all(isinstance(found, TokenLogprob) for found in choice.logprobs)
        means[choice.text] = sum(found.logprob for found in choice.logprobs) / len(choice.logprobs)
    expected = sorted(means, key=means.get, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == expected
    assert best.mean_logprob == pytest.approx(means[best.text], rel=1e-12)
    assert best.logprobs is None
    with pytest.raises(exl.ConfigError, match="best_of: found 2, expected n, 3, or more"):
        llm.generate("One day", n=3, best_of=2)


# ---- drafts


@pytest.mark.parametrize("speculate", ["prompt", "draft"])
def test_drafts_change_no_text(llm, speculate):
    """100 prompts, greedy and seeded, with any number of drafts, eight in a batch."""
    rng = random.Random(speculate)
    drafted = accepted = 0
    for start in range(0, 100, 8):
        asked = [
            {"max_tokens": rng.randint(5, 40), "temperature": rng.choice([0.0, 0.0, 0.7, 1.2]), "seed": i}
            for i in range(8)
        ]
        some = prompts(8, start)
        plain = [llm.submit(prompt, speculate=False, **one) for prompt, one in zip(some, asked, strict=True)]
        expected = [handle.result(120) for handle in plain]
        guessed = [
            llm.submit(prompt, speculate=speculate, draft_tokens=rng.choice([None, 1, 2, 5, 7]), **one)
            for prompt, one in zip(some, asked, strict=True)
        ]
        found = [handle.result(120) for handle in guessed]
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
        drafted += sum(one.num_drafted for one in found)
        accepted += sum(one.num_accepted for one in found)
        assert all(one.num_drafted == 0 for one in expected)
    assert drafted > 60
    assert 0.02 * drafted < accepted < drafted


def test_drafts_go_along_with_penalties_stops_bans_and_log_probabilities(llm):
    options = {
        "max_tokens": 60,
        "repetition_penalty": 1.2,
        "stop": ["park"],
        "top_logprobs": 2,
        "banned_strings": ["mom"],
    }
    for seed, prompt in enumerate(prompts(8, 1)):
        plain, guessed = (
            llm.generate(prompt, speculate=which, temperature=0.6, seed=seed, draft_tokens=count, **options)
            for which, count in ((False, None), ("draft", 4))
        )
        assert guessed.text == plain.text
        assert guessed.logprobs == plain.logprobs
        assert guessed.stop_reason == plain.stop_reason


def test_what_cannot_guess_is_refused(llm, tmp_path):
    with exl.load(SMALL, device="cpu") as alone:
        with pytest.raises(exl.ConfigError, match="speculate: found 'draft', but the model was loaded without draft="):
            alone.generate("One", 3, speculate="draft")
        with pytest.raises(exl.ConfigError, match="draft_tokens: found 3 without speculate="):
            alone.generate("One", 3, draft_tokens=3)
        with pytest.raises(exl.ConfigError, match="speculate: found 'magic'"):
            alone.generate("One", 3, speculate="magic")
    with pytest.raises(exl.MemoryBudgetError, match=r"draft: .* needs .*, the budget is"):
        exl.load(STORIES, draft=SMALL, ram="20MB", device="cpu")


def test_the_draft_model_is_in_the_plan(llm):
    (line,) = [line for line in llm.plan.lines if line.purpose == "draft model"]
    assert line.num_bytes == exl.plan(SMALL, context=512, cache_tokens=2048, prefill_window=512).num_bytes


def test_a_draft_model_on_a_gpu(llm):
    """On the shim: the same text with drafts and without, greedy and seeded, of one request and of three."""
    options = EngineOptions(context=256, cache_tokens=1024, max_sequences=4, vram="2GB", draft=SMALL)
    engine = load_engine(STORIES, options, backend=make_backend("plain"))
    try:
        generator, prompts = engine.generator, [llm.encode(text) for text in ("Once upon a time", "The dog", "One day")]
        requests = [
            TokenRequest(ids, SamplingParams(max_tokens=12, temperature=0.7 * (i % 2), seed=i), reuse_prefix=False)
            for i, ids in enumerate(prompts)
        ]
        plain = [generator.submit(one, inline=True).result()[0].token_ids for one in requests]
        drafted = [replace(one, speculate="draft", draft_tokens=4) for one in requests]
        alone = [generator.submit(one, inline=True).result()[0] for one in drafted]
        together = [handle.result()[0] for handle in [generator.submit(one, inline=True) for one in drafted]]
        for found in (alone, together):
            assert [answer.token_ids for answer in found] == plain
            assert 0 < sum(answer.num_accepted for answer in found) < sum(answer.num_drafted for answer in found)
    finally:
        engine.close()


# ---- constraints


def test_200_random_schemas_at_a_high_temperature(llm):
    """All of them in batches; every text that the grammar has ended is JSON of its schema."""
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    from tests.unit.engine.json_schemas import document

    schemas = [document(random.Random(seed)) for seed in range(200)]
    handles = [
        llm.submit("", json_schema=schema, temperature=1.5, seed=i, max_tokens=250) for i, schema in enumerate(schemas)
    ]
    num_finished = 0
    for schema, handle in zip(schemas, handles, strict=True):
        done = handle.result(300)
        assert done.finish_reason in ("stop", "length")
        if done.finish_reason == "stop":
            num_finished += 1
            jsonschema.validate(
                json.loads(done.text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
    # A number without bounds goes on at this temperature; how many do depends on the processor's rounding: 114 to 123.
    assert num_finished >= 80


def test_constraints_end_a_text_and_say_why(llm):
    pytest.importorskip("llguidance")
    done = llm.generate("Her name was", 40, regex=r" [A-Z][a-z]{2,8}\.", temperature=1.0, seed=1)
    assert re.fullmatch(r" [A-Z][a-z]{2,8}\.", done.text)
    assert (done.finish_reason, done.stop_reason) == ("stop", "grammar")
    assert llm.generate("It was", 20, choices=[" red", " blue"]).text in (" red", " blue")
    cut = llm.generate("One", 3, json_schema=True, temperature=1.0, seed=1)
    assert (cut.finish_reason, cut.limit) == ("length", "max_tokens")
    later = llm.generate("One day", 200, regex=r" [0-9]{3}!", after=".", temperature=0.0)
    assert re.search(r"\. [0-9]{3}!$", later.text)
    for options in ({"regex": "("}, {"grammar": "start: nowhere"}, {"json_schema": {"type": "animal"}}):
        (name,) = options
        with pytest.raises(exl.ConfigError, match=name):
            llm.generate("One day", 5, **options)


def test_a_constraint_with_drafts_gives_the_same_text(llm):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}, "required": ["a"]}
    for seed in range(5):
        options = {"json_schema": schema, "temperature": 1.0, "seed": seed, "max_tokens": 200}
        plain = llm.generate("One day", speculate=False, **options)
        assert llm.generate("One day", speculate="draft", draft_tokens=5, **options).token_ids == plain.token_ids


# ---- banned strings


def test_banned_strings_do_not_occur_and_streams_never_take_text_back(llm):
    banned = [" the", "mom", "a b"]
    for seed in range(6):
        options = {"max_tokens": 60, "temperature": 0.9, "seed": seed}
        plain = llm.generate("One day", **options)
        stream = llm.stream("One day", banned_strings=banned, **options)
        text = "".join(stream)
        assert text == stream.completion.text
        assert not any(word in text for word in banned)
        assert text == llm.tokenizer.decode([*llm.encode("One day"), *stream.completion.token_ids])[len("One day") :]
        ban = min((plain.text.find(word) for word in banned if word in plain.text), default=None)
        assert ban is None or text != plain.text


# ---- caches in files


def test_a_cache_comes_back_from_its_file_with_the_same_bits(llm, tmp_path):
    prompt = " ".join(WORDS * 6)
    options = {"max_tokens": 30, "temperature": 0.8, "seed": 4, "top_logprobs": 1}
    with exl.load(SMALL, context=512, device="cpu") as first:
        cold = first.generate(prompt, **options)
        assert first.save_cache(tmp_path / "cache") >= cold.num_prompt_tokens
    with exl.load(SMALL, context=512, device="cpu") as second:
        assert second.load_cache(tmp_path / "cache") >= cold.num_prompt_tokens
        warm = second.generate(prompt, **options)
        assert warm.num_reused_tokens == cold.num_prompt_tokens - 1
        assert (warm.text, warm.logprobs) == (cold.text, cold.logprobs)
    for other in ({"kv_cache": "q8"}, {"prefill_chunk": 64}, {"arithmetic": "int8"}):
        with exl.load(SMALL, context=512, device="cpu", **other) as third:
            with pytest.raises(exl.ConfigError, match="was saved for something else"):
                third.load_cache(tmp_path / "cache")
            assert third.generate("One", 3).num_reused_tokens == 0
    with pytest.raises(exl.ConfigError, match=r"was saved for something else: .*'tensors'"):
        llm.load_cache(tmp_path / "cache")
