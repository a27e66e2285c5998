"""A request gets the same tokens in any company as alone, bit for bit: mixed lengths, seeds, samplers, stops, drafts
and choices in one batch, with pages short and requests given up, through every backend."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from exl.engine import build
from exl.engine.build import Engine, load_engine
from exl.engine.request import Outcome, TokenRequest
from exl.philox import child_seed
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model import hf_models
from tests.model.cpu_targets import with_both
from tests.model.test_quantized import make

VOCAB, CONTEXT = 96, 256
ENDS = frozenset({2, 3, 4, 5})  # more than one, so that a random model reaches them


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Random models: dense ones by the width of their MLP, and "int4"."""
    made: dict[object, Path] = {}

    def folder(kind: object) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("model")
            if kind == "int4":
                make(made[kind], 4, 32)
            else:
                sizes = {"intermediate_size": kind, "max_position_embeddings": CONTEXT}
                model = hf_models.build(hf_models.Case("wide", "llama", sizes), projection_scale=2.0)
                hf_models.save(model, made[kind])
        return made[kind]

    return folder


@contextmanager
def opened(folder: Path, threads: int = 1, cpu=None, backend=None, **options):
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "thread_limit", lambda asked: threads)
    options = {"context": CONTEXT, "kv_cache": "f32", "device": "cpu", "prefill_chunk": 32} | options
    engine = load_engine(folder, EngineOptions(**options), cpu=cpu, backend=backend)
    patch.undo()
    engine.generator.eos_ids = ENDS
    try:
        yield engine
    finally:
        engine.close()


def some_requests(count: int, seed: int, longest: int = 90) -> list[TokenRequest]:
    """Half of the prompts begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(6, VOCAB) for _ in range(longest)]
    found = []
    for _ in range(count):
        length = rng.choice([1, 2, 31, 32, 33, 64, 65, rng.randint(1, longest)])
        own = [rng.randrange(6, VOCAB) for _ in range(length)]
        kept = rng.choice([0, length // 2, length])
        options: dict = {"max_tokens": rng.randint(1, 40), "temperature": 0.0}
        if rng.random() < 0.7:
            options |= {"temperature": rng.choice([0.6, 1.0, 1.5]), "seed": rng.randrange(100)}
        for name, values in SAMPLERS.items():
            if rng.random() < 0.2:
                options[name] = rng.choice(values)
        found.append(
            TokenRequest(
                (shared[:kept] + own)[:length],
                SamplingParams(**{"seed": rng.randrange(100), **options}),
                top_logprobs=rng.choice([None, None, 2]),
                num_choices=rng.choice([1, 1, 1, 2, 3]),
                speculate=rng.choice([None, "prompt"]),
                draft_tokens=3,
            )
        )
    return found


SAMPLERS = {
    "top_k": [1, 5, 40],
    "top_p": [0.5, 0.9],
    "min_p": [0.05],
    "typical_p": [0.8],
    "top_n_sigma": [1.0],
    "repetition_penalty": [1.3],
    "frequency_penalty": [0.5],
    "presence_penalty": [0.5],
    "penalty_window": [8],
    "dry_multiplier": [0.8],
    "dynamic_range": [0.3],
    "xtc_probability": [0.5],
    "min_tokens": [10],
    "ignore_eos": [True],
    "stop_token_ids": [[7, 8, 9]],
    "banned_tokens": [[10, 11]],
    "logit_bias": [{12: 2.0, 13: -3.0}],
}


def results(handle) -> list[tuple]:
    handle.result(timeout=120)
    return [(answer.token_ids, answer.ranked, answer.outcome) for answer in handle.answers]


def run_alone(engine: Engine, request: TokenRequest) -> list[tuple]:
    """Each choice on its own, and nothing reused."""
    found = []
    for i in range(request.num_choices):
        params = replace(request.params, seed=child_seed(request.params.seed, i))
        one = replace(request, params=params, num_choices=1, reuse_prefix=False, speculate=None)
        found += results(engine.generator.submit(one, inline=True))
    return found


def run_together(engine: Engine, requests: list[TokenRequest], seed: int, cancelled: frozenset[int] = frozenset()):
    """In a random order; some are given up on the way. Results by their place in ``requests``."""
    rng = random.Random(seed)
    order = list(range(len(requests)))
    rng.shuffle(order)
    handles = {i: engine.generator.submit(requests[i]) for i in order}
    for i in cancelled:
        if rng.random() < 0.5:
            handles[i].next_event()
        handles[i].cancel()
    found = {i: results(handle) for i, handle in handles.items() if i not in cancelled}
    for i in cancelled:
        handles[i].result(timeout=120)
        assert handles[i].status in ("cancelled", "stop", "length")
    return found


def check(engine: Engine, count: int, seed: int, **options) -> None:
    requests = some_requests(count, seed, **options)
    alone = [run_alone(engine, request) for request in requests]
    assert len({str(one) for one in alone}) > count // 2
    outcomes = [outcome for one in alone for _, _, outcome in one]
    assert Outcome("length", limit="max_tokens") in outcomes
    assert any(outcome.finish_reason == "stop" for outcome in outcomes)
    for turn in range(2):
        cancelled = frozenset(random.Random(turn).sample(range(count), count // 8))
        for i, found in run_together(engine, requests, turn, cancelled).items():
            assert found == alone[i], (i, requests[i])
    pool = engine.generator.pool
    pool.check([])
    assert pool.num_free == pool.num_pages
    assert not engine.generator.scheduler.live


@with_both
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [1500, 5632, "int4"])
@pytest.mark.sample(6)
def test_64_requests_in_one_batch_give_what_each_gives_alone(folder_of, cpu, threads, kind):
    with opened(folder_of(kind), threads, cpu, max_sequences=64, cache_tokens=16 * CONTEXT) as engine:
        check(engine, 64, threads)
        assert engine.generator.pool.stats.tokens_reused > 0


@with_both
def test_pages_that_are_short_pause_sequences_which_go_on_as_if_nothing_had_been(folder_of, cpu):
    with opened(folder_of(160), 1, cpu, cache_tokens=2 * CONTEXT) as engine:
        requests = [
            TokenRequest([6 + i, 7, 8], SamplingParams(max_tokens=200, temperature=1.0, seed=i, ignore_eos=True))
            for i in range(6)
        ]
        alone = [run_alone(engine, request) for request in requests]
        found = run_together(engine, requests, 0)
        assert [found[i] for i in range(6)] == alone
        stats = engine.generator.scheduler.stats
        assert stats.preemptions > 0
        assert stats.recomputed_tokens > 0
        engine.generator.pool.check([])


def test_requests_in_one_batch_on_a_gpus_kernels(folder_of):
    """On the shim, a few short ones: f16, and the order in which a GPU runs ahead."""
    options = {"kv_cache": "f16", "device": "auto", "vram": "2GB", "max_sequences": 8, "cache_tokens": 4 * CONTEXT}
    with opened(folder_of("int4"), backend=make_backend("plain"), **options) as engine:
        requests = some_requests(8, 5, longest=40)
        for request in requests:
            object.__setattr__(request.params, "max_tokens", min(request.params.max_tokens, 6))
        alone = [run_alone(engine, request) for request in requests]
        found = run_together(engine, requests, 1)
        assert [found[i] for i in range(8)] == alone
        engine.generator.pool.check([])


def test_what_a_gpu_has_generated_is_not_exact_in_a_prompt(folder_of):
    """Decode rows and prompt rows run through different kernels, also where no chunk is long enough for panels."""
    options = {"kv_cache": "f16", "device": "auto", "vram": "2GB", "max_sequences": 2}
    with opened(folder_of("int4"), backend=make_backend("plain"), **options) as engine:
        prompt = list(range(6, 26))
        first = TokenRequest(prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        ((token_ids, _, _),) = results(engine.generator.submit(first, inline=True))
        longer = replace(first, prompt_ids=[*prompt, *token_ids], params=replace(first.params, max_tokens=2))
        handle = engine.generator.submit(longer, inline=True)
        found = results(handle)
        assert handle.answers[0].num_reused == len(prompt)  # not what was generated
        assert found == run_alone(engine, longer)
