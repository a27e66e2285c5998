"""Models whose layers have a sliding window here and none there keep, for the former, the pages that it reaches: logits
are those of transformers, and bits those of a cache in which all layers keep all tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.engine.build import Engine, load_engine
from exl.engine.cache_files import load_cache, save_cache
from exl.engine.request import TokenRequest
from exl.errors import ConfigError, MemoryBudgetError
from exl.layout.window import window_pages
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cpu_targets import TARGETS
from tests.model.cuda_engines import all_logits, some_ids
from tests.model.hf_models import CASES, build, decode_logits, prefill_logits, save
from tests.reference import adapter_twin

TOLERANCE = 2e-4  # as in test_against_transformers
CONTEXT, CHUNK, WINDOW, NARROW = 2048, 32, 100, 20
EACH = window_pages(WINDOW, CHUNK)  # pages of a sequence: of a window and a chunk
PARAMS = SamplingParams(temperature=1.0, seed=7, max_tokens=100)
(KERNELS, TORCH) = (target.values[0] for target in TARGETS)


def saved(folder, family: str = "qwen2", **options):
    """The first and the last of four layers have no window."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    options = {
        "num_hidden_layers": 4,
        "max_position_embeddings": CONTEXT,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": kinds,
    } | options
    (case,) = [case for case in CASES if case.name == family]
    model = build(replace(case, options={**case.options, **options}))
    return model, save(model, folder)


@pytest.fixture(scope="module")
def model_and_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """For the shim, where few tokens take long."""
    return saved(tmp_path_factory.mktemp("narrow"), sliding_window=NARROW)[1]


def opened(folder, where=KERNELS, **options) -> Engine:
    options = {"context": CONTEXT, "prefill_chunk": CHUNK, "kv_cache": "f16", "max_sequences": 1} | options
    if where == "shim":
        engine = load_engine(folder, EngineOptions(vram="2GB", **options), backend=make_backend("plain"))
    else:
        engine = load_engine(folder, EngineOptions(device="cpu", **options), cpu=where)
    engine.generator.eos_ids = frozenset()
    return engine


def asked(engine: Engine, prompts: list[list[int]], params: SamplingParams = PARAMS, **options) -> list:
    """Of requests in one batch: answers."""
    handles = [
        engine.generator.submit(TokenRequest(ids, replace(params, seed=i), top_logprobs=3, **options), inline=True)
        for i, ids in enumerate(prompts)
    ]
    return [answer for handle in handles for answer in handle.result()]


def told(answers: list) -> list:
    """Tokens, and log-probabilities, in which other bits would show."""
    return [(answer.token_ids, answer.ranked) for answer in answers]


def at_rest(engine: Engine) -> None:
    pool = engine.generator.pool
    pool.check([], [])
    assert pool.num_free == pool.num_usable
    assert pool.windows.num_free == pool.windows.num_usable


@pytest.mark.parametrize("where", TARGETS)
def test_logits_are_those_of_transformers(where, model_and_folder):
    """Of texts that a window passes by several times; all at once, and token by token."""
    model, folder = model_and_folder
    engine, ids = opened(folder, where, kv_cache="f32"), some_ids(700, seed=3)
    assert engine.plan.windows.num_pages == EACH + 1
    assert engine.generator.runner.windows.num_pages == EACH + 1
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= TOLERANCE
    ((tokens, ranked),) = told(asked(engine, [ids[:300]], replace(PARAMS, max_tokens=80)))
    expected = torch.log_softmax(decode_logits(model, ids[:300] + tokens[:-1], 300), -1)
    for token_id, row, found in zip(tokens, expected, ranked, strict=True):
        assert found[0][0] == token_id
        assert abs(found[0][1] - float(row[token_id])) <= 2 * TOLERANCE
    at_rest(engine)
    engine.close()


@pytest.mark.parametrize("where", TARGETS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere2", "exaone4", "smollm3-window"])
def test_other_families(name, where, tmp_path):
    """With their own windows of 16 tokens."""
    (case,) = [case for case in CASES if case.name == name]
    model = build(replace(case, options={**case.options, "max_position_embeddings": CONTEXT}))
    engine, ids = opened(save(model, tmp_path), where, kv_cache="f32"), some_ids(400, seed=5)
    assert engine.plan.windows.window == 16
    assert engine.plan.windows.num_pages == window_pages(16, CHUNK) + 1
    assert (all_logits(engine, ids) - prefill_logits(model, ids)).abs().max() <= TOLERANCE
    engine.close()


@pytest.mark.parametrize(
    ("where", "kv_cache"),
    [
        *(pytest.param(*t.values, kind, id=f"{t.id}-{kind}", marks=t.marks) for t in TARGETS for kind in ("f16", "q4")),
        pytest.param("shim", "q8", id="shim-q8"),
    ],
)
def test_the_bits_are_those_of_a_cache_with_all_pages(where, kv_cache, model_and_folder, narrow):
    """Also with numbers that are none on the null page: nothing is read of what a window does not reach."""
    folder, count, few = (narrow, 126, 6) if where == "shim" else (model_and_folder[1], 400, 80)
    prompts, params = [some_ids(count)], replace(PARAMS, max_tokens=few)
    whole = opened(folder, where, kv_cache=kv_cache, window_cache=False)
    assert whole.plan.windows is None
    expected = told(asked(whole, prompts, params))
    whole.close()
    engine = opened(folder, where, kv_cache=kv_cache)
    for words in engine.generator.runner.windows.page_words(0):
        words.fill_(-1)
    others = engine.generator.pool.allocate(8)  # so that page numbers of the two kinds differ
    assert told(asked(engine, prompts, params)) == expected
    engine.generator.pool.release(others)
    windows = engine.generator.runner.windows
    assert all(words.any() for page in (1, 2, 3) for words in windows.page_words(page))  # they were written to
    at_rest(engine)
    engine.close()


@pytest.mark.parametrize("where", TARGETS)
def test_in_company(where, model_and_folder):
    """Of sequences whose pages lie here and there."""
    prompts = [some_ids(count, seed=count) for count in (20, 24, 150, 260)]
    whole = opened(model_and_folder[1], where, cache_tokens=4 * CONTEXT, max_sequences=4, window_cache=False)
    expected = told(asked(whole, prompts))
    whole.close()
    engine = opened(model_and_folder[1], where, max_sequences=4)
    assert engine.generator.pool.windows.num_usable == 4 * EACH
    assert told(asked(engine, prompts)) == expected
    assert told(asked(engine, prompts)) == expected  # now with what the cache still knows
    engine.close()


def test_paused_for_lack_of_window_pages(model_and_folder):
    """Two beside each other, with pages of one sequence in the layers that have a window."""
    prompts, params = [some_ids(count, seed=count) for count in (40, 50, 60)], replace(PARAMS, max_tokens=150)
    whole = opened(model_and_folder[1], cache_tokens=4 * CONTEXT, max_sequences=4, window_cache=False)
    expected = told(asked(whole, prompts, params))
    whole.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exl.planning.plan._SEQUENCES_WITH_WINDOWS", 1)
        engine = opened(model_and_folder[1], max_sequences=4)
    assert engine.generator.pool.windows.num_usable == EACH
    assert told(asked(engine, prompts, params)) == expected
    stats = engine.generator.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    assert told(asked(engine, prompts, params)) == expected
    at_rest(engine)
    engine.close()


@pytest.mark.parametrize("where", [*TARGETS, pytest.param("shim", id="shim")])
def test_the_beginning_of_a_text_is_reused_with_the_same_bits(where, model_and_folder, narrow):
    """Where all pages of the one kind are there and those of the other that the window reaches."""
    folder, shared = (narrow, 128) if where == "shim" else (model_and_folder[1], 256)
    few, ids = replace(PARAMS, max_tokens=4), some_ids(shared + 40)
    first, other = ids, ids[: shared + 10] + some_ids(9, seed=9)
    engine = opened(folder, where, kv_cache="q8", max_sequences=2)
    cold = told(asked(engine, [other], few, reuse_prefix=False))
    engine.generator.pool.clear()
    asked(engine, [first], few)
    (again,) = asked(engine, [other], few)
    assert again.num_reused == shared
    assert told([again]) == cold
    engine.generator.pool.windows.release(engine.generator.pool.windows.allocate(engine.plan.windows.num_pages - 1))
    (without,) = asked(engine, [other], few)  # all window pages have been another one's
    assert without.num_reused == 0
    assert told([without]) == cold
    engine.close()


def test_a_conversation_goes_on_from_its_end(model_and_folder):
    """With pages of one sequence: what is needed behind the last whole page was not given back."""
    engine, ids = opened(model_and_folder[1]), some_ids(200)
    for _ in range(5):
        (answer,) = asked(engine, [ids], replace(PARAMS, max_tokens=40), reuse_prefix=True)
        ids = ids + answer.token_ids
        (cold,) = asked(opened(model_and_folder[1]), [ids], replace(PARAMS, max_tokens=4))
        (warm,) = asked(engine, [ids], replace(PARAMS, max_tokens=4))
        assert warm.num_reused == (len(ids) - 1) // PAGE_SIZE * PAGE_SIZE
        assert told([warm]) == told([cold])
    engine.close()


def test_window_pages_in_use_are_bounded(model_and_folder):
    engine = opened(model_and_folder[1], max_sequences=2)
    windows, most, growing = engine.generator.pool.windows, [], []
    handle = engine.generator.submit(TokenRequest(some_ids(900), replace(PARAMS, max_tokens=60)), inline=True)
    engine.generator.seat.apart(lambda: None)
    scheduler = engine.generator.scheduler
    while scheduler.step():
        most.append(windows.num_usable - windows.num_free)
        growing += [len(sequence.pages) for sequence in scheduler.running]
    handle.result()
    assert max(growing) == -(-960 // PAGE_SIZE)
    assert 3 <= max(most) <= EACH
    stats = engine.generator.stats()
    assert (stats.window_pages_total, stats.window_pages_free) == (2 * EACH, 2 * EACH)
    engine.close()


def test_drafts_searches_and_guidance(model_and_folder):
    prompt = (some_ids(30) * 12)[:340]
    whole = opened(model_and_folder[1], max_sequences=4, cache_tokens=4 * CONTEXT, window_cache=False)
    engine = opened(model_and_folder[1], max_sequences=4)
    greedy = SamplingParams(temperature=0.0, max_tokens=70)
    for options in (
        {"speculate": "prompt", "draft_tokens": 6},
        {"num_beams": 3, "num_choices": 2},
        {"guidance_scale": 1.5, "negative_ids": prompt[:150]},
        {"num_choices": 3},
    ):
        found = asked(engine, [prompt], greedy, **options)
        assert told(found) == told(asked(whole, [prompt], greedy, **options))
        at_rest(engine)
    assert engine.generator.stats().drafts_accepted > 0
    whole.close()
    engine.close()


@pytest.fixture(scope="module")
def adapters(model_and_folder, tmp_path_factory):
    """By name, (as merged into the model, its folder): of a layer with a window and of one without."""
    model, folder = model_and_folder[0], tmp_path_factory.mktemp("adapters")
    made = {
        "a": adapter_twin.make(model, ["q_proj", "k_proj", "v_proj", "down_proj"], r=3, seed=1),
        "b": adapter_twin.make(model, ["v_proj", "o_proj", "up_proj"], r=5, seed=2),
    }
    return {name: (adapter.merged(model), adapter.save(folder / name)) for name, adapter in made.items()}


@pytest.mark.parametrize("where", TARGETS)
def test_adapters(where, model_and_folder, adapters):
    """Their texts take pages of both kinds, are told apart in both, and have the bits of a cache of one kind."""
    lora, few = {name: path for name, (_, path) in adapters.items()}, replace(PARAMS, max_tokens=12)
    ids, options = some_ids(300, seed=3), {"lora": lora, "max_sequences": 4}
    exact = opened(model_and_folder[1], where, kv_cache="f32", lora=lora)
    for name, (merged, _) in adapters.items():
        found = torch.cat([chunk.clone() for chunk in exact.generator.logits(ids, name)])
        assert (found - prefill_logits(merged, ids)).abs().max() <= TOLERANCE
    exact.close()
    whole = opened(model_and_folder[1], where, window_cache=False, cache_tokens=4 * CONTEXT, **options)
    expected = {name: told(asked(whole, [ids], few, lora=name)) for name in (None, *lora)}
    assert len({str(found) for found in expected.values()}) == 3
    whole.close()
    engine = opened(model_and_folder[1], where, **options)
    _plan_is_what_is_allocated(engine)
    submit, params = engine.generator.submit, replace(few, seed=0)
    for reused in (0, 256):
        handles = {
            name: submit(TokenRequest(ids, params, top_logprobs=3, lora=name, reuse_prefix="exact"), inline=True)
            for name in expected
        }
        answers = {name: handle.result() for name, handle in handles.items()}
        assert {name: told(found) for name, found in answers.items()} == expected
        assert {found.num_reused for (found,) in answers.values()} == {reused}
    at_rest(engine)
    engine.close()


def _plan_is_what_is_allocated(engine: Engine) -> None:
    lines, runner = {line.purpose: line.num_bytes for line in engine.plan.lines}, engine.generator.runner
    assert lines["KV cache"] == runner.kv.slab.numel()
    assert lines["KV cache, windows"] == runner.windows.slab.numel()
    assert lines["adapters"] == engine.adapters.num_bytes


def test_drafts_searches_and_guidance_under_an_adapter(model_and_folder, adapters):
    """Whose sequences share pages of both kinds, beside one that has no adapter."""
    lora = {name: path for name, (_, path) in adapters.items()}
    prompt, greedy = (some_ids(30) * 12)[:340], SamplingParams(temperature=0.0, max_tokens=30)
    options = {"lora": lora, "max_sequences": 6}
    whole = opened(model_and_folder[1], cache_tokens=6 * CONTEXT, window_cache=False, **options)
    engine = opened(model_and_folder[1], cache_tokens=3 * CONTEXT, **options)
    for asks in (
        {"speculate": "prompt", "draft_tokens": 6},
        {"num_beams": 3, "num_choices": 2},
        {"guidance_scale": 1.5, "negative_ids": prompt[:150]},
        {"num_choices": 3},
    ):
        beside = engine.generator.submit(TokenRequest(some_ids(70), greedy))
        found = told(asked(engine, [prompt], greedy, lora="a", **asks))
        assert found == told(asked(whole, [prompt], greedy, lora="a", **asks))
        assert found != told(asked(whole, [prompt], greedy, **asks))
        assert len(beside.result()[0].token_ids) == 30
        at_rest(engine)
    whole.close()
    engine.close()


@pytest.mark.parametrize("where", [*TARGETS, pytest.param("shim", id="shim")])
def test_streamed_layers(where, narrow, tmp_path):
    """A prompt's chunks go through a layer together: there is room for as many rows at once."""
    options = {"resident_layers": 1, "packed_folder": tmp_path, "prefill_window": 128}
    engine = opened(narrow, where, **options)
    assert engine.plan.windows.num_pages == window_pages(NARROW, 128) + 1
    assert window_pages(NARROW, 128) > window_pages(NARROW, CHUNK)
    prompt, few = some_ids(140), replace(PARAMS, max_tokens=3)
    found = told(asked(engine, [prompt], few))
    engine.close()
    resident = opened(narrow, where)
    assert told(asked(resident, [prompt], few)) == found
    resident.close()


def test_one_sequence_by_hand(model_and_folder):
    model, folder = model_and_folder
    engine, ids = opened(folder, kv_cache="f32"), some_ids(500, seed=4)
    expected = prefill_logits(model, ids)
    sequence = engine.generator.begin(500)
    for start, stop in ((0, 450), (450, 451), (451, 452), (452, 500)):
        logits = engine.generator.extend(sequence, ids[start:stop])
        assert (logits[0] - expected[stop - 1]).abs().max() <= TOLERANCE
    engine.generator.end(sequence)
    at_rest(engine)
    held = engine.generator.pool.windows.allocate(1)
    with pytest.raises(MemoryBudgetError):  # nothing is held of the other slab then
        engine.generator.begin(500)
    engine.generator.pool.windows.release(held)
    at_rest(engine)
    engine.close()


def test_a_draft_model_of_this_kind(model_and_folder):
    """It keeps all pages, and the text is the same."""
    folder, params = model_and_folder[1], replace(PARAMS, temperature=0.0, max_tokens=60)
    plain = opened(folder)
    expected = told(asked(plain, [some_ids(300)], params))
    plain.close()
    engine = opened(folder, draft=folder)
    assert told(asked(engine, [some_ids(300)], params, speculate="draft", draft_tokens=4)) == expected
    stats = engine.generator.stats()
    assert stats.drafts_accepted == stats.drafts_tried > 40
    engine.close()


@pytest.mark.parametrize("where", [*TARGETS, pytest.param("shim", id="shim")])
def test_the_plan_counts_what_is_allocated(where, model_and_folder):
    engine = opened(model_and_folder[1], where, max_sequences=3, kv_cache="q4")
    plan, runner = engine.plan, engine.generator.runner
    lines = {line.purpose: line.num_bytes for line in plan.lines}
    assert lines["KV cache"] == runner.kv.slab.numel()
    assert lines["KV cache, windows"] == runner.windows.slab.numel()
    assert (plan.num_pages, plan.windows.num_pages) == (CONTEXT // PAGE_SIZE, 3 * EACH + 1)
    assert plan.to_json()["window_tokens"] == 3 * EACH * PAGE_SIZE
    assert engine.generator.stats().window_pages_total == 3 * EACH
    engine.close()


def test_what_does_not_work_yet_is_refused_by_name(model_and_folder, tmp_path):
    _, folder = model_and_folder
    engine = opened(folder, max_sequences=4)
    with pytest.raises(ConfigError, match=r"^overflow: found 'shift', .* loaded with window_cache=False"):
        engine.generator.submit(TokenRequest([1, 2], PARAMS, shift_keep=0), inline=True)
    with pytest.raises(MemoryBudgetError, match=r"^num_beams: 4 sequences need more pages together .* cache_tokens="):
        engine.generator.submit(
            TokenRequest(some_ids(300), replace(PARAMS, temperature=0.0, max_tokens=350), num_beams=4), inline=True
        )
    for work in (save_cache, load_cache):
        with pytest.raises(ConfigError, match=r"^the cache of this model cannot be in a file: .* window_cache=False"):
            work(engine, folder, tmp_path / "cache")
    engine.close()
    whole = opened(folder, window_cache=False)
    asked(whole, [some_ids(70)])
    assert save_cache(whole, folder, tmp_path / "cache") == load_cache(whole, folder, tmp_path / "cache") > 70
    whole.close()
    with pytest.raises(ConfigError, match="window_cache: found 1, expected True or False"):
        EngineOptions(window_cache=1)


def test_a_gpus_pages_in_ram_are_of_all_layers(model_and_folder):
    """With kv_ram= all layers keep all tokens."""
    engine = opened(model_and_folder[1], "shim", kv_ram="1MB")
    assert engine.plan.windows is None
    assert engine.plan.num_kept_pages > 0
    engine.close()
