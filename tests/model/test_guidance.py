"""Classifier-free guidance through the whole model: greedy texts are those of transformers, token for token; and in any
company a guided request gets what it gets alone."""

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
from tests.model import hf_models
from tests.model.cpu_targets import with_both

SMALL = Path(__file__).parents[1] / "data" / "stories260K"
CASES = {case.name: case for case in hf_models.CASES}
SCALES = (0.0, 0.5, 1.5, 3.0)


def guided_by_transformers(model, ids: list[int], negative: list[int] | None, scale: float, count: int) -> list[int]:
    options = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        guidance_scale=scale,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out[0, len(ids) :].tolist()


def asked(ids: list[int], negative: list[int] | None, scale: float, count: int, **options) -> TokenRequest:
    params = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    params = SamplingParams(**{"max_tokens": count, "temperature": 0.0, "seed": 0, **params})
    return TokenRequest(ids, params, guidance_scale=scale, negative_ids=negative, **options)


@with_both
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "llama3"])
def test_greedy_texts_are_those_of_transformers(name, cpu, tmp_path):
    model = hf_models.build(CASES[name])
    hf_models.save(model, tmp_path)
    engine = load_engine(tmp_path, EngineOptions(context=48, cache_tokens=512, kv_cache="f32"), cpu=cpu)
    engine.generator.eos_ids = frozenset()
    rng, wanted, handles, unguided = random.Random(name), [], [], 0
    for i in range(8):
        ids = [rng.randrange(3, 96) for _ in range((1, 2, 9, 17, 24)[i % 5])]
        negative = None if i % 3 == 2 else [rng.randrange(3, 96) for _ in range(rng.randint(1, 20))]
        scale = SCALES[i % len(SCALES)]
        wanted.append(guided_by_transformers(model, ids, negative, scale, 20))
        unguided += wanted[-1] == guided_by_transformers(model, ids, None, 1.0, 20)
        handles.append(engine.generator.submit(asked(ids, negative, scale, 20)))
    assert [handle.result(60)[0].token_ids for handle in handles] == wanted  # all in one batch
    assert unguided <= 1
    engine.close()


def test_a_trained_model_tells_what_transformers_tells():
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval()
    with exl.load(SMALL, device="cpu", kv_cache="f32") as llm:
        ids, negative = llm.encode("Once upon a time, there was a big dog"), llm.encode("Tom was happy")
        for scale in SCALES:
            found = llm.generate(ids, 60, guidance_scale=scale, negative_prompt=negative, ignore_eos=True)
            assert list(found.token_ids) == guided_by_transformers(model, ids, negative, scale, 60)
        default = llm.generate(ids, 30, guidance_scale=2, ignore_eos=True)
        assert list(default.token_ids) == guided_by_transformers(model, ids, None, 2.0, 30)
        text = llm.generate(ids, 30, guidance_scale=1.5, negative_prompt="Tom was happy")
        assert text.text == llm.generate(ids, 30, guidance_scale=1.5, negative_prompt=negative).text
        assert llm.generate(ids, 30, guidance_scale=1.0).text == llm.generate(ids, 30).text


def test_log_probabilities_are_those_of_the_guided_distribution():
    with exl.load(SMALL, device="cpu", kv_cache="f32") as llm:
        ids, negative, scale = llm.encode("One day, a cat"), llm.encode("The"), 1.7
        found = llm.generate(ids, 12, guidance_scale=scale, negative_prompt=negative, top_logprobs=3)
        made = list(found.token_ids)
        text, other = llm.logits([*ids, *made]).double(), llm.logits([*negative, *made]).double()
        for i, told in enumerate(found.logprobs):
            c, n = text[len(ids) - 1 + i], other[len(negative) - 1 + i]
            expected = torch.log_softmax(n + scale * (c - n), dim=0)
            assert told.logprob == pytest.approx(float(expected[made[i]]), abs=2e-4)
            values, best = expected.topk(3)
            assert [one.token_id for one in told.alternatives] == best.tolist()
            assert [one.logprob for one in told.alternatives] == pytest.approx(values.tolist(), abs=2e-4)


@with_both
def test_a_guided_request_gets_the_same_in_any_company(cpu, tmp_path):
    """With pages short, and everything that a request can ask for besides."""
    hf_models.save(hf_models.build(hf_models.Case("long", "llama", {"max_position_embeddings": 256})), tmp_path)
    options = EngineOptions(context=256, cache_tokens=512, kv_cache="f32", prefill_chunk=32, max_sequences=8)
    engine = load_engine(tmp_path, options, cpu=cpu)
    engine.generator.eos_ids = frozenset({2})
    rng = random.Random(1)
    shared = [rng.randrange(4, 96) for _ in range(90)]
    requests = []
    for i in range(12):
        ids = shared[: rng.choice([0, 40, 64, 65, 90])] + [rng.randrange(4, 96) for _ in range(rng.randint(1, 9))]
        negative = rng.choice([None, shared[:33], [rng.randrange(4, 96) for _ in range(rng.randint(1, 70))]])
        more = {"temperature": rng.choice([0.0, 0.8, 1.3]), "seed": i, "repetition_penalty": rng.choice([1.0, 1.2])}
        requests.append(
            asked(ids, negative, (1.0, 1.5, 4.0)[i % 3], rng.randint(60, 150), top_logprobs=2, **more)
            if i % 3
            else TokenRequest(ids, SamplingParams(max_tokens=rng.randint(60, 150), **more), num_choices=2)
        )
    requests[4] = replace(requests[4], num_choices=3)
    handles = [engine.generator.submit(request) for request in requests]
    together = [[(one.token_ids, one.ranked) for one in handle.result(120)] for handle in handles]
    assert engine.generator.scheduler.stats.preemptions > 0
    for request, found in zip(requests, together, strict=True):
        alone = engine.generator.submit(replace(request, reuse_prefix=False)).result(120)
        assert found == [(one.token_ids, one.ranked) for one in alone]
    assert engine.generator.pool.num_free == engine.generator.pool.num_usable
    engine.close()


def test_what_cannot_be_guided_is_refused():
    with exl.load(SMALL, device="cpu", context=128, cache_tokens=192) as llm:
        for scale in (-1, "2", True, float("nan")):
            with pytest.raises(exl.ConfigError, match=r"guidance_scale: found .*, expected a number from 0 to 100"):
                llm.generate("One", 3, guidance_scale=scale)
        with pytest.raises(exl.ConfigError, match="negative_prompt: found without guidance_scale="):
            llm.generate("One", 3, negative_prompt="Two")
        with pytest.raises(exl.ConfigError, match="prompt_logprobs: found 0 with guidance_scale="):
            llm.generate("One", 3, guidance_scale=2.0, prompt_logprobs=0)
        with pytest.raises(exl.ConfigError, match="speculate: found 'prompt' with guidance_scale="):
            llm.generate("One", 3, guidance_scale=2.0, speculate="prompt")
        with pytest.raises(exl.ConfigError, match="negative_prompt: found no tokens"):
            llm.generate("One", 3, guidance_scale=2.0, negative_prompt=[])
        with pytest.raises(exl.ConfigError, match="negative_prompt: found 5"):
            llm.generate("One", 3, guidance_scale=2.0, negative_prompt=5)
        with pytest.raises(
            exl.MemoryBudgetError, match=r"guidance_scale: 2 sequences need 4 pages .*cache_tokens=256"
        ) as error:
            llm.generate([5] * 20, 108, guidance_scale=2.0)
        fits = int(str(error.value).split("max_tokens=")[1].split()[0])
        assert llm.generate([5] * 20, fits, guidance_scale=2.0, ignore_eos=True).num_tokens == fits
