"""Models all of whose layers have a sliding window keep the pages that it reaches: the same bits as with all pages, for
texts longer than the cache, alone and in company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.engine.admission import Pages
from exl.engine.build import Engine, load_engine
from exl.engine.request import TokenRequest
from exl.errors import ConfigError
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cpu_targets import TARGETS
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import CASES, build, decode_logits, prefill_logits, save

TOLERANCE = 2e-4  # as in test_against_transformers
CONTEXT, CHUNK, WINDOW = 1024, 32, 16
LEAST = 3 * PAGE_SIZE  # a window and a chunk, which begin and end anywhere in a page
PARAMS = SamplingParams(temperature=1.0, seed=7, max_tokens=200)


def saved(folder, window: int):
    (case,) = [case for case in CASES if case.name == "mistral"]
    model = build(replace(case, options={"sliding_window": window, "max_position_embeddings": CONTEXT}))
    return model, save(model, folder)


@pytest.fixture(scope="module")
def model_and_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("mistral"), WINDOW)


def opened(folder, where, **options) -> Engine:
    options = {"context": CONTEXT, "prefill_chunk": CHUNK, "kv_cache": "f16"} | options
    if where == "shim":
        return load_engine(folder, EngineOptions(vram="2GB", **options), backend=make_backend("plain"))
    return load_engine(folder, EngineOptions(device="cpu", **options), cpu=where)


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams = PARAMS) -> list:
    """Of requests in one batch: tokens, and log-probabilities, in which other bits would show."""
    engine.generator.eos_ids = frozenset()
    handles = [
        engine.generator.submit(TokenRequest(ids, replace(params, seed=i), top_logprobs=3), inline=True)
        for i, ids in enumerate(prompts)
    ]
    return [(answer.token_ids, answer.ranked) for handle in handles for answer in handle.result()]


def with_all_pages(engine: Engine, run) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pages, "pass_by", lambda self, sequences: None)
        found = run(engine)
    engine.close()
    return found


@pytest.mark.parametrize(
    ("where", "kv_cache"),
    [
        *(pytest.param(*t.values, kind, id=f"{t.id}-{kind}", marks=t.marks) for t in TARGETS for kind in ("f16", "q4")),
        pytest.param("shim", "q8", id="shim-q8"),
    ],
)
def test_a_text_longer_than_the_cache_has_the_bits_of_one_with_all_pages(where, kv_cache, model_and_folder):
    """Also with numbers that are none on the null page: nothing is read of what a window does not reach."""
    count, few = (190, 10) if where == "shim" else (200, 80)
    prompts, params = [some_ids(count)], replace(PARAMS, max_tokens=few)
    everything = opened(model_and_folder[1], where, kv_cache=kv_cache, cache_tokens=CONTEXT)
    expected = with_all_pages(everything, lambda engine: answers(engine, prompts, params))
    engine = opened(model_and_folder[1], where, kv_cache=kv_cache, cache_tokens=LEAST)
    pool, kv = engine.generator.pool, engine.generator.runner.kv
    assert pool.num_usable == LEAST // PAGE_SIZE
    for words in kv.page_words(0):
        words.fill_(-1)
    assert answers(engine, prompts, params) == expected
    assert pool.num_free == pool.num_usable
    engine.close()


def test_in_company_over_few_pages(tmp_path):
    """Sequences are paused, and what they had is partly gone."""
    _, folder = saved(tmp_path, 100)
    prompts, params = [some_ids(count, seed=count) for count in (20, 24, 150)], replace(PARAMS, max_tokens=140)
    (kernels, *_) = TARGETS
    everything = opened(folder, kernels.values[0], cache_tokens=4 * CONTEXT)
    expected = with_all_pages(everything, lambda engine: answers(engine, prompts, params))
    engine = opened(folder, kernels.values[0], cache_tokens=5 * PAGE_SIZE)
    assert answers(engine, prompts, params) == expected
    stats = engine.generator.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    assert answers(engine, prompts, params) == expected  # now with what the cache still knows
    engine.close()


@pytest.mark.parametrize("where", TARGETS)
def test_logits_beyond_the_cache_are_those_of_transformers(where, model_and_folder):
    model, folder = model_and_folder
    ids = some_ids(300, seed=3)
    engine = opened(folder, where, kv_cache="f32", cache_tokens=LEAST)
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= TOLERANCE
    # What is generated, against transformers token by token.
    ((tokens, ranked),) = answers(engine, [ids[:170]], replace(PARAMS, max_tokens=60))
    expected = torch.log_softmax(decode_logits(model, ids[:170] + tokens[:-1], 170), -1)
    for token_id, row, found in zip(tokens, expected, ranked, strict=True):
        assert found[0][0] == token_id
        assert abs(found[0][1] - float(row[token_id])) <= 2 * TOLERANCE


def test_the_plan_has_room_for_a_window_and_what_is_computed_at_once(model_and_folder):
    plan = opened(model_and_folder[1], TARGETS[1].values[0], prefill_window=64).plan
    assert plan.to_json()["cache_tokens"] == (2 + 2) * PAGE_SIZE  # of 15 + 64 tokens, and a page at either end
    assert plan.num_pages == 5  # with the null page
    with pytest.raises(ConfigError, match=r"^cache_tokens: found 191, expected for a window, .*, 192, or more"):
        opened(model_and_folder[1], TARGETS[1].values[0], cache_tokens=LEAST - 1)
    for context, pages in ((WINDOW, 1), (WINDOW + 1, 2), (64, 2)):  # never more than a context, and the null page
        assert opened(model_and_folder[1], TARGETS[1].values[0], context=context).plan.num_pages == pages
