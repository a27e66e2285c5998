"""Beam search through the whole model: texts and scores are those of transformers, token for token; and in any company,
with pages short, a search gives what it gives alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import exl
from exl.engine.build import load_engine
from exl.engine.request import TokenRequest
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model import hf_models
from tests.model.cpu_targets import with_both
from tests.model.test_quantized import make

SMALL = Path(__file__).parents[1] / "data" / "stories260K"
CASES = {case.name: case for case in hf_models.CASES}


def found_by_transformers(model, ids, ends, count, num_beams, penalty, stopping, n=1) -> list[tuple[list[int], float]]:
    """Token ids without the end token, and the score."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=num_beams,
        num_return_sequences=n,
        length_penalty=penalty,
        early_stopping=stopping,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = []
    for row in out.sequences[:, len(ids) :].tolist():
        stop = next((i for i, token_id in enumerate(row) if token_id in ends), len(row))
        texts.append(row[:stop])
    return list(zip(texts, out.sequences_scores.tolist(), strict=True))


def search(ids, count, num_beams, penalty=1.0, stopping=False, **options) -> TokenRequest:
    params = SamplingParams(max_tokens=count, temperature=0.0, seed=0)
    options = {"num_choices": num_beams} | options
    return TokenRequest(ids, params, num_beams=num_beams, length_penalty=penalty, early_stopping=stopping, **options)


def told(handle) -> list[tuple]:
    return [(one.token_ids, one.beam_score, one.outcome, one.ranked) for one in handle.result(120)]


@with_both
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_texts_and_scores_are_those_of_transformers(name, cpu, tmp_path):
    model = hf_models.build(CASES[name], projection_scale=3.0)
    hf_models.save(model, tmp_path)
    engine = load_engine(tmp_path, EngineOptions(context=48, cache_tokens=1024, kv_cache="f32"), cpu=cpu)
    rng, num_ended, num_greedy = random.Random(name), 0, 0
    for i, (num_beams, penalty, stopping) in enumerate(
        [
            (2, 1.0, False),
            (3, 0.0, "never"),
            (5, 2.0, False),
            (5, -1.0, False),
            (3, 1.0, True),
            (2, 1.5, "never"),
            (5, 0.5, True),
            (3, 2.0, "never"),
        ]
    ):
        ids = [rng.randrange(3, 96) for _ in range((1, 2, 9, 17)[i % 4])]
        ((usual, _),) = found_by_transformers(model, ids, (), 16, num_beams, penalty, stopping)
        ends = tuple(sorted({usual[4], usual[7], usual[10]}))[: i % 4]  # so that texts come to them
        engine.generator.eos_ids = frozenset(ends)
        n = 1 + i % num_beams
        wanted = found_by_transformers(model, ids, ends, 16, num_beams, penalty, stopping, n)
        found = engine.generator.submit(search(ids, 16, num_beams, penalty, stopping, num_choices=n)).result(60)
        assert [one.token_ids for one in found] == [text for text, _ in wanted], (num_beams, penalty, stopping)
        assert [one.beam_score for one in found] == pytest.approx([score for _, score in wanted], rel=1e-3, abs=1e-4)
        for one in found:
            assert (one.outcome.finish_reason == "stop") == (one.outcome.stop_reason in ends)
            assert one.outcome.finish_reason == "stop" or len(one.token_ids) == 16
            num_ended += one.outcome.finish_reason == "stop"
        greedy = engine.generator.submit(replace(search(ids, 16, 2), num_beams=1, num_choices=1)).result(60)
        num_greedy += greedy[0].token_ids == found[0].token_ids
    assert num_ended >= 4
    assert num_greedy <= 4
    assert engine.generator.pool.num_free == engine.generator.pool.num_usable
    engine.close()


def test_a_trained_model_tells_what_transformers_tells():
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval()
    with exl.load(SMALL, device="cpu", kv_cache="f32") as llm:
        ends = tuple(llm.tokenizer.eos_ids)
        for prompt, num_beams, penalty in (("Once upon a time", 3, 1.0), ("Tom and his mom", 5, 0.5), ("The", 2, 2.0)):
            ids = llm.encode(prompt)
            wanted = found_by_transformers(model, ids, ends, 40, num_beams, penalty, False, 2)
            found = llm.generate(prompt, 40, num_beams=num_beams, length_penalty=penalty, n=2)
            assert [list(one.token_ids) for one in found.choices] == [text for text, _ in wanted]
            assert [one.beam_score for one in found.choices] == pytest.approx([score for _, score in wanted], rel=1e-4)
            assert found.text == found.choices[0].text
            assert list(llm.stream(prompt, 40, num_beams=num_beams, length_penalty=penalty)) == [found.text]


def test_the_score_is_the_sum_of_the_log_probabilities_that_are_told():
    with exl.load(SMALL, device="cpu", kv_cache="f32") as llm:
        found = llm.generate("One day", 12, num_beams=3, length_penalty=0.5, n=3, top_logprobs=2)
        for one in found.choices:
            assert one.finish_reason == "length"
            total = sum(told.logprob for told in one.logprobs)
            assert one.beam_score == pytest.approx(total / 12**0.5, rel=1e-9)
            assert [told.token_id for told in one.logprobs] == list(one.token_ids)
            assert all(len(told.alternatives) == 2 for told in one.logprobs)
        assert found.beam_score == max(one.beam_score for one in found.choices)


@with_both
def test_a_search_gets_the_same_in_any_company(cpu, tmp_path):
    hf_models.save(hf_models.build(hf_models.Case("long", "llama", {"max_position_embeddings": 256})), tmp_path)
    options = EngineOptions(context=256, cache_tokens=640, kv_cache="f32", prefill_chunk=32, max_sequences=8)
    engine = load_engine(tmp_path, options, cpu=cpu)
    engine.generator.eos_ids = frozenset({2, 3})
    rng = random.Random(1)
    shared = [rng.randrange(4, 96) for _ in range(90)]
    requests = []
    for i in range(9):
        ids = shared[: rng.choice([0, 40, 64, 65, 90])] + [rng.randrange(4, 96) for _ in range(rng.randint(1, 9))]
        count, seed = rng.randint(60, 120), {"temperature": 1.0, "seed": i}
        plain = TokenRequest(ids, SamplingParams(max_tokens=count, **seed), num_choices=2)
        guided = replace(plain, num_choices=1, guidance_scale=1.5)
        stopping = rng.choice([False, True, "never"])
        requests.append((search(ids, count, 2 + i % 2, 1.0, stopping, top_logprobs=1), plain, guided)[i % 3])
    handles = [engine.generator.submit(request) for request in requests]
    together = list(map(told, handles))
    assert engine.generator.scheduler.stats.preemptions > 0
    for request, found in zip(requests, together, strict=True):
        assert found == told(engine.generator.submit(replace(request, reuse_prefix=False)))
    assert engine.generator.pool.num_free == engine.generator.pool.num_usable
    engine.close()


@with_both
def test_a_paused_search_goes_on_where_its_window_has_left_the_prompt(cpu, tmp_path):
    """Its own thread drives, and pauses it again and again."""
    sizes = {"sliding_window": 20, "max_position_embeddings": 256}
    hf_models.save(hf_models.build(hf_models.Case("window", "mistral", sizes)), tmp_path)
    options = EngineOptions(context=256, cache_tokens=768, kv_cache="f32", prefill_chunk=32, max_sequences=4)
    engine = load_engine(tmp_path, options, cpu=cpu)
    engine.generator.eos_ids = frozenset({2})
    rng = random.Random(3)
    asked = search([rng.randrange(4, 96) for _ in range(126)], 60, 3, 2.0, "never", top_logprobs=0)
    alone = told(engine.generator.submit(asked, inline=True))
    handle, scheduler, paused = engine.generator.submit(asked, inline=True), engine.generator.scheduler, 0
    engine.generator.seat.apart(lambda: None)  # the request is taken from the inbox
    while not handle.is_complete:
        for _ in range(19):
            scheduler.step()
        for sequence in scheduler.running[:1]:
            scheduler.lineup.pause(sequence)
            paused += sequence.num_passed == 0 and sequence.old_cached > 140
    assert told(handle) == alone
    assert paused > 1
    engine.close()


def test_groups_on_a_gpus_kernels(tmp_path):
    """On the shim: a search and a guided text, in the order in which a GPU runs ahead."""
    make(tmp_path, 4, 32)
    options = EngineOptions(context=128, cache_tokens=512, device="auto", vram="2GB", max_sequences=8, prefill_chunk=32)
    engine = load_engine(tmp_path, options, backend=make_backend("plain"))
    rng = random.Random(2)
    prompts = [[rng.randrange(6, 96) for _ in range(length)] for length in (20, 17, 5)]
    plain = TokenRequest(prompts[2], SamplingParams(max_tokens=4, temperature=1.0, seed=1), top_logprobs=1)
    requests = [
        search(prompts[0], 4, 3, top_logprobs=1),
        replace(plain, prompt_ids=prompts[1], guidance_scale=1.5),
        plain,
    ]
    together = [told(handle) for handle in [engine.generator.submit(request) for request in requests]]
    assert together == [told(engine.generator.submit(replace(one, reuse_prefix=False))) for one in requests]
    unguided = engine.generator.submit(replace(requests[1], guidance_scale=1.0))
    assert told(unguided) != together[1]
    engine.generator.pool.check([])
    engine.close()


REFUSED = {
    "temperature": 0.7,
    "top_k": 5,
    "mirostat_tau": 5.0,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 1.0},
    "min_tokens": 3,
    "ignore_eos": True,
    "stop": "the",
    "banned_strings": "the",
    "best_of": 3,
    "speculate": "prompt",
    "guidance_scale": 0.0,
    "regex": "a+",
}


def test_what_does_not_go_along_is_refused():
    with exl.load(SMALL, device="cpu", context=128, cache_tokens=256, max_sequences=4) as llm:
        for name, value in REFUSED.items():
            with pytest.raises(exl.ConfigError, match=rf"{name}: found .* with num_beams="):
                llm.generate("One", 3, num_beams=2, **{name: value})
        for name, value in {"num_beams": 0, "length_penalty": "1", "early_stopping": "always"}.items():
            with pytest.raises(exl.ConfigError, match=rf"{name}: found .*, expected"):
                llm.generate("One", 3, **{"num_beams": 2, name: value})
        for name, value in {"length_penalty": 2.0, "early_stopping": True}.items():
            with pytest.raises(exl.ConfigError, match=rf"{name}: found {value} without num_beams="):
                llm.generate("One", 3, **{name: value})
        with pytest.raises(exl.ConfigError, match="n: found 3, expected num_beams, 2, or fewer"):
            llm.generate("One", 3, num_beams=2, n=3)
        with pytest.raises(exl.ConfigError, match=r"num_beams: runs 5 sequences together.*max_sequences=4"):
            llm.generate("One", 3, num_beams=5)
        with pytest.raises(exl.MemoryBudgetError, match=r"num_beams: 4 .* need 8 pages .*max_tokens=34 or fewer"):
            llm.generate([5] * 30, 90, num_beams=4)
        assert llm.generate([5] * 30, 34, num_beams=4, stop_token_ids=()).num_tokens == 34
