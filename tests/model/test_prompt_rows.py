"""What is told of a prompt's tokens, against transformers and against what the same model draws from: logits of whole
texts, log-probabilities, embeddings."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

import exl
from exl.engine.build import Engine, load_engine
from exl.engine.request import TokenRequest
from exl.planning import from_headers
from exl.planning.options import EngineOptions
from exl.sampling_params import SamplingParams
from tests.host.backends import make_backend
from tests.model.cpu_targets import needs_kernels, with_both
from tests.model.cuda_engines import all_logits, bound, load, some_ids
from tests.model.hf_models import CASES, build, prefill_logits, save
from tests.model.placed_model import IDS as STREAMED
from tests.model.placed_model import NUM_LAYERS, PlacedModel

STORIES_260K = Path(__file__).parents[1] / "data" / "stories260K"
TOLERANCE = 2e-4  # as in test_against_transformers.py
CHUNK = 16
IDS = some_ids(44)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: name -> (transformers' model, its folder), each built once."""
    built = {}

    def get(name: str):
        if name not in built:
            model = build(next(case for case in CASES if case.name == name))
            built[name] = (model, save(model, tmp_path_factory.mktemp(name)))
        return built[name]

    return get


@pytest.fixture(scope="module", params=[pytest.param("kernels", marks=needs_kernels), "shim"])
def engine(request, folder) -> Engine:
    """Slices of seven rows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(from_headers, "_MAX_LOGITS_BYTES", 7 * 4 * 96)
    backend = make_backend("plain") if request.param == "shim" else None
    options = {} if backend else {"vram": None, "device": "cpu"}
    engine = load(folder, backend, prefill_chunk=CHUNK, max_sequences=4, cache_tokens=256, **options)
    patch.undo()
    assert engine.generator.runner.max_logit_rows == 7
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def llm():
    with exl.load(STORIES_260K, device="cpu", context=64) as llm:
        yield llm


def last_logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    """As generation has them before its first token."""
    sequence = engine.generator.begin(len(ids))
    found = engine.generator.extend(sequence, ids).to("cpu", copy=True)
    engine.generator.end(sequence)
    return found[0]


def test_logits_of_a_text_are_those_that_a_prompt_gives(engine):
    """At the end of a prompt; and at every token for which a prompt that ends there has the same chunks, bit by bit."""
    found = all_logits(engine, IDS)
    for count in (1, 2, 8, 9, 16, 17, 32, 44):
        expected = last_logits(engine, IDS[:count])
        assert torch.equal(all_logits(engine, IDS[:count])[-1], expected), count
        if count % CHUNK == 0:
            assert torch.equal(found[count - 1], expected), count


def test_logits_of_a_text_in_company(engine):
    expected = all_logits(engine, IDS)
    engine.generator.eos_ids = frozenset()
    asked = TokenRequest(IDS[:30], SamplingParams(temperature=1.0, seed=3, max_tokens=12))
    alone = engine.generator.submit(asked, inline=True)
    alone.result(60)
    with engine.generator.submit(asked) as other:
        assert torch.equal(all_logits(engine, IDS), expected)
        other.result(60)
    assert other.answers[0].token_ids == alone.answers[0].token_ids


# ---- log-probabilities


def scored(engine: Engine, ids: list[int], count: int = 3, most: int = 0, **options):
    """The only answer, with the prompt's log-probabilities."""
    params = SamplingParams(max_tokens=most, temperature=1.0, seed=4)
    handle = engine.generator.submit(TokenRequest(ids, params, prompt_logprobs=count, **options), inline=True)
    handle.result(60)
    return handle.answers[0]


def check_logprobs(found, ids: list[int], log_probs: torch.Tensor, count: int, tolerance: float) -> None:
    """``log_probs``: f64 [tokens, V], after each token."""
    assert found[0] is None
    assert len(found) == len(ids)
    for i, ranked in enumerate(found[1:]):
        (token_id, value), *others = ranked
        assert token_id == ids[i + 1]
        assert abs(value - float(log_probs[i, token_id])) <= tolerance
        assert len(others) == count
        for (other, near), right in zip(others, log_probs[i].topk(count).values.tolist(), strict=True):
            assert abs(near - right) <= tolerance
            assert abs(near - float(log_probs[i, other])) <= tolerance


@with_both
@pytest.mark.parametrize("name", ["llama-dynamic", "mistral", "qwen2-window", "qwen3"])
def test_log_probabilities_of_a_prompt_are_those_of_transformers(name, cpu, models):
    model, folder = models(name)
    engine, ids = (
        load_engine(folder, EngineOptions(context=128, kv_cache="f32", prefill_chunk=32), cpu=cpu),
        some_ids(90),
    )
    log_probs = torch.log_softmax(prefill_logits(model, ids).double(), -1)
    check_logprobs(scored(engine, ids).prompt_ranked, ids, log_probs, 3, TOLERANCE)
    engine.close()


def test_log_probabilities_of_a_prompt_change_nothing(engine):
    """They are those of the text's logits; what is generated is what it is without them. Also for a prompt that runs as
    decode rows."""
    engine.generator.eos_ids = frozenset()
    for ids in (IDS, IDS[:5]):
        asked = TokenRequest(ids, SamplingParams(max_tokens=12, temperature=1.0, seed=4), speculate="prompt")
        plain = engine.generator.submit(asked, inline=True)
        plain.result(60)
        with engine.generator.submit(TokenRequest(IDS[20:], SamplingParams(max_tokens=10, temperature=0.0))) as other:
            answer = scored(engine, ids, 2, most=12, speculate="prompt", reuse_prefix=True)
            other.result(60)
        assert answer.token_ids == plain.answers[0].token_ids
        assert answer.num_reused == 0
        log_probs = torch.log_softmax(all_logits(engine, ids).double(), -1)
        check_logprobs(answer.prompt_ranked, ids, log_probs, 2, 1e-6)


def test_scores_of_a_text():
    with exl.load(STORIES_260K, kv_cache="f32", device="cpu") as llm:
        done = llm.generate("Once upon a time", max_tokens=0, prompt_logprobs=2, n=2)
        ids = llm.encode("Once upon a time")
        log_probs = torch.log_softmax(llm.logits(ids).double(), -1)
        assert (done.text, done.finish_reason, done.limit) == ("", "length", "max_tokens")
        assert done.choices[1].prompt_logprobs == done.prompt_logprobs
        assert [None if one is None else one.token_id for one in done.prompt_logprobs] == [None, *ids[1:]]
        for one, row in zip(done.prompt_logprobs[1:], log_probs, strict=False):
            assert abs(one.logprob - float(row[one.token_id])) < 1e-9
            assert [other.token_id for other in one.alternatives] == row.topk(2).indices.tolist()
        assert llm.generate("One", 1).prompt_logprobs is None
        assert llm.chat().send("One", 2, prompt_logprobs=0).prompt_logprobs[1].alternatives == ()
        with pytest.raises(exl.ConfigError, match=r"prompt_logprobs: found -1, expected None or .* 0 to 512"):
            llm.generate("One", prompt_logprobs=-1)


# ---- embeddings


def pooled(engine: Engine, ids: list[int], pooling: str) -> torch.Tensor:
    request = TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, pooling=pooling)
    return torch.from_numpy(
        engine.generator.submit(request, lambda answers: answers[0].embedding, inline=True).result()
    )


@torch.no_grad()
def expected_states(model, ids: list[int]) -> torch.Tensor:
    """transformers' last hidden state, f64 [tokens, hidden size]."""
    model = copy.deepcopy(model)  # dynamic RoPE remembers the longest sequence so far
    return model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].double()


@with_both
@pytest.mark.parametrize("name", ["llama-dynamic", "mistral", "qwen2-window", "qwen3", "llama-tied"])
def test_embeddings_are_the_pooled_states_of_transformers(name, cpu, models):
    model, folder = models(name)
    options, ids = EngineOptions(context=128, kv_cache="f32", prefill_chunk=32), some_ids(90)
    engine = load_engine(folder, options, cpu=cpu)
    for length in (90, 64, 1):
        states = expected_states(model, ids[:length])
        assert states.std() > 0.1
        assert (pooled(engine, ids[:length], "mean") - states.mean(0)).abs().max() <= TOLERANCE
        assert (pooled(engine, ids[:length], "last") - states[-1]).abs().max() <= TOLERANCE
    engine.close()


def test_embeddings_in_company(engine, folder_and_model):
    """Near those of transformers, with a GPU's f16 too; bit by bit what each text gets alone."""
    texts = [IDS, IDS[3:8], [7], IDS[10:30], IDS[::-1]]
    for pooling in ("mean", "last"):
        alone = [pooled(engine, ids, pooling) for ids in texts]
        for ids, found in zip(texts, alone, strict=True):
            states = expected_states(folder_and_model[1], ids)
            right = states.mean(0) if pooling == "mean" else states[-1]
            assert (found - right).abs().max() <= bound(states, engine.config.num_layers)
        asked = TokenRequest(IDS[5:40], SamplingParams(max_tokens=8, temperature=0.0), prompt_logprobs=1)
        params = SamplingParams(max_tokens=0)
        with engine.generator.submit(asked) as other:
            handles = [engine.generator.submit(TokenRequest(ids, params, pooling=pooling)) for ids in texts]
            for handle, expected in zip(handles, alone, strict=True):
                handle.result(60)
                assert torch.equal(torch.from_numpy(handle.answers[0].embedding), expected)
            other.result(60)


def test_streamed_layers_give_what_resident_ones_give(four_bit, tmp_path):
    """All chunks of a step are in one window there."""
    found = []
    for resident in ((), tuple(range(NUM_LAYERS))):
        with PlacedModel(four_bit, tmp_path, resident=resident) as model:
            assert model.generator.runner.keeps_all_rows == (not resident)
            steps = model.generator.scheduler.stats.steps
            texts = [pooled(model, STREAMED, pooling).tolist() for pooling in ("mean", "last")]
            assert model.generator.scheduler.stats.steps - steps == 2 * (3 if resident else 2)
            found.append((model.logits().tolist(), texts, scored(model, STREAMED, most=3).prompt_ranked))
    assert found[0] == found[1]


def test_texts_are_embedded():
    with exl.load(STORIES_260K, kv_cache="f32", device="cpu", context=64) as llm:
        model = transformers.AutoModelForCausalLM.from_pretrained(STORIES_260K, dtype=torch.float32).eval()
        texts = ["Once upon a time", llm.encode("One day"), "The dog was big."]
        for pooling in ("mean", "last"):
            found = llm.embed(texts, pooling)
            assert (found.dtype, found.shape) == (torch.float32, (3, llm.config.hidden_size))
            for row, text in zip(found, texts, strict=True):
                states = expected_states(model, llm.encode(text))
                right = states.mean(0) if pooling == "mean" else states[-1]
                assert (row - right).abs().max() <= TOLERANCE
                assert torch.equal(llm.embed(text, pooling)[0], row)
        unit = llm.embed(texts, normalize=True)
        assert (unit.norm(dim=1) - 1).abs().max() < 1e-6
        assert torch.allclose(unit * llm.embed(texts).norm(dim=1, keepdim=True), llm.embed(texts), atol=1e-5)
        with llm.submit("The dog", 40) as other:
            assert torch.equal(llm.embed(texts, normalize=True), unit)
            other.result(60)
        handles = [llm.submit_embed(text, "last", normalize=True) for text in texts]
        assert torch.equal(
            torch.stack([handle.result(60) for handle in handles]), llm.embed(texts, "last", normalize=True)
        )
        with pytest.raises(exl.ConfigError, match="text: found an empty text"):
            llm.submit_embed("")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts: found an empty list, expected at least one text"),
        ("", {}, "texts: found an empty text, expected at least one token"),
        (["One", ""], {}, r"texts\[1\]: found an empty text"),
        ([[1, 5], []], {}, r"texts\[1\]: found an empty text"),
        (["One", [5] * 65], {}, r"texts\[1\]: found 65 tokens, the context holds 64"),
        ([1, 512], {}, "texts: found token id 512, expected an integer from 0 to 511"),
        (["One", 1.5], {}, r"texts\[1\]: found 1.5, expected a text"),
        (1.5, {}, "texts: found 1.5, expected a text, token ids, or a list of these"),
        ("One", {"pooling": "max"}, "pooling: found 'max', expected 'mean' or 'last'"),
        ("One", {"normalize": 2}, "normalize: found 2, expected True or False"),
    ],
)
def test_what_cannot_be_embedded(llm, texts, options, message):
    with pytest.raises(exl.ConfigError, match=message):
        llm.embed(texts, **options)
